"""``steersman neurons contrast``: which neurons differ between two sets of prompts, on a running server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor

from steersman.clients.activations import Capture
from steersman.clients.sdk import Steersman, SteersmanError
from steersman.server.commands import remote
from steersman.server.commands.neuron_sets import progress, save, show, spell
from steersman.steering.errors import InvalidRequest, UploadMalformed, located
from steersman.steering.neurons_contrast import chance, contrast, strongest
from steersman.steering.neurons_labels import NeuronLabels
from steersman.steering.sites import Site

SITE = Site.MLP_POST.value
BATCH = 16  # prompts of one request
SIGNS = {"positive": 1, "negative": -1, "both": 0}
Activations = dict[int, Tensor]  # layer -> [examples, d_ff] float32


def run(args: argparse.Namespace) -> int:
    labels = NeuronLabels.read(args.labels) if args.labels else None
    files = [args.positive, args.negative]
    asks = [path for path in files if path.suffix != ".safetensors"]
    model = dict(labels.about["model"]) if labels else None
    if args.save and model is None and not asks:
        raise SystemExit("steersman neurons contrast: to save what files of captures give, say --labels")
    sides = {}
    try:
        with remote.client(args) as server:
            if asks:
                model = remote.served_model(server).model_dump(exclude_none=True)
            for side, path in zip(("positive", "negative"), files, strict=True):
                with located(side):
                    sides[side] = _from_server(server, path, args) if path in asks else _from_file(path, args.layers)
    except (SteersmanError, httpx.HTTPError) as error:
        raise SystemExit(f"steersman neurons contrast: {error}") from None
    positive, negative = sides["positive"], sides["negative"]
    level = chance(positive, negative, rounds=args.shuffles)
    found = {layer: contrast(positive[layer], negative[layer]) for layer in positive}
    chosen = strongest(found, args.top, sign=SIGNS[args.side])
    rows = []
    for layer, index in chosen:
        effect, difference = float(found[layer].effect[index]), float(found[layer].difference[index])
        words = [spell(labels.words((layer, index)))] if labels else []
        rows.append((str(layer), str(index), f"{effect:.2f}", f"{difference:.4g}", *words))
    show(("layer", "index", "d'", "difference", *(["tokens"] if labels else [])), rows)
    beyond = sum(int((each.effect.abs() > level).sum()) for each in found.values())
    widths = {layer: each.effect.numel() for layer, each in found.items()}
    print(
        f"{beyond} of {sum(widths.values())} neurons have a |d'| above {level:.2f}, "
        "which the largest of them reaches by chance in one case of twenty",
        file=sys.stderr,
    )
    if args.save:
        assert model is not None, "the server or the labels have said it"
        counts = {side: len(next(iter(given.values()))) for side, given in sides.items()}
        how = {
            "positive": {"file": args.positive.name, "examples": counts["positive"]},
            "negative": {"file": args.negative.name, "examples": counts["negative"]},
            "tokens": args.tokens,
            "side": args.side,
            "effects": [round(float(found[layer].effect[index]), 4) for layer, index in chosen],
            "chance": round(level, 4),
        }
        text = f"neurons that differ most between {args.positive.stem} and {args.negative.stem}"
        save(args, chosen, model, widths, how, text)
    return 0


def _from_server(server: Steersman, path: Path, args: argparse.Namespace) -> Activations:
    try:
        prompts = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(prompts, list) or not prompts:
        raise InvalidRequest(f"{path} must be a list of prompts: texts, token ids or chat messages")
    asked = {"sites": [SITE], "layers": "all" if args.layers is None else [*args.layers], "reduce": "mean"}
    parts = []
    with progress(path.stem, len(prompts)) as advance:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            parts.append(_means(server.capture(batch, tokens=_tokens(args.tokens), **asked)))
            advance(len(batch))
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def _from_file(path: Path, layers: Sequence[int] | None) -> Activations:
    """A file of captured activations, as ``POST /v1/steering/captures`` answers."""
    data = path.read_bytes()
    try:
        found = _means(Capture.from_bytes(data))
    except Exception as error:  # the reader documents no list of what it raises
        raise UploadMalformed(f"{path} is no file of captured activations: {error!r}") from error
    missing = sorted(set(layers or ()) - found.keys())
    if missing or not found:
        raise InvalidRequest(f"{path} has {SITE} of layers {', '.join(map(str, found)) or 'none'}")
    return {layer: rows for layer, rows in found.items() if layers is None or layer in layers}


def _means(captured: Capture) -> Activations:
    """One row for each prompt: as they are where the server has reduced them, else the mean of its tokens."""
    about: Mapping[str, Any] = captured.about
    layers = [int(layer) for layer in about["sites"].get(SITE, ())]
    if about["reduce"] != "none":
        rows = {layer: captured.rows(SITE, layer) for layer in layers}
    else:
        count = range(len(about["prompts"]))
        rows = {layer: np.stack([captured.rows(SITE, layer, i).mean(0) for i in count]) for layer in layers}
    return {layer: torch.from_numpy(np.array(each, np.float32)) for layer, each in rows.items()}


def _tokens(text: str) -> Any:
    """A selection's word, or its object."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"not JSON: {error}", "tokens") from error
