"""Look after a store of assets: add, list, show, rm, verify."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steersman.server.commands.remote import json_object
from steersman.server.settings import default_store, variable
from steersman.steering.assets import KINDS, dump_metadata
from steersman.steering.formats import native, uploads
from steersman.steering.store import Store


def configure(parser: argparse.ArgumentParser) -> None:
    store = os.environ.get(variable("store")) or default_store()
    parser.add_argument("--store", default=store, help="a folder or fsspec URL [%(default)s]")
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="add a .safetensors, .gguf or .json file")
    add.add_argument("file", type=Path)
    add.add_argument("--metadata", type=json_object, default={}, help="JSON object with what the file does not say")
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
        asset = native.from_json({**native.loads(data, "file"), **fields})
    else:
        asset = uploads.read(data, fields or None)
    print(store.add(asset))
    return 0


def _list(args: argparse.Namespace, store: Store) -> int:
    console = Console()
    table = Table("asset", "kind", "model", "layers", "description", box=None)
    for info in store.list(args.kind, args.model, args.text):
        layers = info.meta.edited_layers
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else ", ".join(map(str, layers))
        row = (info.ref, info.meta.kind, info.meta.model.id, span, info.meta.description)
        if console.is_terminal:
            table.add_row(*map(escape, row))
        else:  # for other programs: nothing is wrapped
            print("\t".join(" ".join(cell.split()) for cell in row))
    if console.is_terminal:
        console.print(table)
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
