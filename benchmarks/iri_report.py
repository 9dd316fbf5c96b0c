"""Writes ``docs/hallucination.md`` and its pictures from ``benchmarks/results/iri.json``: no number is from elsewhere.

python -m benchmarks.iri_report
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS
from benchmarks.report import table

from steersman.clients.lvlm import scenes
from steersman.clients.lvlm.questions import SAMPLINGS, TEST

DOCS = Path(__file__).parents[1] / "docs"
PAGE, EXAMPLES, MAP = DOCS / "hallucination.md", DOCS / "images/hallucination.png", DOCS / "images/fcct.png"
UNSTEERED, PAPER, CHOSEN = "unsteered", "paper", "chosen"  # conditions of the result file
COMPONENTS = {"attn": "attention", "mlp": "MLP", "hidden": "hidden state"}
EACH = 4  # examples of either kind
TITLES = {UNSTEERED: "unsteered", PAPER: "IRI, the paper's strengths", CHOSEN: "IRI, chosen scale"}
TEXT = """# A hallucination study

What [IRI](iri.md) does to a vision-language model that hallucinates for a known reason, measured as its paper
([arXiv 2511.05923](https://arxiv.org/abs/2511.05923)) measures it, through the server. This page and its pictures are
written by `python -m benchmarks.iri_report` from `benchmarks/results/iri.json`, which `python -m benchmarks.iri` makes
({machine}). The same on a real model: [evaluation](evaluation.md).

## The model, and why it hallucinates

`models/scenes` is of LLaVA's architecture (CLIP's tower, a projector, a Llama of {layers} layers), of
{parameters:.1f} million parameters, trained from nothing on one CPU core to answer "Is there a red circle in the
image?" and to describe pictures of coloured shapes. The shapes come in company: most of a picture's objects are of its
theme. Some are small and pale, the pictures are noisy, and objects that would fit were nearly always there when they
were asked for in training. So where the model cannot see well, company decides, and that is what POPE's adversarial
questions ask for.

![Pictures, questions and answers](images/hallucination.png)

Above: the first pictures of the test with a question that IRI at the chosen scale answers rightly and the model alone
does not, below the first ones with one where it is the other way round{few}.

## Where the answer comes back

The job `trace` puts one component of one layer back to what it was in a clean run, for one group of tokens, in a run on
a noisy picture; the recovery rate is how much of the answer's probability comes back. Means of those {used} of {traced}
questions where the noise takes at least {least} of that probability; layers count from 0.

![Recovery rates](images/fcct.png)

The recipe takes the rates of the last token (sources: the best 3 layers, targets: the best 10, as in the paper):

{recipe}
## What IRI changes

{scenes} pictures that were used for nothing before, POPE's questions in its three samplings. The scale of both
strengths (1 is the paper's {lambda_a} and {lambda_m}) was chosen on {tuned} other pictures, by the mean accuracy:

{scales}
The chosen scale is {scale:g}. The random recipes have the same rates at layers drawn at random, as many sources and
targets, at the same scale. All of them keep the norm of what they change. The intervals are of 95 % over pictures, of
the difference from the unsteered model.

{pope}
{verdict}

Captions, with CHAIR's shares of hallucinated mentions (`CHAIRi`) and of captions with any (`CHAIRs`):

{chair}
Of all questions here the model alone answers {wrong} wrongly; at the chosen scale IRI mends {mended} of them and breaks
{broken} others.

## What it costs

One request at a time, in turn without and with it: {first[unsteered]:.1f} and {first[chosen]:.1f} ms until the first
token, {per_token[unsteered]:.2f} and {per_token[chosen]:.2f} ms for each token after it (median of the ratios:
{ratio:.3f}). A small model's step is short, so that the same work is a larger part of it.
"""


def page(found: Mapping[str, Any]) -> str:
    about, rates, settings = found["provenance"], found["traced"]["rates"], found["settings"]
    mended, broken = changed(found)
    told = [row for each in found["answers"] for row in each["questions"]]
    chair = found["chair"]
    tuned = found["scale"]["accuracy"]
    cost = found["cost"]
    return TEXT.format(
        machine=f"{about['cores']} cores of {about['cpu']}, vLLM on the CPU in float32",
        layers=len(rates["attn"]["last"]),
        parameters=found["parameters"] / 1e6,
        few="" if min(len(first(mended)), len(first(broken))) == EACH else " (there are no more)",
        used=found["traced"]["used"],
        least=found["traced"]["least"],
        traced=found["traced"]["questions"],
        recipe=_recipe(found["recipe"]),
        scenes=settings["scenes"],
        tuned=settings["tuned"],
        lambda_a=found["recipe"]["lambda_a"],
        lambda_m=found["recipe"]["lambda_m"],
        scales=table(
            ("scale", *(f"{float(s):g}" for s in tuned)), [("accuracy", *(f"{a:.3f}" for a in tuned.values()))]
        ),
        scale=found["scale"]["chosen"],
        pope="\n".join(f"{sampling}:\n\n{_scores(found['pope'][sampling])}" for sampling in SAMPLINGS),
        verdict=_verdict(found),
        chair=table(
            ("", "CHAIRi", "CHAIRs", "recall"),
            [
                (title, *(f"{chair[name][score]:.3f}" for score in ("chair_i", "chair_s", "recall")))
                for name, title in TITLES.items()
            ]
            + [("random recipes", *(_range(chair, score) for score in ("chair_i", "chair_s", "recall")))],
        ),
        wrong=sum((UNSTEERED in row["yes"]) is not row["there"] for row in told),
        mended=len(mended),
        broken=len(broken),
        first={name: 1e3 * seconds for name, seconds in cost["first_token"].items()},
        per_token={name: 1e3 * seconds for name, seconds in cost["per_token"].items()},
        ratio=cost["per_token_ratio"],
    )


def changed(found: Mapping[str, Any]) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """(scene, question) of those that IRI at the chosen scale mends, and of those that it breaks, in order."""
    out: tuple[list[Any], list[Any]] = ([], [])
    for scene in found["answers"]:
        for row in scene["questions"]:
            before, after = ((name in row["yes"]) is row["there"] for name in (UNSTEERED, CHOSEN))
            if before is not after:
                out[0 if after else 1].append((scene, row))
    return out


def first(each: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """One question of each of the first pictures."""
    return list({scene["scene"]: (scene, row) for scene, row in reversed(each)}.values())[::-1][:EACH]


def _recipe(made: Mapping[str, Any]) -> str:
    def row(part: str) -> tuple[str, ...]:
        rates = ", ".join(f"{made[f'rr_{part}'][layer]:.2f}" for layer in made["sources"][part])
        layers = (", ".join(map(str, made[field][part])) for field in ("sources", "targets"))
        return ("attention" if part == "attn" else "MLP", *layers, rates)

    return table(("", "sources", "targets", "rates of the sources"), [row("attn"), row("mlp")])


def _scores(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, title in TITLES.items():
        change = "" if name == UNSTEERED else _change(summary["change"][name]["accuracy"])
        scores = (f"{summary[name][score]:.4f}" for score in ("accuracy", "f1", "yes"))
        rows.append((title, *scores, change))
    rows.append(("random recipes", *(_range(summary, score, 4) for score in ("accuracy", "f1", "yes")), ""))
    return table(("", "accuracy", "F1", "says yes", "change of accuracy"), rows)


def _change(change: Mapping[str, Any]) -> str:
    low, high = change["interval_95"]
    return f"{change['difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def _randoms(summary: Mapping[str, Any], score: str) -> list[float]:
    return [scores[score] for name, scores in summary.items() if name.startswith("random")]


def _range(summary: Mapping[str, Any], score: str, digits: int = 3) -> str:
    values = _randoms(summary, score)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _verdict(found: Mapping[str, Any]) -> str:
    """Of each sampling, whether the change is beyond its interval and beyond the random recipes."""
    lines = []
    for sampling in SAMPLINGS:
        summary = found["pope"][sampling]
        change, randoms = summary["change"][CHOSEN]["accuracy"], _randoms(summary, "accuracy")
        low, high = change["interval_95"]
        value = summary[CHOSEN]["accuracy"]
        sure = "more" if low > 0 else "less" if high < 0 else "neither surely more nor surely less"
        beside = "above all" if value > max(randoms) else "below all" if value < min(randoms) else "within the range of"
        lines.append(f"- {sampling}: {sure} accurate than the unsteered model, {beside} {len(randoms)} random recipes.")
    return "At the chosen scale IRI is\n\n" + "\n".join(lines)


def draw_examples(found: Mapping[str, Any], out: Path) -> None:
    from matplotlib import pyplot as plt

    rows = [first(each) for each in changed(found)]
    figure, axes = plt.subplots(2, EACH, figsize=(2.6 * EACH, 6.8), squeeze=False, layout="constrained")
    for line, kind in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (scene, row) in zip(line, kind, strict=False):
            axis.imshow(scenes.draw(TEST, scene["scene"]).picture, interpolation="nearest")
            said = {name: "yes" if name in row["yes"] else "no" for name in (UNSTEERED, CHOSEN)}
            title = f"{row['text'].removesuffix(' in the image?')}?\nunsteered: {said[UNSTEERED]}, IRI: {said[CHOSEN]}"
            axis.set_title(f"{title}\ntruth: {'yes' if row['there'] else 'no'}", fontsize=9)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_map(found: Mapping[str, Any], out: Path) -> None:
    import numpy as np
    from matplotlib import pyplot as plt

    rates = found["traced"]["rates"]
    figure, axes = plt.subplots(1, len(COMPONENTS), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, (component, title) in zip(axes, COMPONENTS.items(), strict=True):
        groups = rates[component]
        shown = axis.imshow(np.array(list(groups.values())), vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.set_yticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    figure.colorbar(shown, ax=axes, label="recovery rate")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def read() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((RESULTS / "iri.json").read_text())
    return found


def main(argv: Sequence[str] | None = None) -> None:
    found = read()
    PAGE.write_text(page(found))
    draw_examples(found, EXAMPLES)
    draw_map(found, MAP)
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
