"""Look after a store of assets: add, list, show, export, rm, verify; convert files of other projects."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steersman.server.commands.remote import json_object
from steersman.server.settings import default_store, variable
from steersman.steering import weights_lint
from steersman.steering.assets import KINDS, Asset, dump_metadata
from steersman.steering.formats import dictionary_files, gguf, native, saes, uploads
from steersman.steering.neurons_checkpoint import Checkpoint
from steersman.steering.store import Store


def configure(parser: argparse.ArgumentParser) -> None:
    store = os.environ.get(variable("store")) or default_store()
    parser.add_argument("--store", default=store, help="a folder or fsspec URL [%(default)s]")
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="add a .safetensors, .gguf, .svec or .json file")
    convert = actions.add_parser("convert", help="turn a file or folder of another project into a .safetensors to add")
    for reads in (add, convert):
        reads.add_argument("file", type=Path)
        reads.add_argument(
            "--metadata", type=json_object, default={}, help="JSON object with what the file does not say"
        )
        reads.add_argument("--name", help="the asset's name, where the file does not say")
    add.add_argument("--kind", choices=("dictionary",), help="dictionary: of another project, a file or folder")
    add.add_argument("--format", choices=sorted(saes.FORMATS), help="of a dictionary, where it cannot be told")
    add.add_argument("--labels", type=Path, help="a dictionary's labels: JSON, or Neuronpedia's JSON lines")
    convert.add_argument("--out", type=Path, help="where to write [NAME.safetensors]")
    export = actions.add_parser(
        "export", help="write an asset as .gguf, .safetensors or .json, as the file's name ends"
    )
    export.add_argument("ref", metavar="NAME[@VERSION]")
    export.add_argument("out", type=Path)
    export.add_argument("--saelens", action="store_true", help="write a dictionary as a folder that SAELens loads")
    export.add_argument("--for-llama-cpp", action="store_true", help="refuse what llama.cpp does not load")
    listing = actions.add_parser("list", help="list what is stored")
    listing.add_argument("--kind", choices=KINDS)
    listing.add_argument("--model")
    listing.add_argument("--text", help="words of the name or description")
    for action, text in (("show", "print an asset's metadata"), ("rm", "delete a version, or all of a name")):
        actions.add_parser(action, help=text).add_argument("ref", metavar="NAME[@VERSION]")
    verify = actions.add_parser("verify", help="hash everything again; with --weights, look at the directions too")
    verify.add_argument("ref", nargs="?")
    verify.add_argument(
        "--weights", type=Path, metavar="FOLDER", help="the model's: warn of directions that its W_down hardly reads"
    )


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.action == "convert":
        return _convert(args)
    actions = {"add": _add, "list": _list, "show": _show, "export": _export, "rm": _rm, "verify": _verify}
    action: Any = actions[args.action]
    return int(action(args, Store(args.store)))


def _add(args: argparse.Namespace, store: Store) -> int:
    if args.kind == "dictionary":
        return _add_dictionary(args, store)
    if args.format or args.labels:
        raise SystemExit("steersman assets add: --format and --labels go with --kind dictionary")
    data = args.file.read_bytes()
    fields = _fields(args)
    if args.file.suffix == ".json":
        asset = native.from_json({**native.loads(data, "file"), **fields})
    else:
        asset = uploads.read(data, fields or None)
    print(store.add(asset))
    return 0


def _add_dictionary(args: argparse.Namespace, store: Store) -> int:
    fields = _fields(args)
    if args.format:
        fields["format"] = args.format
    if args.labels:
        fields["labels"] = args.labels.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        print(store.add(dictionary_files.from_path(args.file, fields, Path(scratch))))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from steersman.clients.convert import convert  # it opens pickles: no server process has it loaded

    asset = convert(args.file, _fields(args))
    out = args.out or Path(f"{asset.name}.safetensors")
    out.write_bytes(native.to_safetensors(asset))
    print(f"{out}: {asset.meta.kind} {asset.ref}")
    return 0


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    return {**args.metadata, **({"name": args.name} if args.name else {})}


def _export(args: argparse.Namespace, store: Store) -> int:
    if args.for_llama_cpp and (args.saelens or args.out.suffix != ".gguf"):
        raise SystemExit("steersman assets export: --for-llama-cpp goes with a name in .gguf")
    if args.saelens:
        asset = store.get(args.ref)
        dictionary_files.to_folder(asset, args.out)
        print(f"{args.out}: {asset.ref}")
        return 0
    if args.out.suffix not in (".gguf", ".safetensors", ".json"):
        raise SystemExit(f"steersman assets export: {args.out}: wanted is a name in .gguf, .safetensors or .json")
    asset = store.get(args.ref)
    parts: Iterable[bytes]
    if args.out.suffix == ".gguf":
        parts = [gguf.to_gguf(asset, for_llama_cpp=args.for_llama_cpp)]
    elif args.out.suffix == ".json":
        parts = [json.dumps(native.to_json(asset)).encode()]
    else:
        parts = native.to_parts(asset)
    with args.out.open("wb") as file:
        file.writelines(parts)
    print(f"{args.out}: {asset.ref}")
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
    if args.weights is not None:
        checkpoint = Checkpoint(args.weights)
        for ref in (v.ref for v in verdicts if not v.problem):
            _look_at(store.get(ref), checkpoint)
    return int(any(v.problem for v in verdicts))


def _look_at(asset: Asset, checkpoint: Checkpoint) -> None:
    """Warnings are printed and change no exit code: an edit along such a direction may be what is wanted."""
    if not weights_lint.applies(asset):
        print(f"{asset.ref}: not compared with the weights: it has no directions at mlp_post")
        return
    found = weights_lint.lint_weights(asset, checkpoint)
    for finding in found:
        print(f"{asset.ref}: warning: {finding.message}")
    if not found:
        print(f"{asset.ref}: W_down reads its directions as well as random ones")
