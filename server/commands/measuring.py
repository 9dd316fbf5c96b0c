"""What ``steersman calibrate`` and ``steersman select`` have in common: measure on a server, show, draw, store."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from steersman.clients.calibration_rules import CalibrationError
from steersman.clients.pictures import PlotsMissing
from steersman.clients.sdk import SteersmanError, keys

Spec = TypeVar("Spec")
Found = TypeVar("Found")


class Bar:
    """A measurement's progress, in the terminal."""

    def __init__(self, shown: Progress) -> None:
        self._bar = shown
        self._task = shown.add_task("measuring", total=None)

    def expect(self, total: int, unit: str) -> None:
        self._bar.update(self._task, total=total, description=unit)

    def advance(self, count: int = 1) -> None:
        self._bar.advance(self._task, count)


@dataclass(frozen=True)
class Measurement(Generic[Spec, Found]):
    """``Found`` has ``best``, ``refusal`` and ``to_json()``."""

    command: str
    chosen: str  # what becomes of the best
    spec: Callable[[argparse.Namespace], Spec]  # raises ValueError and CalibrationError
    measure: Callable[[httpx.AsyncClient, Spec, Bar], Awaitable[Found]]
    save: Callable[[httpx.AsyncClient, Found], Awaitable[str]]
    show: Callable[[Found], None]
    png: Callable[[Found], bytes]
    html: Callable[[Found], str]

    def configure(self, parser: argparse.ArgumentParser, page: str) -> None:
        """``page``: what is on it."""
        parser.add_argument("--no-store", action="store_true", help="store no new version")
        parser.add_argument("--out", type=Path, metavar="FILE.json", help="everything measured")
        parser.add_argument("--png", type=Path, help="picture (needs the extra 'plots')")
        parser.add_argument("--html", type=Path, help=f"page with {page} (needs the extra 'plots')")

    def run(self, args: argparse.Namespace) -> int:
        """0 where there is a best, 1 where there is none."""
        try:
            found, ref = asyncio.run(self._run(args, self.spec(args)))
        except (CalibrationError, SteersmanError, httpx.HTTPError, ValueError) as error:
            raise SystemExit(f"steersman {self.command}: {error}") from None
        told: Any = found
        if args.out is not None:
            args.out.write_text(json.dumps(told.to_json(), indent=1) + "\n", encoding="utf-8")
        self.show(found)
        try:
            if args.png is not None:
                args.png.write_bytes(self.png(found))
            if args.html is not None:
                args.html.write_text(self.html(found), encoding="utf-8")
        except PlotsMissing as error:
            raise SystemExit(f"steersman {self.command}: {error}") from None
        if told.best is None:
            Console(stderr=True).print(f"Nothing is {self.chosen}: {told.refusal}.")
            return 1
        if ref is not None:
            print(ref)
        return 0

    async def _run(self, args: argparse.Namespace, spec: Spec) -> tuple[Found, str | None]:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        headers = keys(args.api_key, args.admin_key)
        async with httpx.AsyncClient(base_url=args.server, headers=headers, timeout=600) as http:
            with Progress(*columns, console=Console(stderr=True)) as shown:
                found = await self.measure(http, spec, Bar(shown))
            told: Any = found
            stored = None if args.no_store or told.best is None else await self.save(http, found)
        return found, stored
