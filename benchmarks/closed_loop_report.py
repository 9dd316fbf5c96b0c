"""Writes what came of the closed loop into ``docs/closed-loop.md``, and its plot, from the result files.

    python -m benchmarks.closed_loop_report [--films FOLDER]

No number is there that ``benchmarks/results/closed_loop.json`` and ``policies.json`` do not hold. ``--films``: where
``benchmarks.closed_loop`` has kept its episodes; of those that were filmed it makes the moving picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.closed_loop import DOSED, FILM, FILMED, RANDOM, SETS, UNSTEERED
from benchmarks.provenance import RESULTS
from benchmarks.report import table
from numpy.typing import NDArray

from steersman.clients.simulators.episode import METRICS
from steersman.clients.simulators.study import interval

PAGE = Path(__file__).parents[1] / "docs" / "closed-loop.md"
IMAGES = PAGE.parent / "images"
BEGIN, END = "<!-- from benchmarks/results/{}.json -->\n", "<!-- end of {} -->\n"
MEANT = {"up": ("mean_height", 1), "down": ("mean_height", -1), "fast": ("early_speed", 1), "slow": ("early_speed", -1)}
TOKENS = {"up": "z", "down": "z", "fast": "motion", "slow": "motion"}  # those of the random sets beside each
HELD = 0.8  # success at which a policy is still said to work
COLOURS = {UNSTEERED: "#555555", "up": "#d1495b", "down": "#00798c", "fast": "#edae49", "slow": "#6a4c93"}
EVERY, WIDTH = 2, 200  # of the film: frames left out between two, pixels


def page(text: str, found: Mapping[str, Any], policies: Mapping[str, Any]) -> str:
    """``text`` with new figures between the marks of each result file."""
    for name, figures in (("closed_loop", measured(found)), ("policies", trained(policies))):
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        text = before + begin + figures + end + rest.partition(end)[2]
    return text


def trained(policies: Mapping[str, Any]) -> str:
    rows = []
    for task, about in policies.items():
        each, training = about["episodes"], about["training"]
        done = f"{sum(each['success']):.0f} of {len(each['success'])}"
        made = [
            training["samples"],
            training["steps"],
            training.get("start") or "",
            f"{training['held_out_error']:.3f}",
        ]
        rows.append([task, *made, done, about["steps"], f"{np.mean(each['final_distance']):.3f}"])
    heads = ("task", "demonstrations", "steps", "begun from", "error on others, of the range")
    return "\n" + table((*heads, "episodes that succeed", "actions in one", "final distance (m), mean"), rows) + "\n"


def measured(found: Mapping[str, Any]) -> str:
    settings, about = found["settings"], found["provenance"]
    counts = [arm["counts"] for arm in found["arms"].values()]
    late, strays = (sum(one[name] for one in counts) for name in ("late", "strays"))
    return (
        f"\n`python -m benchmarks.closed_loop` on {about['cores']} cores of {about['cpu']}: {len(counts)} arms of "
        f"{settings['episodes']} episodes, with the same seeds (0 to {settings['episodes'] - 1}, of which no "
        f"demonstration is), {settings['steps']} actions ({settings['seconds']:.2f} s of the robot's time) an episode, "
        f"{settings['robots']} robots at once. Of {sum(one['answers'] for one in counts)} answers {late} were late; "
        f"{strays} tokens stood for no action.\n\n"
        f"Set to {settings['value']:g}, against the same seeds unsteered (mean over pairs, 95 % by bootstrap):\n\n"
        f"{_changes(found)}\n"
        f"Against six random sets, set to {settings['value']:g} at the same tokens. Each of these has a mean change; a "
        "set is beyond them where its own is more, in the direction meant, than any of theirs. Less the six's mean "
        "on the same seed, with 95 %:\n\n"
        f"{_controls(found)}\n{_said(found)}\n"
        f"By value:\n\n{_doses(found)}\n{_breaking(found)}\n"
    )


def values(found: Mapping[str, Any], arm: str, metric: str) -> NDArray[np.float64]:
    """[episodes]"""
    return np.array(found["arms"][arm]["episodes"][metric], np.float64)


def change(found: Mapping[str, Any], arm: str, metric: str) -> NDArray[np.float64]:
    """[episodes], against the same seed unsteered."""
    return values(found, arm, metric) - values(found, UNSTEERED, metric)


def _main(found: Mapping[str, Any], name: str) -> str:
    return f"{name} {found['settings']['value']:g}"


def _random(found: Mapping[str, Any], name: str, metric: str) -> NDArray[np.float64]:
    """[random sets, episodes]: changes by the sets that are set at the tokens of ``name``."""
    arms = (f"random {i} {TOKENS[name]} {found['settings']['value']:g}" for i in range(RANDOM))
    return np.stack([change(found, arm, metric) for arm in arms])


def _changes(found: Mapping[str, Any]) -> str:
    heads = ("", UNSTEERED, *SETS)
    rows = []
    for metric, unit in METRICS.items():
        cells = [_with_interval(change(found, _main(found, name), metric)) for name in SETS]
        name = f"{metric.replace('_', ' ')}{unit}"
        rows.append([name, f"{values(found, UNSTEERED, metric).mean():.3f}", *cells])
    return table(heads, rows)


def _controls(found: Mapping[str, Any]) -> str:
    rows = []
    for name in SETS:
        metric = MEANT[name][0]
        for shown in (metric, "success"):
            own = change(found, _main(found, name), shown)
            random = _random(found, name, shown)
            means = random.mean(axis=1)
            beyond = ("yes" if _beyond(found, name) else "no") if shown == metric else ""
            theirs = f"{means.mean():+.3f} ({means.min():+.3f} to {means.max():+.3f})"
            cells = [f"{own.mean():+.3f}", theirs, _with_interval(own - random.mean(axis=0)), beyond]
            rows.append([name, shown.replace("_", " ") + METRICS[shown], *cells])
    heads = ("set", "change of", "by the set", "by random sets: mean, range", "set less random", "beyond, as meant")
    return table(heads, rows)


def _beyond(found: Mapping[str, Any], name: str) -> bool:
    metric, sign = MEANT[name]
    own = sign * change(found, _main(found, name), metric).mean()
    return bool(own > (sign * _random(found, name, metric).mean(axis=1)).max())


def _said(found: Mapping[str, Any]) -> str:
    """What the tables come to."""
    turned = [name for name in SETS if _as_meant(found, name)]
    beyond = [name for name in SETS if _beyond(found, name)]
    rates = {each: values(found, each, "success").mean() for each in (UNSTEERED, *(_main(found, n) for n in SETS))}
    random = [arm for arm in found["arms"] if arm.split()[0] == "random"]
    worst, mean = (f([values(found, arm, "success").mean() for arm in random]) for f in (min, np.mean))
    success = ", ".join(f"{arm} {rate:.0%}" for arm, rate in rates.items())
    return (
        f"Moved as meant, with an interval that excludes 0: {', '.join(turned) or 'none'}. Beyond all six random sets: "
        f"{', '.join(beyond) or 'none'}. Episodes that succeed: {success}; with random sets, which cost successes too, "
        f"{mean:.0%} on average and {worst:.0%} with the worst.\n"
    )


def _as_meant(found: Mapping[str, Any], name: str) -> bool:
    metric, sign = MEANT[name]
    return interval(sign * change(found, _main(found, name), metric))[0] > 0


def doses(found: Mapping[str, Any], name: str) -> list[float]:
    return sorted(float(arm.split()[1]) for arm in found["arms"] if arm.split()[0] == name)


def _doses(found: Mapping[str, Any]) -> str:
    metrics = ("success", "mean_height", "early_speed", "speed", "final_distance")
    rows = [[UNSTEERED, "", *(f"{values(found, UNSTEERED, metric).mean():.3f}" for metric in metrics)]]
    for name in DOSED:
        for value in doses(found, name):
            cells = [f"{values(found, f'{name} {value:g}', metric).mean():.3f}" for metric in metrics]
            rows.append([name, f"{value:g}", *cells])
    return table(("set", "value", *(m.replace("_", " ") + METRICS[m] for m in metrics)), rows)


def _breaking(found: Mapping[str, Any]) -> str:
    said = []
    for name in DOSED:
        tried = doses(found, name)
        rates = [values(found, f"{name} {value:g}", "success").mean() for value in tried]
        broken = [value for value, success in zip(tried, rates, strict=True) if success < HELD]
        said.append(f"{name}: {f'from {broken[0]:g}' if broken else 'at none of these'}")
    return f"Values at which fewer than {HELD:.0%} of episodes succeed: {'; '.join(said)}.\n"


def _with_interval(differences: NDArray[np.float64]) -> str:
    low, high = interval(differences)
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def plot(found: Mapping[str, Any], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    (heights, beside), (dose, success) = figure.subplots(2, 2)
    seconds = found["settings"]["seconds"]
    drawn = {UNSTEERED, _main(found, "up"), _main(found, "down")}
    for arm, about in found["arms"].items():
        kind = arm.split()[0]
        if arm in drawn or (kind == "random" and arm.split()[2] == TOKENS["up"]):
            style = {"color": "#bbbbbb", "linewidth": 0.8} if kind == "random" else {"color": COLOURS[kind]}
            label = None if kind == "random" else arm
            heights.plot(np.linspace(0, seconds, len(about["heights"])), about["heights"], label=label, **style)
    heights.set(xlabel="time (s)", ylabel="height of the tool (m), mean", title="grey: six random sets")
    heights.legend()
    for at, name in enumerate(SETS):
        metric = MEANT[name][0]
        scale = values(found, UNSTEERED, metric).mean()
        own = change(found, _main(found, name), metric)
        low, high = interval(own)
        random = _random(found, name, metric).mean(axis=1) / scale
        beside.plot([at + 0.15] * len(random), 100 * random, "o", color="#bbbbbb")
        error = 100 * np.array([[own.mean() - low], [high - own.mean()]]) / scale
        beside.errorbar([at - 0.15], [100 * own.mean() / scale], error, fmt="o", color=COLOURS[name], capsize=4)
    beside.axhline(0, color="#555555", linewidth=0.6)
    beside.set_xticks(range(len(SETS)), [f"{n}: {MEANT[n][0].replace('_', ' ')}" for n in SETS], fontsize=8)
    beside.set(ylabel="change, % of unsteered", title="sets with 95 %, and random ones beside them")
    for name in DOSED:
        metric, tried = MEANT[name][0], doses(found, name)
        arms = [UNSTEERED, *(f"{name} {value:g}" for value in tried)]
        scale = values(found, UNSTEERED, metric).mean()
        shares = [100 * change(found, arm, metric).mean() / scale for arm in arms]
        dose.plot([0, *tried], shares, "o-", color=COLOURS[name], label=f"{name}: {metric.replace('_', ' ')}")
        rates = [100 * values(found, arm, "success").mean() for arm in arms]
        success.plot([0, *tried], rates, "o-", color=COLOURS[name], label=name)
    dose.set(xlabel="value (0: unsteered)", ylabel="change, % of unsteered")
    success.set(xlabel="value (0: unsteered)", ylabel="episodes that succeed (%)", ylim=(-3, 103))
    for axes in (dose, success):
        axes.legend()
    figure.savefig(out, dpi=100)


def film(folder: Path, out: Path) -> None:
    from PIL import Image

    each = []
    for arm in FILMED:
        with np.load(folder / FILM.format(arm)) as kept:
            each.append(kept["arr_0"][::EVERY])
    frames = [Image.fromarray(np.concatenate(row, axis=1)) for row in zip(*each, strict=True)]
    small = [frame.resize((WIDTH * len(FILMED), WIDTH)).quantize(128) for frame in frames]
    small[0].save(out, save_all=True, append_images=small[1:], duration=50 * EVERY, loop=0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=Path)
    args = parser.parse_args(argv)
    found = json.loads((RESULTS / "closed_loop.json").read_text())
    policies = json.loads((RESULTS / "policies.json").read_text())
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found, policies), encoding="utf-8")
    plot(found, IMAGES / "closed-loop.png")
    if args.films:
        film(args.films, IMAGES / "closed-loop.gif")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
