"""How often the policies in ``models/`` do their task, unsteered, through a server.

    python -m benchmarks.policies [--tasks reach-v3]

Needs the extra ``robots``. It starts a server for each and drives several robots at once through ``/v1/actions``, with
seeds that no demonstration has; a task that is not named keeps the figures that it has. It writes
``benchmarks/results/policies.json``; ``python -m benchmarks.closed_loop_report`` writes the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.closed_loop import DEADLINE, MODEL, connect, served, told
from benchmarks.provenance import RESULTS, provenance

from steersman.clients.simulators.episode import METRICS, Limits
from steersman.clients.simulators.fleet import Fleet, Order
from steersman.clients.simulators.metaworld import TASKS, MetaWorld

STEPS = {"reach-v3": 100, "push-v3": 200, "drawer-open-v3": 200}  # twice what the expert takes, or more
FOUND = [task for task in TASKS if (MODEL.parent / task).exists()]


def measured(task: str, episodes: int, robots: int) -> dict[str, Any]:
    limits = Limits(STEPS[task])
    with served(MODEL.parent / task) as url:
        fleet = Fleet(partial(MetaWorld, task), partial(connect, url), robots, limits, DEADLINE)
        done = fleet.run([Order(task, seed, None) for seed in range(episodes)])
        each = sorted((told(episode) for _, episode in done), key=lambda one: one["seed"])
    training = json.loads((MODEL.parent / task / "training.json").read_text())
    about = {"provenance": provenance(), "steps": limits.steps, "training": training}
    return {**about, "episodes": {metric: [one[metric] for one in each] for metric in METRICS}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda s: s.split(","), default=FOUND)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--robots", type=int, default=8, help="at once [%(default)s]")
    args = parser.parse_args(argv)
    path = RESULTS / "policies.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in args.tasks:
        found[task] = measured(task, args.episodes, args.robots)
        lines = [f" {json.dumps(name)}: {json.dumps(found[name])}" for name in TASKS if name in found]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{task}: {sum(found[task]['episodes']['success']):.0f} of {args.episodes} succeed", flush=True)


if __name__ == "__main__":
    main()
