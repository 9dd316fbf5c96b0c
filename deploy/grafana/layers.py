"""The dashboard *Layers*: what every layer's activations did over time, and how large the edits were beside them."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard, VariableSort

from deploy.grafana.panels import Column, Query, choice, dashboard, distribution, fixed, lines, listing, rows_over_time
from deploy.grafana.promql import buckets, in_order, mean, quantile, rate

NORM = "steersman_activation_norm"
EDIT = "steersman_relative_edit_norm"
COSINE = "steersman_layer_cosine"
KIND = ('tokens=~"$tokens"', 'steered=~"$steered"')
CHOSEN = 'layer=~"$layer"'
LARGEST_EDIT = f"max by (layer) ({mean(EDIT, by=['asset', 'layer'])})"
OUTLIERS = f"{rate('steersman_norm_outliers_total', by=['layer'])} / {rate(f'{NORM}_count', by=['layer'])}"


def layers() -> Dashboard:
    everywhere = [
        rows_over_time(
            "Norm of the stream",
            "Decimal logarithm of the mean norm of each layer's output: norms grow by orders of magnitude over depth.",
            Query(in_order(f"log10({mean(NORM, *KIND, by=['layer'])})"), "{{layer}}"),
            "log10 of the norm",
        ),
        rows_over_time(
            "Edit size",
            "Norm of the edit beside that of the stream, mean over tokens, of the asset with the largest.",
            Query(in_order(LARGEST_EDIT), "{{layer}}"),
            "relative norm",
            unit="percentunit",
        ),
        rows_over_time(
            "Cosine between a layer's input and output",
            "Median. Near 1 the layer leaves the stream's direction as it is; a fall marks a layer that turns it.",
            Query(in_order(quantile(0.5, COSINE, by=["layer"])), "{{layer}}"),
            "cosine",
        ),
        rows_over_time(
            "Norms out of baseline",
            "Share of tokens whose norm is far from what is usual at the layer: by the stored baseline, "
            "else by what the engine has seen since it started.",
            Query(in_order(OUTLIERS), "{{layer}}"),
            "share of tokens",
            unit="percentunit",
        ),
    ]
    chosen = [
        distribution(
            "Norms of the chosen layers",
            "Tokens a second, of those sampled, in each range of norms.",
            Query(buckets(NORM, CHOSEN, *KIND), "{{le}}"),
        ),
        distribution(
            "Edit sizes in the chosen layers",
            "Edited tokens a second, of those sampled, in each range of relative norms.",
            Query(buckets(EDIT, CHOSEN), "{{le}}"),
            unit="percentunit",
        ),
        lines(
            "Norm",
            "Median and 95th percentile by layer.",
            Query(quantile(0.5, NORM, CHOSEN, *KIND, by=["layer"]), "{{layer}} p50"),
            Query(quantile(0.95, NORM, CHOSEN, *KIND, by=["layer"]), "{{layer}} p95"),
            log=True,
        ),
        lines(
            "Steered beside unsteered",
            "Mean norm of steered requests' tokens over that of the others, by layer.",
            Query(_ratio('steered="yes"', 'steered="no"'), "{{layer}}"),
            zero=False,
        ),
        lines(
            "Prompt beside generated",
            "Mean norm of the prompts' tokens over that of generated ones, by layer.",
            Query(_ratio('tokens="prompt"', 'tokens="generated"'), "{{layer}}"),
            zero=False,
        ),
        listing(
            "Now",
            "The latest of every layer.",
            "layer",
            Column("Norm, mean", in_order(mean(NORM, *KIND, by=["layer"]))),
            Column("Norm, p95", in_order(quantile(0.95, NORM, *KIND, by=["layer"]))),
            Column("Cosine, median", in_order(quantile(0.5, COSINE, by=["layer"]))),
            Column("Edit, largest mean", in_order(LARGEST_EDIT), "percentunit"),
            Column("Out of baseline", in_order(OUTLIERS), "percentunit"),
        ),
    ]
    return dashboard(
        "steersman-layers",
        "Steersman: layers",
        "What every layer's activations did over time, and how large the edits were beside them.",
        [
            fixed("tokens", "Tokens", "prompt", "generated"),
            fixed("steered", "Steered", "yes", "no"),
            choice("layer", "Layers", f"label_values({NORM}_count, layer)", VariableSort.NUMERICAL_ASC),
        ],
        [("All layers", everywhere), ("Chosen layers", chosen)],
    )


def _ratio(one: str, other: str) -> str:
    """The mean norm where ``one`` matches over that where ``other`` does, in the chosen layers."""
    over, under = (mean(NORM, CHOSEN, matcher, by=["layer"]) for matcher in (one, other))
    return f"({over}) / ({under})"
