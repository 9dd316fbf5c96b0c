"""Writes ``docs/conditional.md`` and its picture from ``benchmarks/results/cast.json``, and nothing that is not there.

python -m benchmarks.cast_report
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS
from benchmarks.report import table

from steersman.clients import pictures

PAGE = Path(__file__).parents[1] / "docs" / "conditional.md"
PICTURE = PAGE.parent / "images" / "conditional.png"
CASES = {"unsteered": "unsteered", "always": "added to every prompt", "profile": "with the profile"}
TEXT = """# Conditional steering

An intervention with `when` works only where a condition holds (see [requests](requests.md)). With `"over":
"last_prompt"` or `"prompt_mean"` it is decided once per request, when its prompt has been computed: conditional
activation steering (CAST, Lee et al. 2024, arXiv 2409.05907). This page is how to find such a condition from labelled
prompts, and what came of it on a small model. It is written by `python -m benchmarks.cast_report` from
`benchmarks/results/cast.json`, which `python -m benchmarks.cast` makes.

## Fit, store, check

```
steersman extract --name refusal --pairs clients/data/refusal.json --layers {edit_layer}
steersman condition fit --split fit --name harmful --layers 0-{last_layer} \\
  --profile refuse-harmful --then '{{"op": "add", "vector": "refusal", "scale": {scale}}}'
steersman condition check --split test --profile refuse-harmful
```

`fit` takes JSON lines of `{{"prompt", "label"}}`, and perhaps `"split"`; without a file those that the project ships,
60 harmful and 60 harmless requests in plain words. It reads the prompts' states from the running server (`POST
/v1/steering/captures`), searches layer, threshold and side of the comparison for the best F1, stores the direction as
a vector and the gated interventions as a profile, and prints the `when`. `check` sends prompts with the profile and
counts the server's own decisions. A request then names `{{"profile": "refuse-harmful"}}`, or the server does by
default.

The direction is the unit difference of the classes' mean states. A prompt is scored by the cosine of its state with a
direction that was made without it, five parts in turn, so that the F1 of the search is not that of prompts seen
before. `--layers` should end before the layers that are edited: then the prompt's last token is edited too, and with
it the first token of the answer.

Of `prompt_mean`: the mean is over all tokens of the prompt, and in many models the first token's state is many times
as large as any other, so that the mean says little of the prompt. `last_prompt` does not suffer from it and is the
default; the paper uses the mean.

| | here | the paper's code (IBM activation-steering) |
|---|---|---|
| score | cosine of h and c | cosine of h and tanh(c cᵀh/cᵀc), which loses the sign |
| open where the score is above | `above` | `condition_comparator_threshold_is="smaller"` than the score |
| open where it is below | `below` | `"larger"` |
| condition layer L | the output of block L | its input: our L − 1 |

## What came of it

{model} on {machine}. The condition was fitted to {fit} prompts and is judged on {test} others. F1 in cross-validation
is that of the fitted prompts; precision and recall are the server's decisions on the others.

![F1 of the best threshold of each layer, and the share of answers that refuse](images/conditional.png)

{gates}
Answers of {tokens} tokens, greedy, to the {test} other prompts; the share of them that opens as a refusal does
(`refuses` in `clients/scores.py`, a list of words). The direction is added at layer {edit_layer} with scale {scale},
chosen on prompts of the fitted half. What is counted is how an answer opens, not how good it is: so small a model,
moved so far, often refuses in sentences that lead nowhere. All answers are in the result file.

{refusals}"""


def page(folder: Path = RESULTS) -> str:
    found = json.loads((folder / "cast.json").read_text())
    settings, about = found["settings"], found["provenance"]
    return TEXT.format(
        edit_layer=settings["layer"],
        last_layer=settings["layer"] - 1,
        scale=settings["scale"],
        tokens=settings["tokens"],
        model=found["model"],
        machine=f"{about['cores']} cores of {about['cpu']}",
        fit=sum(found["prompts"]["fit"].values()),
        test=sum(found["prompts"]["test"].values()),
        gates=_gates(found),
        refusals=_refusals(found),
    )


def _gates(found: Mapping[str, Any]) -> str:
    rows = []
    for over, gate in found["gates"].items():
        side = "above" if "above" in gate else "below"
        test = gate["test"]
        precision = test["true_positive"] / max(test["true_positive"] + test["false_positive"], 1)
        recall = test["true_positive"] / max(test["true_positive"] + test["false_negative"], 1)
        rows.append(
            [
                f"`{over}`", gate["layer"], f"{side} {gate[side]:.3f}", f"{gate['f1_cross_validated']:.3f}",
                f"{test['f1']:.3f}", f"{precision:.3f}", f"{recall:.3f}",
            ]
        )  # fmt: skip
    heads = ("over", "layer", "open where the cosine is", "F1, cross-validation", "F1, others", "precision", "recall")
    return table(heads, rows)


def _refusals(found: Mapping[str, Any]) -> str:
    rows = [[CASES[case], f"{r['harmful']:.0%}", f"{r['harmless']:.0%}"] for case, r in found["refusals"].items()]
    return table(("", "harmful prompts refused", "harmless prompts refused"), rows)


def picture(folder: Path = RESULTS) -> bytes:
    """PNG: the search over layers, and what came of the condition. Raises pictures.PlotsMissing."""
    found = json.loads((folder / "cast.json").read_text())
    figure = pictures.figure(10, 3.8)
    search, refused = figure.subplots(1, 2)
    for i, (over, gate) in enumerate(found["gates"].items()):
        layers = [int(layer) for layer in gate["by_layer"]]
        search.plot(layers, list(gate["by_layer"].values()), "o-", markersize=3, color=f"C{i}", label=over)
        best = gate["layer"], gate["f1_cross_validated"]
        search.plot(*([x] for x in best), "o", markersize=11, fillstyle="none", color="black")
        search.plot([gate["layer"]], [gate["test"]["f1"]], "x", color=f"C{i}", label=f"{over}, on the other prompts")
    search.set(xlabel="layer", ylabel="F1 of the best threshold, cross-validated", title="search for the condition")
    search.xaxis.get_major_locator().set_params(integer=True)
    search.legend(fontsize=8, frameon=False)
    for i, kind in enumerate(("harmful", "harmless")):
        rates = [found["refusals"][case][kind] for case in CASES]
        bars = refused.bar([x + (i - 0.5) * 0.4 for x in range(len(CASES))], rates, width=0.38, label=f"{kind} prompts")
        refused.bar_label(bars, [f"{rate:.0%}" for rate in rates], fontsize=8)
    refused.set_xticks(range(len(CASES)), CASES.values())
    refused.set(ylabel="share of answers that refuse", title="refusals", ylim=(0, 1.1))
    refused.legend(fontsize=8, frameon=False)
    return pictures.png(figure)


def main() -> None:
    PAGE.write_text(page())
    PICTURE.write_bytes(picture())
    print(f"written to {PAGE} and {PICTURE}")


if __name__ == "__main__":
    main()
