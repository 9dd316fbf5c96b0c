"""Find neurons by what they write or by what they answer to, and store them as sets to steer.

`label` names every MLP neuron of a checkpoint by the tokens that it writes; `search` and `cluster` find neurons among
the labels; `import` takes clusters that others released; `contrast` asks a running server which neurons differ between
two sets of prompts or observations. `--save NAME` stores what was found as an asset of kind `neurons`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from steersman.server.commands import neurons_contrast, neurons_offline, remote
from steersman.server.commands.neuron_sets import layer_list, positive
from steersman.server.policies.catalogue import CHOICES
from steersman.server.settings import default_store, variable

ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "label": neurons_offline.label,
    "search": neurons_offline.search,
    "cluster": neurons_offline.cluster,
    "import": neurons_offline.import_clusters,
    "contrast": neurons_contrast.run,
}


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)

    label = actions.add_parser("label", help="the tokens that each neuron writes, into a file")
    label.add_argument("model", type=Path, metavar="FOLDER", help="a model's folder with safetensors")
    label.add_argument("--out", type=Path, metavar="FILE", help="where to write [MODEL.neurons.safetensors]")
    label.add_argument("--id", metavar="MODEL", help="the model's name, where it is not the folder's")
    label.add_argument(
        "--top-k", type=positive, default=10, metavar="K", help="tokens kept for each neuron [%(default)s]"
    )
    label.add_argument("--final-norm", action="store_true", help="through the model's last norm; the paper does not")
    label.add_argument("--policy", choices=CHOICES, default="auto", help="whose action tokens to name [%(default)s]")
    label.add_argument("--memory-mb", type=positive, default=256, metavar="MIB", help="of the blocks [%(default)s]")
    label.add_argument("--device", default="cpu", help="where to multiply, e.g. cuda [%(default)s]")
    _layers(label)

    search = actions.add_parser("search", help="neurons whose tokens match words, the best first")
    search.add_argument("labels", type=Path, metavar="LABELS", help="the file that `label` wrote")
    search.add_argument("words", nargs="+", metavar="WORD")
    _matching(search)
    search.add_argument("--limit", type=positive, default=20, metavar="N", help="neurons shown and saved [%(default)s]")
    _layers(search)
    _saving(search)

    cluster = actions.add_parser("cluster", help="neurons that write alike, by k-means")
    cluster.add_argument("labels", type=Path, metavar="LABELS")
    cluster.add_argument("model", type=Path, metavar="FOLDER", help="the folder that was labelled")
    cluster.add_argument("--clusters", type=positive, default=20, metavar="N", help="[%(default)s]")
    cluster.add_argument(
        "--word", action="append", default=[], dest="words", help="only neurons that match; repeatable"
    )
    _matching(cluster)
    cluster.add_argument(
        "--dimensions", type=positive, default=256, metavar="R", help="random projection [%(default)s]"
    )
    cluster.add_argument("--seed", type=int, default=0)
    cluster.add_argument("--pick", type=int, action="append", default=[], metavar="I", help="save this one; repeatable")
    _layers(cluster)
    _saving(cluster)

    take = actions.add_parser("import", help="clusters of arXiv 2509.00328's repository, ids layer·d_ff + index")
    take.add_argument("file", type=Path, metavar="FILE", help="YAML or JSON, e.g. dictionaries.yaml")
    take.add_argument("clusters", nargs="+", metavar="CLUSTER")
    take.add_argument("--labels", type=Path, help="labels of the model: its sizes, and a check of the tokens")
    take.add_argument(
        "--metadata",
        type=remote.json_object,
        help='instead of labels: {"model": {"id": .., "n_layers": .., "d_model": ..}, "d_ff": ..}',
    )
    _store(take)

    contrast = actions.add_parser("contrast", help="neurons that differ between two sets, on a running server")
    contrast.add_argument("positive", type=Path, metavar="POSITIVE", help="JSON list of prompts or chats")
    contrast.add_argument("negative", type=Path, metavar="NEGATIVE")
    remote.connection(contrast)
    contrast.add_argument(
        "--tokens", default="prompt", help="whose mean is taken: a word or a JSON object [%(default)s]"
    )
    contrast.add_argument("--top", type=positive, default=20, metavar="N", help="neurons shown and saved [%(default)s]")
    contrast.add_argument(
        "--side", choices=("positive", "negative", "both"), default="positive", help="more active where [%(default)s]"
    )
    contrast.add_argument("--shuffles", type=positive, default=200, help="for what chance reaches [%(default)s]")
    contrast.add_argument("--labels", type=Path, help="show the neurons' tokens too")
    _layers(contrast)
    _saving(contrast)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    return ACTIONS[args.action](args)


def _layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=layer_list, metavar="L", help="e.g. 0-3,7 [all]")


def _matching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="store_true", help="words may be parts of tokens")
    parser.add_argument("--rank", choices=("z", "probability", "count"), default="z", help="[%(default)s]")


def _saving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="NAME", help="store the neurons as an asset")
    parser.add_argument(
        "--controls", type=positive, default=0, metavar="N", help="and N random sets of the same layers, NAME-control-I"
    )
    _store(parser)


def _store(parser: argparse.ArgumentParser) -> None:
    store = os.environ.get(variable("store")) or default_store()
    parser.add_argument("--store", default=store, help="a folder or fsspec URL [%(default)s]")
