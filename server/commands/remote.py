"""What the commands that talk to a running server share."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from steersman.clients.sdk import Steersman
from steersman.steering.asset_fields import ModelRef


def connection(parser: argparse.ArgumentParser) -> None:
    """Which server, and with which keys."""
    parser.add_argument("--server", default=os.environ.get("STEERSMAN_SERVER", "http://localhost:8000"), metavar="URL")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--admin-key", default=os.environ.get("STEERSMAN_ADMIN_KEY"), help="to change what it keeps")


def configure(parser: argparse.ArgumentParser) -> None:
    connection(parser)
    parser.add_argument(
        "--add", action="append", default=[], metavar="ASSET=SCALE", help="add a vector, e.g. french=6; may be repeated"
    )
    parser.add_argument("--ablate", action="append", default=[], metavar="ASSET", help="remove a direction")
    parser.add_argument("--steering", type=json_object, metavar="JSON", help="the whole steering object")


def json_object(text: str) -> dict[str, Any]:
    """For argparse."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def json_or_file(text: str) -> dict[str, Any]:
    """For argparse: the object itself, or ``@`` and a file that holds it."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"cannot be read: {error}") from None
    return json_object(text)


def steering(args: argparse.Namespace) -> dict[str, Any]:
    """The steering object that the options describe."""
    out: dict[str, Any] = dict(args.steering or {})
    interventions = out.get("interventions", [])
    if not isinstance(interventions, list):
        raise SystemExit("steersman: --steering: interventions must be a list")
    interventions = list(interventions)
    for given in args.add:
        name, _, scale = given.partition("=")
        try:
            extra = {"scale": float(scale)} if scale else {}
        except ValueError:
            raise SystemExit(f"steersman: --add {given}: the scale must be a number, as in french=6") from None
        interventions.append({"op": "add", "vector": name, **extra})
    interventions += [{"op": "ablate", "vector": name} for name in args.ablate]
    return {**out, "interventions": interventions}


def served_model(server: Steersman) -> ModelRef:
    """What an asset that is made with this server's model is for."""
    told = server.model()
    return ModelRef(
        id=told["model"], n_layers=told["n_layers"], d_model=told["d_model"], fingerprint=told["fingerprint"]
    )


def client(args: argparse.Namespace) -> Steersman:
    return Steersman(args.server, api_key=args.api_key, admin_key=args.admin_key)
