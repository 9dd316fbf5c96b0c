"""``steersman neurons label|search|cluster|import``: what needs a checkpoint or its labels and no server."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from steersman.server.commands.neuron_sets import progress, save, show, spell
from steersman.server.policies import catalogue
from steersman.steering import neurons_clusters, neurons_vocabulary
from steersman.steering.errors import InvalidRequest
from steersman.steering.formats import neuron_clusters
from steersman.steering.neurons_checkpoint import Checkpoint
from steersman.steering.neurons_labels import Neuron, NeuronLabels, neurons_asset
from steersman.steering.neurons_projection import project
from steersman.steering.store import Store


def label(args: argparse.Namespace) -> int:
    started = time.monotonic()
    checkpoint = Checkpoint(args.model)
    model = args.id or checkpoint.name
    out = args.out or Path(f"{model.rpartition('/')[2]}.neurons.safetensors")
    _check_ready(out, args.device)
    widths = checkpoint.widths(args.layers)
    vocabulary = _vocabulary(checkpoint, args.policy)
    norm = checkpoint.final_norm() if args.final_norm else None
    with progress("neurons", sum(widths.values())) as advance:
        projection = project(
            checkpoint,
            len(vocabulary),
            top_k=args.top_k,
            layers=args.layers,
            norm=norm,
            memory=args.memory_mb << 20,
            device=args.device,
            advance=advance,
        )
    about = {
        "model": {"id": model, "n_layers": checkpoint.n_layers, "d_model": checkpoint.d_model},
        "down": checkpoint.pattern,
        "unembedding": checkpoint.head,
        "tied": checkpoint.tied,
        "final_norm": args.final_norm,
    }
    NeuronLabels(about, widths, projection, vocabulary).write(out)
    print(
        f"{out}: {sum(widths.values())} neurons of {len(widths)} layers on {len(vocabulary)} tokens "
        f"in {time.monotonic() - started:.0f} s, at most {_peak_gib():.1f} GiB of memory"
    )
    return 0


def search(args: argparse.Namespace) -> int:
    labels = NeuronLabels.read(args.labels)
    match = "part" if args.part else "token"
    every = labels.search(args.words, match=match, rank=args.rank, layers=args.layers)  # type: ignore[arg-type]
    found = every[: args.limit]
    rows = [
        (str(f.neuron[0]), str(f.neuron[1]), f"{f.score:.4g}", spell(f.words), spell(labels.words(f.neuron)))
        for f in found
    ]
    show(("layer", "index", args.rank, "matched", "tokens"), rows)
    print(f"{len(found)} of {len(every)} neurons that match", file=sys.stderr)
    if args.save:
        how = {"words": args.words, "match": match, "rank": args.rank, "limit": args.limit, "labels": _made(labels)}
        _save(args, [f.neuron for f in found], labels, how, f"neurons that write {', '.join(args.words)}")
    return 0


def cluster(args: argparse.Namespace) -> int:
    labels, checkpoint = NeuronLabels.read(args.labels), Checkpoint(args.model)
    _check_same(labels, checkpoint)
    if bool(args.save) != bool(args.pick):
        raise SystemExit("steersman neurons cluster: --save and --pick go together")
    if args.words:
        match = "part" if args.part else "token"
        found = labels.search(args.words, match=match, rank=args.rank, layers=args.layers)  # type: ignore[arg-type]
        neurons = [each.neuron for each in found]
    else:
        neurons = [labels.neuron(row) for row in labels.rows(args.layers).tolist()]
    norm = checkpoint.final_norm() if labels.about.get("final_norm") else None
    mapping = neurons_clusters.random_map(checkpoint, len(labels.vocabulary), args.dimensions, args.seed)
    points = neurons_clusters.sketch(checkpoint, neurons, mapping, norm)
    found_clusters = neurons_clusters.k_means(points, args.clusters, seed=args.seed)
    cosine = (points * found_clusters.centres[found_clusters.member]).sum(1)
    rows, members = [], []
    for i in range(args.clusters):
        at = (found_clusters.member == i).nonzero().flatten()
        members.append([neurons[j] for j in at.tolist()])
        words = spell(neurons_clusters.top_words(labels, members[-1]))
        rows.append((str(i), str(len(at)), f"{float(cosine[at].mean()):.2f}", words))
    show(("cluster", "neurons", "cosine", "tokens"), rows)
    if args.save:
        if beyond := [i for i in args.pick if not 0 <= i < args.clusters]:
            raise SystemExit(f"steersman neurons cluster: --pick {beyond[0]}: clusters are 0 to {args.clusters - 1}")
        chosen = [neuron for i in sorted(set(args.pick)) for neuron in members[i]]
        how = {
            "clusters": args.clusters,
            "picked": sorted(set(args.pick)),
            "words": args.words,
            "layers": args.layers,
            "dimensions": args.dimensions,
            "seed": args.seed,
            "labels": _made(labels),
        }
        _save(args, chosen, labels, how, f"neurons that write {spell(neurons_clusters.top_words(labels, chosen))}")
    return 0


def import_clusters(args: argparse.Namespace) -> int:
    if (args.labels is None) == (args.metadata is None):
        raise SystemExit("steersman neurons import: give --labels or --metadata, for the model's sizes")
    labels = NeuronLabels.read(args.labels) if args.labels else None
    given = {"model": labels.about["model"], "d_ff": labels.d_ff} if labels else args.metadata
    model, d_ff = given.get("model"), given.get("d_ff")
    if not isinstance(model, dict) or type(model.get("n_layers")) is not int or type(d_ff) is not int or d_ff < 1:
        raise InvalidRequest("needs model.n_layers and one d_ff of all layers, as integers", "metadata")
    clusters = neuron_clusters.read(args.file.read_bytes())
    store = Store(args.store)
    for name in args.clusters:
        if name not in clusters:
            raise InvalidRequest(f"the file has no cluster '{name}'; it has {', '.join(clusters)}", "clusters")
        neurons = neuron_clusters.pairs(clusters[name], model["n_layers"], d_ff)
        how = {"file": args.file.name, "cluster": name, "ids": clusters[name]}
        asset = neurons_asset(name, neurons, model, d_ff, source="arXiv 2509.00328", provenance=how)
        print(store.add(asset))
        if labels:
            show(("layer", "index", "tokens"), [(str(a), str(b), spell(labels.words((a, b)))) for a, b in neurons])
    return 0


def _vocabulary(checkpoint: Checkpoint, policy: str) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (ValueError, KeyError, ImportError) as error:
        raise InvalidRequest(f"its tokenizer cannot be read: {error}", "model") from error
    try:
        found = catalogue.load(policy, checkpoint.config, tokenizer)
    except ValueError as error:
        raise InvalidRequest(f"{error}; --policy none leaves actions unnamed", "policy") from None
    return neurons_vocabulary.texts(tokenizer, checkpoint.vocabulary, found.token_values() if found else None)


def _check_ready(out: Path, device: str) -> None:
    """What would otherwise fail when all has been computed, or in torch's words."""
    if not out.absolute().parent.is_dir():
        raise InvalidRequest(f"there is no folder {out.parent}", "out")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequest(f"cannot be used: {str(error).splitlines()[0]}", "device") from error


def _check_same(labels: NeuronLabels, checkpoint: Checkpoint) -> None:
    model = labels.about["model"]
    same = (checkpoint.n_layers, checkpoint.d_model) == (model["n_layers"], model["d_model"])
    if not same or checkpoint.widths(tuple(labels.widths)) != dict(labels.widths):
        raise InvalidRequest(f"the labels are {model['id']}'s, of other sizes than {checkpoint.name}'s", "labels")


def _made(labels: NeuronLabels) -> dict[str, Any]:
    return {key: value for key, value in labels.about.items() if key != "model"}


def _save(
    args: argparse.Namespace, neurons: list[Neuron], labels: NeuronLabels, how: dict[str, Any], description: str
) -> None:
    save(args, neurons, labels.about["model"], labels.widths, how, description)


def _peak_gib() -> float:
    """Of this process so far, with the pages of files that it has mapped."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
