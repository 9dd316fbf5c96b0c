"""Tracing over HTTP: questions of a file, a job for each, and a file of what is finished, from which a run goes on."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steersman.clients.jobs import follow, read_examples
from steersman.clients.sdk import Steersman
from steersman.steering.tracing import COMPONENTS, GROUPS, Ablated, Table, Traced

Question = Mapping[str, Any]
Result = Mapping[str, Any]


def read_questions(file: Path, images: Path | None) -> list[dict[str, Any]]:
    """Questions of a job: JSON lines of its ``questions``, whose ``image`` is the name of a file in ``images``."""
    out = []
    for i, given in enumerate(read_examples(file, "questions")):
        if not isinstance(given, dict):
            raise ValueError(f"{file}: a question must be an object, not {str(given)[:80]}")
        question = dict(given)
        if (name := question.get("image")) is not None:
            if images is None:
                raise ValueError(f"{file}: question {i} has an image; say where with --images")
            question["image"] = base64.b64encode((images / str(name)).read_bytes()).decode()
        out.append(question)
    return out


class Finished:
    """Results in a file of JSON lines, by what was asked. What a run that was cut off had half written is dropped."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, Result] = {}
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole, encoding="utf-8")
        for line in whole.splitlines():
            entry = json.loads(line)
            self._known[entry["key"]] = entry["result"]

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Result | None:
        return self._known.get(key)

    def add(self, key: str, result: Result) -> None:
        self._known[key] = result
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"key": key, "result": result}) + "\n")


def key_of(job: Mapping[str, Any], model: str) -> str:
    """Names what was asked, and of which model."""
    text = json.dumps([job, model], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def jobs_of(settings: Mapping[str, Any], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """A job for each question; one for all of them where means are over all."""
    if settings.get("value") == "mean":
        return [{**settings, "questions": list(questions)}]
    return [{**settings, "questions": [question]} for question in questions]


def run(
    server: Steersman,
    jobs: Sequence[Mapping[str, Any]],
    finished: Finished,
    tell: Callable[[int, Mapping[str, Any]], None] = lambda i, job: None,
    every: float = 0.5,
) -> Iterator[Result]:
    """Each job's result, in order; those that are finished are not asked for again. ``tell``: how the i-th one goes."""
    model = server.model()
    name = f"{model['model']} {model['fingerprint']}"
    for i, job in enumerate(jobs):
        key = key_of(job, name)
        known = finished.get(key)
        if known is None:
            known = follow(server, job, lambda told, i=i: tell(i, told), every)  # type: ignore[misc]
            finished.add(key, known)
        yield known


def traced(results: Sequence[Result]) -> list[Traced]:
    return [Traced(q["clean"], q["corrupted"], q["patched"]) for each in results for q in each["questions"]]


def ablated(results: Sequence[Result]) -> list[Ablated]:
    return [
        Ablated(
            q["clean"],
            q["first"] == q["answer"],
            q["without"],
            [token == q["answer"] for token in q["first_without"]],
            q["set"],
        )
        for each in results
        for q in each["questions"]
    ]


def to_csv(table: Table) -> str:
    """A line for each component, group and layer: its mean recovery rate, and of how many questions."""
    lines = ["component,group,layer,recovery_rate,questions"]
    for component in COMPONENTS:
        for group in GROUPS:
            for layer, rate in enumerate(table.rates.get(component, {}).get(group, ())):
                if rate == rate:
                    lines.append(f"{component},{group},{layer},{rate:.6g},{table.counts[component][group]}")
    return "\n".join(lines) + "\n"


def to_json(table: Table) -> dict[str, Any]:
    rates = {
        c: {g: [None if v != v else float(v) for v in row] for g, row in by.items()} for c, by in table.rates.items()
    }
    return {"questions": table.questions, "used": table.used, "recovery_rates": rates, "counts": table.counts}
