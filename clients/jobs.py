"""Jobs of a server from its client's side: the files that extraction reads, and waiting for a job's end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from steersman.clients.sdk import Steersman

PromptAs = Literal["chat", "text", "none"]


class JobFailed(Exception):
    """A job that did not end well; the message is the server's."""


def follow(
    server: Steersman,
    job: Mapping[str, Any],
    tell: Callable[[Mapping[str, Any]], None] = lambda job: None,
    every: float = 0.5,
) -> dict[str, Any]:
    """Submits a job and waits: its ``result``. ``tell`` is given the job as it is, every so many seconds.

    Interrupted, it cancels the job. Raises JobFailed, and SteersmanError for what the server refuses.
    """
    found = server.submit(job)
    try:
        while found["state"] in ("queued", "running"):
            tell(found)
            time.sleep(every)
            found = server.job(found["id"])
    except BaseException:
        server.cancel(found["id"])
        raise
    tell(found)
    if found["state"] == "cancelled":
        raise JobFailed(f"{found['id']} was cancelled")
    if found["error"] is not None:
        where = f" ({found['error']['param']})" if found["error"]["param"] else ""
        raise JobFailed(f"{found['error']['message']}{where}")
    result: dict[str, Any] = found["result"]
    return result


def read_pairs(file: Path, prompt_as: PromptAs = "chat") -> list[dict[str, Any]]:
    """Pairs of a job: JSON lines of ``{"positive", "negative"}``, or ``.json`` whose ``pairs`` are such objects.

    Their ``prompt``, where they have one, is taken as a user's message, as text to go on from, or left out.
    """
    out = []
    for given in _values(file, "pairs"):
        if not isinstance(given, dict):
            raise ValueError(f"{file}: a pair must be an object, not {str(given)[:80]}")
        pair = dict(given)
        if prompt_as == "none":
            pair.pop("prompt", None)
        elif prompt_as == "chat" and isinstance(pair.get("prompt"), str):
            pair["prompt"] = [{"role": "user", "content": pair["prompt"]}]
        out.append(pair)
    return out


def read_examples(file: Path, key: str) -> list[Any]:
    """Texts, one to a line; ``.jsonl``: texts or lists of messages; ``.json``: those under ``key``."""
    return _values(file, key)


def _values(file: Path, key: str) -> list[Any]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        try:
            found = json.loads(text)[key]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: wanted: a JSON object with the list {key!r}") from None
        if not isinstance(found, list):
            raise ValueError(f"{file}: {key!r} must be a list")
    elif file.suffix == ".jsonl":
        found = [_parsed(file, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{file} is empty")
    return found


def _parsed(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: not JSON: {error}") from None
