"""Look after a store of assets: add, list, show, rm, verify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steersman.server.settings import Settings
from steersman.steering.assets import KINDS, dump_metadata
from steersman.steering.formats import gguf, native
from steersman.steering.store import Store


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", default=Settings.from_env().store, help="a folder or fsspec URL [%(default)s]")
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="add a .safetensors, .gguf or .json file")
    add.add_argument("file", type=Path)
    add.add_argument("--metadata", type=json.loads, default={}, help="JSON object with what the file does not say")
    add.add_argument("--name", help="the asset's name, where the file does not say")
    listing = actions.add_parser("list", help="list what is stored")
    listing.add_argument("--kind", choices=KINDS)
    listing.add_argument("--model")
    listing.add_argument("--text", help="words of the name or description")
    for action, text in (("show", "print an asset's metadata"), ("rm", "delete a version, or all of a name")):
        actions.add_parser(action, help=text).add_argument("ref", metavar="NAME[@VERSION]")
    actions.add_parser("verify", help="hash everything again").add_argument("ref", nargs="?")


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    action: Any = {"add": _add, "list": _list, "show": _show, "rm": _rm, "verify": _verify}[args.action]
    return int(action(args, Store(args.store)))


def _add(args: argparse.Namespace, store: Store) -> int:
    data = args.file.read_bytes()
    fields = {**args.metadata, **({"name": args.name} if args.name else {})}
    if args.file.suffix == ".json":
        asset = native.from_json({**json.loads(data), **fields})
    elif data[:4] == b"GGUF":
        asset = gguf.from_gguf(data, **fields)
    else:
        asset = native.from_safetensors(data, fields or None)
    print(store.add(asset))
    return 0


def _list(args: argparse.Namespace, store: Store) -> int:
    table = Table("asset", "kind", "model", "layers", "description", box=None)
    for info in store.list(args.kind, args.model, args.text):
        layers = info.meta.edited_layers
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else ", ".join(map(str, layers))
        table.add_row(info.ref, info.meta.kind, info.meta.model.id, span, info.meta.description)
    Console().print(table)
    return 0


def _show(args: argparse.Namespace, store: Store) -> int:
    info = store.info(args.ref)
    print(json.dumps({"ref": info.ref, "sha256": info.sha256, **dump_metadata(info.meta)}, indent=2))
    return 0


def _rm(args: argparse.Namespace, store: Store) -> int:
    for ref in store.remove(args.ref):
        print(f"removed {ref}")
    return 0


def _verify(args: argparse.Namespace, store: Store) -> int:
    verdicts = store.verify(args.ref)
    for verdict in verdicts:
        print(f"{verdict.ref}: {verdict.problem or 'ok'}")
    return int(any(v.problem for v in verdicts))
