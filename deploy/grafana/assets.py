"""The dashboard *Assets and probes*: each asset's traffic, edit size and gate, and what the probes read."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import Column, Query, choice, dashboard, distribution, lines, listing, rows_over_time
from deploy.grafana.promql import SERVERS, buckets, in_order, mean, quantile, rate

EDITED = "steersman_edited_tokens_total"
EDIT = "steersman_relative_edit_norm"
PROBE = "steersman_probe_value"
COSINE = "steersman_probe_cosine"
SCORE = "steersman_detector_score"
CONFLICT = "steersman_conflict"
ANSWERS = "steersman_detector_answers_total"
ASSET = 'asset=~"$asset"'
CHOSEN = 'probe=~"$probe"'
OPEN, DECISIONS = (rate(f"steersman_gate_{what}_total", ASSET, by=["asset"]) for what in ("open", "decisions"))
GATE = f"{OPEN} / {DECISIONS}"


def assets() -> Dashboard:
    edits = [
        lines(
            "Edited tokens",
            "Each second, by asset.",
            Query(rate(EDITED, ASSET, by=["asset"]), "{{asset}}"),
            stacked=True,
        ),
        lines(
            "Edit size",
            "95th percentile of the edit's norm beside the stream's, over all layers.",
            Query(quantile(0.95, EDIT, ASSET, by=["asset"]), "{{asset}}"),
            unit="percentunit",
        ),
        lines(
            "Gate open",
            "Share of a gate's decisions that let the edit through, by asset.",
            Query(GATE, "{{asset}}"),
            unit="percentunit",
        ),
        rows_over_time(
            "Edit size by layer",
            "Mean over the edited tokens of the chosen assets.",
            Query(in_order(mean(EDIT, ASSET, by=["layer"])), "{{layer}}"),
            "relative norm",
            unit="percentunit",
        ),
        distribution(
            "Edit sizes",
            "Edited tokens a second, of those sampled, in each range of relative norms, of the chosen assets.",
            Query(buckets(EDIT, ASSET), "{{le}}"),
            unit="percentunit",
        ),
        lines(
            "Dosage limited",
            "Times a second that the limit on the relative norm warned, capped or refused.",
            Query(rate("steersman_dosage_limited_total", ASSET, by=["asset", "action"]), "{{asset}}: {{action}}"),
            width=12,
        ),
        listing(
            "Now",
            "The latest of every chosen asset.",
            "asset",
            Column("Edited tokens/s", rate(EDITED, ASSET, by=["asset"])),
            Column("Edit, mean", mean(EDIT, ASSET, by=["asset"]), "percentunit"),
            Column("Edit, p95", quantile(0.95, EDIT, ASSET, by=["asset"]), "percentunit"),
            Column("Gate open", GATE, "percentunit"),
            width=12,
        ),
    ]
    probes = [
        lines(
            "Probe values",
            "Median and 95th percentile by probe, over all layers.",
            Query(quantile(0.5, PROBE, CHOSEN, by=["probe"]), "{{probe}} p50"),
            Query(quantile(0.95, PROBE, CHOSEN, by=["probe"]), "{{probe}} p95"),
            zero=False,
        ),
        lines(
            "Probe cosines",
            "Between a probe's direction and the stream: median and 95th percentile by probe, over all layers.",
            Query(quantile(0.5, COSINE, CHOSEN, by=["probe"]), "{{probe}} p50"),
            Query(quantile(0.95, COSINE, CHOSEN, by=["probe"]), "{{probe}} p95"),
            zero=False,
        ),
        lines(
            "Above the threshold",
            "95th percentile less the probe's threshold, over five minutes. Above 0 the alert is on its way; "
            "a probe without a threshold shows no curve.",
            Query(f"max by (probe) (steersman:probe_value:excess{{{SERVERS}, {CHOSEN}}}) > -Inf", "{{probe}}"),
            zero=False,
        ),
        rows_over_time(
            "Probes by layer",
            "Median over the chosen probes.",
            Query(in_order(quantile(0.5, PROBE, CHOSEN, by=["layer"])), "{{layer}}"),
            "value",
        ),
        distribution(
            "Distribution of the chosen probes",
            "Readings a second, of those sampled, in each range of values.",
            Query(buckets(PROBE, CHOSEN), "{{le}}"),
        ),
        lines(
            "Entropy of the answers",
            "Of the distribution of each generated token, in nats.",
            Query(quantile(0.5, "steersman_answer_entropy"), "p50"),
            Query(quantile(0.95, "steersman_answer_entropy"), "p95"),
        ),
        distribution(
            "Distribution of the entropy",
            "Generated tokens a second, of those sampled, in each range of entropies, in nats.",
            Query(buckets("steersman_answer_entropy"), "{{le}}"),
            width=16,
        ),
    ]
    unusual = rate(ANSWERS, 'outcome="unusual"', by=["detector"])
    scored = rate(ANSWERS, 'outcome!="unscored"', by=["detector"])
    detectors = [
        lines(
            "Scores of the answers",
            "Median and 95th percentile by detector: the larger, the less like the good answers that it was fitted to.",
            Query(quantile(0.5, SCORE, by=["detector"]), "{{detector}} p50"),
            Query(quantile(0.95, SCORE, by=["detector"]), "{{detector}} p95"),
            zero=False,
        ),
        lines(
            "Unusual answers",
            "Share of the scored answers that are beyond the detector's threshold.",
            Query(f"{unusual} / {scored}", "{{detector}}"),
            unit="percentunit",
        ),
        distribution(
            "Distribution of the scores",
            "Answers a second in each range of scores, of all detectors.",
            Query(buckets(SCORE), "{{le}}"),
            width=8,
        ),
        lines(
            "Conflict of the answers",
            "How much likelier images make a token of the answer than the words alone: ln p with less ln p without, of "
            "answers that were replayed. Below 0 the images speak against the token.",
            Query(quantile(0.05, CONFLICT), "p5"),
            Query(quantile(0.5, CONFLICT), "p50"),
            zero=False,
        ),
        lines(
            "Replays",
            "Answers a second that were replayed without their images, by outcome.",
            Query(rate("steersman_replays_total", by=["outcome"]), "{{outcome}}"),
        ),
        distribution(
            "Distribution of the conflict",
            "Tokens a second in each range of conflict, in nats.",
            Query(buckets(CONFLICT), "{{le}}"),
            width=8,
        ),
    ]
    return dashboard(
        "steersman-assets",
        "Steersman: assets and probes",
        "Each asset's traffic, edit size and gate, what the probes read, and how unusual the answers are.",
        [
            choice("asset", "Assets", f"label_values({EDITED}, asset)"),
            choice("probe", "Probes", f"label_values({PROBE}_count, probe)"),
        ],
        [("Assets", edits), ("Probes", probes), ("Answers", detectors)],
    )
