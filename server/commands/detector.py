"""Detect unusual answers: collect features of answers, fit a detector to good ones, score others.

A detector is a Gaussian mixture over features such as answer_entropy.mean; docs/monitoring.md names them. Serve with
--steering-detector NAME to score the answers of all steered requests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from steersman.clients import detectors
from steersman.clients.jobs import read_examples
from steersman.clients.sdk import SteersmanError
from steersman.server.commands import remote
from steersman.steering.detectors import DetectorMeta
from steersman.steering.errors import AssetKindMismatch
from steersman.steering.formats import native
from steersman.steering.signals import parse_feature


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    collect = actions.add_parser("collect", help="ask a server prompts; print answers with their signals as JSON lines")
    fit = actions.add_parser("fit", help="fit a detector to answers that are known to be good, and store it")
    score = actions.add_parser("score", help="score answers by a stored detector")
    for action in (collect, fit, score):
        remote.connection(action)
    for action in (collect, fit):
        action.add_argument("--features", type=_features, required=True, metavar="A,B", help="as answer_entropy.mean")
    collect.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt to a line; or .jsonl")
    collect.add_argument("--max-tokens", type=int, default=256, help="of each answer [%(default)s]")
    collect.add_argument("--temperature", type=float, default=0.0)
    score.add_argument("detector", metavar="NAME[@VERSION]")
    for action in (fit, score):
        action.add_argument("answers", type=Path, help="JSON lines, of collect or whole responses")
    fit.add_argument("--name", required=True, help="of the new asset")
    fit.add_argument("--components", type=int, default=5, metavar="K", help="Gaussians [%(default)s]")
    fit.add_argument("--covariance", choices=("full", "diag"), default="full")
    fit.add_argument("--quantile", type=float, default=0.99, help="of the good answers' scores: the threshold")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--description", default="")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    actions = {"collect": _collect, "fit": _fit, "score": _score}
    try:
        actions[args.action](args)
    except (SteersmanError, httpx.HTTPError, ValueError) as error:
        raise SystemExit(f"steersman detector: {error}") from None
    return 0


def _collect(args: argparse.Namespace) -> None:
    about = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    with remote.client(args) as server:
        for answer in detectors.collect(server, read_examples(args.prompts, "prompts"), args.features, **about):
            print(json.dumps(answer), flush=True)


def _fit(args: argparse.Namespace) -> None:
    answers = detectors.read_answers(args.answers)
    with remote.client(args) as server:
        asset = detectors.fit(
            args.name,
            remote.served_model(server),
            args.features,
            answers,
            components=args.components,
            covariance=args.covariance,
            quantile=args.quantile,
            seed=args.seed,
            description=args.description,
        )
        told = server.add(native.to_json(asset))
    print(f"{told['name']}@{told['version']}")


def _score(args: argparse.Namespace) -> None:
    with remote.client(args) as server:
        asset = native.from_json(server.download(args.detector, "json"))
    if not isinstance(asset.meta, DetectorMeta):
        raise AssetKindMismatch(f"{asset.ref} is of kind {asset.meta.kind}; wanted: detector")
    for score in detectors.score(asset.meta, detectors.read_answers(args.answers)):
        json.dump({"score": score, "unusual": score > asset.meta.threshold}, sys.stdout)
        print()


def _features(text: str) -> list[str]:
    """For argparse."""
    names = text.split(",")
    for name in names:
        try:
            parse_feature(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names
