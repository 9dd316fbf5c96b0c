"""The closed loop: a trained policy on a simulated arm, steered by sets of neurons and by random ones.

    python -m benchmarks.closed_loop [--minutes 8]

Needs the extra ``robots``. It starts a server and drives several robots at once through ``/v1/actions``. An arm is a
set of neurons at one value; every arm has the same seeds. Each episode is kept as it ends (``--work``), and the same
command goes on after a stop or after ``--minutes``; when all are there it writes
``benchmarks/results/closed_loop.json``, and ``python -m benchmarks.closed_loop_report`` the page and its pictures.

The sets are those of ``models/reach-v3/steering_*.json`` (``clients/policies/contrast.py``). Six random sets, of as
many neurons of the same layers and none of any set, are set to ``MAIN`` at the tokens of ``up`` and at those of
``fast``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.provenance import RESULTS, provenance

from steersman.clients.simulators.episode import METRICS, Episode, Limits
from steersman.clients.simulators.fleet import Fleet, Order
from steersman.clients.simulators.metaworld import MetaWorld
from steersman.clients.simulators.study import Steering
from steersman.clients.simulators.watchdog import Link, link
from steersman.steering.neurons_contrast import control_sets
from tests.e2e.server import serve
from tests.models.tiny_llava import without_torchvision

MODEL = Path(__file__).parents[1] / "models" / "reach-v3"
UNSTEERED = "unsteered"
SETS = ("up", "down", "fast", "slow")
MAIN, DOSES = 4.0, (1.0, 2.0, 3.0, 4.0, 6.0)
DOSED = ("up", "slow", "fast")
CONTROLLED = {"z": "up", "motion": "fast"}  # the tokens at which random sets are set, and a set that is set there too
RANDOM = 6
FILMED = (UNSTEERED, "up 4", "slow 4")
FILM = "{}.npz"
OPTIONS = ("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "16")
VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # the robots need the other cores
DEADLINE = 60.0  # seconds: none should pass, since what is measured is not how fast this machine is
COUNTS = ("answers", "late", "strays", "edited")


def arms(sets: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Steering | None]:
    """By name, the most wanted first. ``sets``: steering objects of one intervention; ``config``: of the Llama."""
    out: dict[str, Steering | None] = {UNSTEERED: None}
    out |= {f"{name} {MAIN:g}": dosed(sets[name], MAIN) for name in SETS}
    found = [tuple(pair) for asked in sets.values() for pair in neurons(asked)]
    widths = dict.fromkeys(range(config["num_hidden_layers"]), config["intermediate_size"])
    random = control_sets([tuple(pair) for pair in neurons(sets["up"])], widths, RANDOM, besides=found)
    for tokens, like in CONTROLLED.items():
        for i, drawn in enumerate(random):
            out[f"random {i} {tokens} {MAIN:g}"] = dosed(sets[like], MAIN, [list(pair) for pair in drawn])
    for name in DOSED:
        out |= {f"{name} {value:g}": dosed(sets[name], value) for value in DOSES if value != MAIN}
    return out


def neurons(asked: Mapping[str, Any]) -> list[list[int]]:
    (edit,) = asked["interventions"]
    found: list[list[int]] = edit["neurons"]["inline"]
    return found


def dosed(asked: Mapping[str, Any], value: float, others: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """The same with another value, and perhaps with ``others`` for its neurons."""
    (edit,) = asked["interventions"]
    inline = neurons(asked) if others is None else others
    return {"interventions": [{**edit, "neurons": {"inline": inline}, "value": value}]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20, help="of each arm [%(default)s]")
    parser.add_argument("--steps", type=int, default=80, help="actions in an episode [%(default)s]")
    parser.add_argument("--robots", type=int, default=8, help="at once [%(default)s]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no episode after so long")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/steersman/closed_loop")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    sets = {name: json.loads((MODEL / f"steering_{name}.json").read_text()) for name in SETS}
    asked = arms(sets, json.loads((MODEL / "config.json").read_text())["text_config"])
    kept = Kept(args.work / "episodes.jsonl", {"steps": args.steps, "arms": asked})
    missing = [
        Order(arm, seed, steering, film=seed == 0 and arm in FILMED)
        for arm, steering in asked.items()
        for seed in range(args.episodes)
        if (arm, seed) not in kept.found
    ]
    if missing:
        with served() as url:
            made = (partial(MetaWorld, "reach-v3"), partial(connect, url))
            fleet = Fleet(*made, args.robots, Limits(args.steps), DEADLINE)
            for order, episode in fleet.run(missing, 60 * args.minutes):
                if order.film:
                    np.savez_compressed(args.work / FILM.format(order.arm), np.stack(episode.frames))
                kept.add(order.arm, episode)
                done = "no success" if episode.succeeded_at is None else f"success at step {episode.succeeded_at}"
                print(f"{order.arm}, seed {order.seed}: {done}", flush=True)
    left = len(asked) * args.episodes - len(kept.found)
    if left > 0:
        raise SystemExit(f"{left} episodes are left: run it again")
    settings = {"task": "reach-v3", "episodes": args.episodes, "steps": args.steps, "robots": args.robots}
    path = write(result(settings, asked, kept.found))
    print(f"written to {path}: now python -m benchmarks.closed_loop_report --films {args.work}")


class Kept:
    """Episodes on disk, one a line after a first line that says what they are of. Raises SystemExit for another's."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.found = path, dict[tuple[str, int], dict[str, Any]]()
        head = json.dumps(about)
        if not path.exists():
            path.write_text(head + "\n")
        first, *lines = path.read_text().splitlines()
        if first != head:
            raise SystemExit(f"{path} is of other arms: remove it, or name another folder with --work")
        for line in lines:
            one = json.loads(line)
            self.found[one["arm"], one["seed"]] = one

    def add(self, arm: str, episode: Episode) -> None:
        one = {"arm": arm, **told(episode)}
        with self.path.open("a") as out:
            out.write(json.dumps(one) + "\n")
        self.found[arm, episode.seed] = one


def told(episode: Episode) -> dict[str, Any]:
    """What is kept of one: metrics, counts, and the height (m) at every fourth step."""
    about = {name: round(value, 5) for name, value in episode.metrics().items()}
    counts = {name: getattr(episode, name) for name in COUNTS}
    heights = [round(float(z), 4) for z in episode.positions[::4, 2]]
    return {"seed": episode.seed, **about, **counts, "step_seconds": episode.seconds, "heights": heights}


def result(
    settings: Mapping[str, Any], asked: Mapping[str, Steering | None], found: Mapping[tuple[str, int], Any]
) -> dict[str, Any]:
    """By arm: its steering, of each episode its metrics in the order of the seeds, and the mean height over time."""
    out = {}
    for arm, steering in asked.items():
        each = [found[arm, seed] for seed in range(settings["episodes"])]
        out[arm] = {
            "steering": steering,
            "episodes": {metric: [one[metric] for one in each] for metric in METRICS},
            "counts": {name: sum(one[name] for one in each) for name in COUNTS},
            "heights": np.mean([one["heights"] for one in each], axis=0).round(4).tolist(),
        }
    seconds = found[UNSTEERED, 0]["step_seconds"]
    return {"provenance": provenance(), "settings": {**settings, "seconds": seconds, "value": MAIN}, "arms": out}


def write(found: Mapping[str, Any], path: Path = RESULTS / "closed_loop.json") -> Path:
    """One line for each arm."""
    lines = [f"  {json.dumps(arm)}: {json.dumps(about)}" for arm, about in found["arms"].items()]
    head = [f" {json.dumps(key)}: {json.dumps(found[key])}" for key in ("provenance", "settings")]
    path.write_text("{\n" + ",\n".join([*head, ' "arms": {\n' + ",\n".join(lines) + "\n }"]) + "\n}\n")
    return path


def connect(url: str, steering: Steering | None) -> Link:
    return link(url, steering=steering, api_key=None, timeout=DEADLINE)


@contextmanager
def served(model: Path = MODEL) -> Iterator[str]:
    """The address of a server that has the policy."""
    with tempfile.TemporaryDirectory() as scratch:
        variables = VARIABLES | without_torchvision(Path(scratch) / "site")
        with serve(model, Path(scratch), OPTIONS, variables) as server:
            yield server.url


if __name__ == "__main__":
    main()
