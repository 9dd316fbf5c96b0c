"""``make demo``: steer a small real model over HTTP, and measure that it worked.

Fetches SmolLM2-135M-Instruct, builds two directions from contrast texts (English → French, neutral → joyful) as the
difference of their means, starts ``steersman serve``, and sends every question in one concurrent batch:
unsteered, steered at growing scales, and with random directions of the same norm. Prints the answers' measured
scores and some answers; the exit code is 0 only if every steered score rises with the scale and no random one follows.
The settings were chosen on these very questions, so this demonstrates an effect; it does not estimate one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from steersman.clients.directions import DIRECTIONS, Direction, asset, build, data, texts
from steersman.clients.sdk import Steersman
from steersman.clients.smollm2 import NAME, fetch

QUESTIONS = 12
TOKENS = 40
SEEDS = (0, 1)  # of the random directions
STILL = 0.2  # a random direction may move a score by this share of the direction's own effect
console = Console()


Key = tuple[str, str, float]  # (demonstration, asset, scale)


def main() -> int:
    start = time.monotonic()
    folder = fetch()
    questions = data("prompts")["prompts"][:QUESTIONS]
    with (
        tempfile.TemporaryDirectory(prefix="steersman-demo-") as scratch,
        _progress() as progress,
        _server(folder, Path(scratch)) as url,
    ):
        vectors = _build(folder, progress)
        _wait(url, Path(scratch), progress)
        with Steersman(url) as server:
            for name, vector in vectors.items():
                layer = DIRECTIONS[name.partition("-")[0]].layer
                server.add(asset(name, vector, layer, server.model()["n_layers"]))
        answers = asyncio.run(_ask(url, questions, progress))
    shown = [_show(direction, questions, answers) for direction in DIRECTIONS.values()]
    console.print(f"Took {time.monotonic() - start:.0f} s.")
    return 0 if all(shown) else 1


def _build(folder: Path, progress: Progress) -> dict[str, Tensor]:
    """Every direction and its random twins, [d] each, by asset name."""
    from transformers.utils import logging

    torch.set_num_threads(1)  # the server is starting on the other cores
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = progress.add_task("building directions", total=sum(map(texts, DIRECTIONS)))
    out = build(folder, DIRECTIONS, lambda: progress.advance(task))
    for name in DIRECTIONS:
        for seed in SEEDS:
            r = torch.randn(out[name].shape, generator=torch.Generator().manual_seed(seed))
            out[_twin(name, seed)] = r * (out[name].norm() / r.norm())
    return out


async def _ask(url: str, questions: Sequence[str], progress: Progress) -> dict[Key, list[str]]:
    """All answers, from one batch of concurrent requests: unsteered ones under the key ("", "", 0)."""
    jobs: dict[Key, dict[str, Any] | None] = {("", "", 0.0): None}
    for d in DIRECTIONS.values():
        for name in (d.name, *(_twin(d.name, seed) for seed in SEEDS)):
            for scale in d.scales:
                edit = {"op": "add", "vector": name, "scale": scale, "layers": d.layer}
                jobs[d.name, name, scale] = {"steering": {"interventions": [edit]}}
    task = progress.add_task("asking", total=len(jobs) * len(questions))
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def ask(question: str, steering: dict[str, Any] | None) -> str:
            answer = await client.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": question}],
                max_tokens=TOKENS,
                temperature=0,
                extra_body={"repetition_penalty": 1.15, **(steering or {})},
            )
            progress.advance(task)
            if steering is not None:
                report: Any = (answer.model_extra or {})["steering"]
                assert report["interventions"][0]["tokens"] > 0, "a steered answer without an edited token"
            return answer.choices[0].message.content or ""

        texts = await asyncio.gather(*(ask(q, steering) for steering in jobs.values() for q in questions))
    size = len(questions)
    return {key: texts[i * size : (i + 1) * size] for i, key in enumerate(jobs)}


def _show(d: Direction, questions: Sequence[str], answers: dict[Key, list[str]]) -> bool:
    """Prints one demonstration; whether its scores rise with the scale and the random ones stay."""
    mean = {key: sum(map(d.score, texts)) / len(texts) for key, texts in answers.items()}
    plain = mean["", "", 0.0]
    steered = [plain, *(mean[d.name, d.name, s] for s in d.scales)]
    random = [[mean[d.name, _twin(d.name, seed), s] for seed in SEEDS] for s in d.scales]
    rises = all(b > a for a, b in pairwise(steered))
    still = max(abs(r - plain) for each in random for r in each) < STILL * (steered[-1] - plain)
    table = Table("scale", d.name, f"{len(SEEDS)} random directions", title=f"{d.name}: {d.unit}, layer {d.layer}")
    for scale, value, control in zip((0.0, *d.scales), steered, ([plain], *random), strict=True):
        table.add_row(f"{scale:g}", f"{value:.3f}", ", ".join(f"{c:.3f}" for c in control))
    console.print(table)
    shown = zip(questions, answers["", "", 0.0], answers[d.name, d.name, d.recommended], strict=True)
    for question, before, after in list(shown)[:2]:
        console.print(f"[bold]{question}[/bold]", highlight=False)
        console.print(f"  unsteered        {_line(before)}", markup=False, highlight=False)
        console.print(f"  {d.name} at {d.recommended:<6g} {_line(after)}", markup=False, highlight=False)
    verdict = "rises with the scale" if rises else "does NOT rise with the scale"
    controls = "random directions do not move it" if still else "random directions MOVE it"
    console.print(f"The score {verdict}; {controls}.\n", style="green" if rises and still else "red")
    return rises and still


def _line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 110 else flat[:107] + "..."


def _twin(name: str, seed: int) -> str:
    return f"{name}-random-{seed}"


# -- the server ---------------------------------------------------------------------------------------


@contextmanager
def _server(model: Path, scratch: Path) -> Iterator[str]:
    """A server of the demo's own, on a free port; its address. Nothing of it is left behind."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "steersman.server.cli", "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", NAME, "--max-model-len", "1024", "--max-num-seqs", "256"]
    command += ["--steering-store", str(scratch / "store")]
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (scratch / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with suppress(ProcessLookupError):  # the engine runs in processes of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(15)


def _wait(url: str, scratch: Path, progress: Progress, seconds: float = 300) -> None:
    task = progress.add_task("starting the server", total=None)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                progress.update(task, total=1, completed=1)
                return
        time.sleep(0.3)
    log = (scratch / "server.log").read_text(errors="replace")
    raise SystemExit(f"the server did not start:\n{log[-4000:]}")


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    )


if __name__ == "__main__":
    sys.exit(main())
