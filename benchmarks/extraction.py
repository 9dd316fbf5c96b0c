"""How long it takes to make a direction from many pairs on the server, while it goes on answering.

    python -m benchmarks.extraction [--pairs 1000]

Starts SmolLM2-135M-Instruct. A pair is one of the project's French and English answers after one of its questions; a
job takes the difference of means at every layer. Meanwhile one client asks for short answers, one after another, as it
does for some seconds before the job.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import save
from rich.console import Console
from rich.progress import Progress

from steersman.clients.directions import data
from steersman.clients.jobs import follow
from steersman.clients.sdk import Steersman
from steersman.clients.smollm2 import NAME, fetch
from tests.e2e.server import Server, serve

ALONE = 10.0  # seconds that the client asks before the job


class Client(threading.Thread):
    """Asks for one short answer after another; ``seconds`` holds how long each took, by whether the job ran."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.beside = False
        self.ended = False
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def run(self) -> None:
        while not self.ended:
            beside, start = self.beside, time.perf_counter()
            self.server.complete("The capital of France is", max_tokens=8)
            self.seconds[beside].append(time.perf_counter() - start)


def pairs(count: int) -> list[dict[str, str]]:
    known = data("french")["pairs"]
    found = itertools.product(known, known)
    return [
        {"prompt": asked["prompt"], "positive": told["positive"], "negative": told["negative"]}
        for asked, told in itertools.islice(found, count)
    ]


def measure(server: Server, count: int) -> dict[str, Any]:
    client = Client(server)
    client.start()
    time.sleep(ALONE)
    job = {"kind": "extract", "name": "french-benchmark", "pairs": pairs(count)}
    with Steersman(server.url) as steersman, Progress() as bar:
        task = bar.add_task("extracting", total=2 * count)
        client.beside, start = True, time.perf_counter()
        result = follow(steersman, job, lambda told: bar.update(task, completed=told["counts"]["done"]))
        seconds = time.perf_counter() - start
    client.ended = True
    client.join()
    return {
        "pairs": count,
        "layers": len(result["layers"]),
        "seconds": seconds,
        "answer_seconds": {
            "before": statistics.median(client.seconds[False]),
            "beside": statistics.median(client.seconds[True]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, serve(fetch(), Path(scratch), ["--enforce-eager"]) as server:
        found = measure(server, args.pairs)
    path = save("extraction", {"model": NAME, **found})
    Console().print(f"{args.pairs} pairs in {found['seconds']:.0f} s; written to {path}")


if __name__ == "__main__":
    main()
