"""Find which layers carry an answer: recovery rates of a vision-language or text model, and single parts taken out.

Asks a running server the questions of a file, clean, corrupted and with one component of one layer put back, and writes
tables, heat maps and an IRI recipe into a folder. What is finished stays there: the same command goes on from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from steersman.clients.jobs import JobFailed
from steersman.clients.pictures import PlotsMissing
from steersman.clients.sdk import Steersman, SteersmanError
from steersman.clients.tracing import (
    Finished,
    Result,
    ablated,
    jobs_of,
    read_questions,
    to_csv,
    to_json,
    traced,
)
from steersman.clients.tracing import run as run_jobs
from steersman.clients.tracing_picture import ablation_png, page, recovery_png
from steersman.server.commands import remote
from steersman.server.commands.extract import layers
from steersman.steering.recipes import SOURCES, TARGETS
from steersman.steering.tracing import COMPONENTS, GROUPS, LEAST, Falls, Table, recipe

KINDS = ("patch", "layers", "heads", "neurons")


def configure(parser: argparse.ArgumentParser) -> None:
    remote.connection(parser)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help=".jsonl, a question to a line")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the questions' images are")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="what is written, and what it goes on from"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="patch",
        help="patch: recovery rates; or take out attention and MLPs of layers, heads, or neurons [%(default)s]",
    )
    parser.add_argument("--layers", default="all", help="all, 4, 4,8,12 or 4-12 [%(default)s]")
    patch = parser.add_argument_group("recovery rates")
    patch.add_argument("--components", nargs="+", choices=COMPONENTS, help="[all]")
    patch.add_argument("--groups", nargs="+", choices=GROUPS, help="[all]")
    patch.add_argument("--window", type=int, default=1, help="layers put back together [%(default)s]")
    patch.add_argument(
        "--sigma",
        type=float,
        help="of the noise: of pixels, 0 to 255 [100], or in standard deviations of embeddings [3]",
    )
    patch.add_argument("--seed", type=int, default=0, help="of the noise [%(default)s]")
    patch.add_argument(
        "--least", type=float, default=LEAST, help="leave out questions that the noise costs less [%(default)s]"
    )
    made = parser.add_argument_group("the recipe that is made of them")
    made.add_argument("--recipe", default="iri", metavar="NAME", help="[%(default)s]")
    made.add_argument("--lambda-a", type=float, default=0.26, help="strength of attention [%(default)s, LLaVA-1.5's]")
    made.add_argument("--lambda-m", type=float, default=0.16, help="of the MLP [%(default)s]")
    made.add_argument("--sources", type=int, default=SOURCES, metavar="K1", help="[%(default)s]")
    made.add_argument("--targets", type=int, default=TARGETS, metavar="K2", help="[%(default)s]")
    made.add_argument("--store", action="store_true", help="add it to the server's store")
    taken = parser.add_argument_group("what is taken out")
    taken.add_argument(
        "--value", choices=("zero", "mean"), default="zero", help="what stands in its place [%(default)s]"
    )
    taken.add_argument(
        "--neurons", type=Path, metavar="FILE", help="JSON: [[layer, index], ..], or an object with neurons"
    )


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        if args.store and args.kind != "patch":
            raise ValueError("--store goes with --kind patch, of which a recipe is made")
        settings = _settings(args)
        questions = read_questions(args.questions, args.images)
        args.out.mkdir(parents=True, exist_ok=True)
        with remote.client(args) as server:
            results = _results(server, jobs_of(settings, questions), Finished(args.out / "finished.jsonl"))
            name = str(server.model()["model"]).rstrip("/").rsplit("/", 1)[-1]  # a server may be started with a folder
            title = f"{args.questions.name} on {name}"
            if args.kind == "patch":
                _write_trace(args, server, results, title, settings)
            else:
                _write_ablation(args.out, results, title, settings)
    except (SteersmanError, JobFailed, PlotsMissing, httpx.HTTPError, ValueError) as error:
        raise SystemExit(f"steersman trace: {error}") from None
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The job without its questions."""
    if (args.kind == "neurons") != (args.neurons is not None):
        raise ValueError("--kind neurons and --neurons go together")
    if args.neurons is not None:
        return {"kind": "ablate", "units": "neurons", "value": args.value, "neurons": _neurons(args.neurons)}
    if args.kind != "patch":
        return {"kind": "ablate", "units": args.kind, "value": args.value, "layers": layers(args.layers)}
    asked = {"kind": "trace", "layers": layers(args.layers), "window": args.window, "seed": args.seed}
    given = {name: value for name in ("components", "groups", "sigma") if (value := getattr(args, name)) is not None}
    return {**asked, **given}


def _neurons(file: Path) -> list[list[int]]:
    found = json.loads(file.read_text(encoding="utf-8"))
    pairs: list[list[int]] = found["neurons"] if isinstance(found, dict) else found
    return pairs


def _results(server: Steersman, jobs: Sequence[Mapping[str, Any]], finished: Finished) -> list[Result]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        every = bar.add_task("jobs", total=len(jobs))
        now = bar.add_task("runs", total=None)

        def tell(i: int, job: Mapping[str, Any]) -> None:
            counts = job["counts"]
            bar.update(now, completed=counts["done"], total=counts["total"] or None)
            bar.update(every, completed=i)

        found = []
        for result in run_jobs(server, jobs, finished, tell):
            found.append(result)
            bar.update(every, completed=len(found))
    return found


def _write_trace(
    args: argparse.Namespace, server: Steersman, results: Sequence[Result], title: str, settings: Mapping[str, Any]
) -> None:
    table = Table.of(traced(results), args.least)
    about = {"settings": dict(settings), "least": args.least, **to_json(table)}
    _json(args.out / "trace.json", about)
    (args.out / "rates.csv").write_text(to_csv(table), encoding="utf-8")
    told = (
        f"{table.used} of {table.questions} questions lose at least {args.least:g} of the answer's probability to noise"
    )
    Console(stderr=True).print(told)
    if not table.used:
        raise ValueError("no question's answer depends on what is noised: there is no recovery rate")
    picture = recovery_png(table, title)
    (args.out / "trace.png").write_bytes(picture)
    tables = {str(c): [(str(g), row.tolist()) for g, row in rates.items()] for c, rates in table.rates.items()}
    (args.out / "trace.html").write_text(page(title, told, picture, tables), encoding="utf-8")
    if "last" in table.rates.get("attn", {}) and "last" in table.rates.get("mlp", {}):
        made = {
            "kind": "recipe",
            "name": args.recipe,
            "model": remote.served_model(server).model_dump(mode="json"),
            **recipe(table, args.lambda_a, args.lambda_m, args.sources, args.targets),
            "provenance": {"method": "causal tracing", "questions": table.used, **settings, "least": args.least},
        }
        _json(args.out / "recipe.json", made)
        if args.store:
            print(server.add(made)["ref"])
    elif args.store:
        raise ValueError("a recipe needs the components attn and mlp and the group last")


def _write_ablation(out: Path, results: Sequence[Result], title: str, settings: Mapping[str, Any]) -> None:
    units, falls = results[0]["units"], Falls.of(ablated(results))
    sets = {
        name: {
            "questions": found.questions,
            "right": found.used,
            "probability_lost": [_known(v) for v in found.probability],
            "answers_lost": [_known(v) for v in found.accuracy],
        }
        for name, found in falls.items()
    }
    _json(out / "ablation.json", {"settings": dict(settings), "units": units, "sets": sets})
    told = "; ".join(
        f"{name or 'questions'}: {f.used} of {f.questions} are answered rightly" for name, f in falls.items()
    )
    Console(stderr=True).print(told)
    if not any(found.used for found in falls.values()):
        raise ValueError("the model answers no question rightly, so nothing can fall")
    title = f"{title}: probability lost with {settings['value']} in place of each"
    picture = ablation_png(units, falls, title)
    (out / "ablation.png").write_bytes(picture)
    rows = [
        (f"{layer}:{part}", [falls[name].probability[i] for name in falls]) for i, (layer, part) in enumerate(units)
    ]
    tables = {f"columns: {', '.join(name or 'questions' for name in falls)}": rows}
    (out / "ablation.html").write_text(page(title, told, picture, tables), encoding="utf-8")


def _json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _known(value: float) -> float | None:
    return None if value != value else float(value)
