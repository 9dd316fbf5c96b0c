"""Chat in the terminal: every question answered without steering and with it, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from steersman.clients.sdk import Steersman, SteersmanError
from steersman.server.commands import remote


def configure(parser: argparse.ArgumentParser) -> None:
    remote.configure(parser)
    parser.add_argument("question", nargs="?", help="ask this and stop; without it, questions are read until the end")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    console = Console()
    wanted = remote.steering(args)
    try:
        with remote.client(args) as server:
            model = server.served_model()
            for question in _questions(args, console):
                _answer(server, model, question, wanted, args, console)
    except (SteersmanError, httpx.HTTPError) as error:
        raise SystemExit(f"steersman chat: {error}") from None
    return 0


def _questions(args: argparse.Namespace, console: Console) -> Any:
    if args.question:
        yield args.question
        return
    while True:
        try:
            question = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if question:
            yield question


def _answer(
    server: Steersman, model: str, question: str, wanted: dict[str, Any], args: argparse.Namespace, console: Console
) -> None:
    def ask(steering: dict[str, Any] | None) -> Any:
        return server.chat(
            [{"role": "user", "content": question}],
            steering,
            model=model,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
        )

    with ThreadPoolExecutor(2) as pool, console.status("asking"):  # both go into one batch
        plain, steered = pool.map(ask, [None, wanted])
    width = max(30, console.width // 2 - 2)
    panels = [
        Panel(escape(answer["choices"][0]["message"]["content"] or ""), title=title, width=width)
        for answer, title in ((plain, "unsteered"), (steered, "steered"))
    ]
    console.print(Columns(panels))
    for done in steered["steering"].get("interventions", ()):
        size = done["mean_relative_norm"]
        console.print(
            f"[dim]{done['op']} {', '.join(done['assets'])}: {done['tokens']} tokens edited"
            + (f", {size:.1%} of the stream's norm" if size is not None else "")
            + "[/dim]"
        )
