"""Every op at every site of every architecture, through the real server, against Hugging Face hooks."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from steersman.clients.smollm2 import fetch
from tests.e2e import captured
from tests.e2e.server import Server, serve
from tests.models.tiny import REGISTRY, tiny_model
from tests.oracle import ops
from tests.oracle.hf import AssetData, Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
TOLERANCE = 1e-3
FEATURES = 16
PROMPT = [1, 40, 51, 62, 73, 84, 95, 106, 117, 128, 139, 31]
MISSING = {"gpt_neox": {"resid_mid"}, "mixtral": {"mlp_post"}}
"""Sites that an architecture does not have: parallel residuals have no middle, experts no common neurons."""


@pytest.fixture(scope="module", params=[*sorted(REGISTRY), "smollm2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = fetch() if request.param == "smollm2" else tiny_model(request.param)
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-logprobs", "-1", "--max-num-seqs", "32"]
    with serve(path, tmp_path_factory.mktemp(request.param), options, name=request.param, forked=True) as server:
        yield server, Oracle(path, {})


def test_every_site_is_found(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    model = server.http.get("/v1/steering/model").json()
    every = {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn_z", "mlp_post"}
    assert set(model["sites"]) == every - MISSING.get(server.model, set())
    for site, layers in model["sites"].items():
        assert layers == [i for i in range(model["n_layers"]) if site in oracle.sites(i)], site


def test_ops_at_sites(served: tuple[Server, Oracle]) -> None:
    """The logprobs of the prompt's tokens and of what is generated agree, for every op at every site."""
    server, oracle = served
    model = server.http.get("/v1/steering/model").json()
    assets(oracle, server, model)
    for site, layers in model["sites"].items():
        asked = interventions(site, layers)
        if server.model == "smollm2" and site != "resid_post":
            asked = asked[:1] + asked[8:9]  # the tiny models have gone through all of them
        for i, intervention in enumerate(asked):
            check(server, oracle, {"interventions": [intervention]}, f"{site} #{i} {intervention['op']}")


def test_captures(served: tuple[Server, Oracle]) -> None:
    """Activations at every site, of the bare model and under edits."""
    server, oracle = served
    model = server.http.get("/v1/steering/model").json()
    assets(oracle, server, model)
    captured.everywhere(server, oracle, [PROMPT, PROMPT[:3]])
    edit = {"op": "add", "vector": "resid_post", "scale": 3.0, "layers": [1, 2], "tokens": {"positions": [1]}}
    captured.everywhere(server, oracle, [PROMPT[:7]], {"interventions": [edit]})


def test_selectors_and_gates(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    model = server.http.get("/v1/steering/model").json()
    assets(oracle, server, model)
    base = {"op": "add", "vector": "resid_post", "scale": 2.0, "layers": [1, 2]}
    for tokens in SELECTORS:
        check(server, oracle, {"interventions": [{**base, "tokens": tokens}]}, str(tokens))
    for when in gates(oracle):
        steering = {"interventions": [{**base, "layers": [2, 3], "when": when}]}
        check(server, oracle, steering, str(when), matters=when["over"] == "token")


SELECTORS: list[Any] = [
    "all", "prompt", "generated", "last_prompt",
    {"generated": True, "last": 1},
    {"positions": [2, -3, 14]},
    {"ranges": [[1, 4], [13, 15]]},
    {"token_ids": [62, 117]},
    {"prompt": True, "exclude": {"last": 2}},
    {"exclude": {"positions": [5]}},
]  # fmt: skip


def test_injection(served: tuple[Server, Oracle]) -> None:
    """From sources that the server chose, alone, among other edits of the same places, and gated."""
    server, oracle = served
    model = server.http.get("/v1/steering/model").json()
    assets(oracle, server, model)
    n = model["n_layers"]
    generator = torch.Generator().manual_seed(3)
    rates = {name: torch.rand(n, generator=generator).tolist() for name in ("rr_attn", "rr_mlp")}
    about = {"id": model["model"], "n_layers": n, "d_model": model["d_model"]}
    made = server.post(
        "/v1/steering/assets",
        {"kind": "recipe", "name": "iri", "model": about, **rates, "lambda_a": 1.5, "lambda_m": -1.0},
    )
    assert made.status_code == 201, made.text
    recipe = made.json()
    for side, count in (("sources", 3), ("targets", 10)):
        assert [len(layers) for layers in recipe[side].values()] == [min(count, n)] * 2
    oracle.assets["iri"] = AssetData("recipe", recipe=recipe)
    inject = {"op": "inject", "recipe": "iri"}
    late = [layer for layer in recipe["targets"]["attn"] if layer > recipe["sources"]["attn"][0]][-1]
    first, last = min(recipe["sources"]["attn"]), late
    middle = middle_of(projections(oracle, last - 1))
    gate = {"vector": "resid_post", "layer": last - 1, "measure": "projection", "above": middle}
    beside = {"op": "add", "vector": "attn_out", "scale": 1.5, "layers": [first, last]}
    after = {"op": "multiply", "vector": "mlp_out", "factor": 2.0, "layers": "all"}
    asked: list[list[dict[str, Any]]] = [
        [inject],
        [{**inject, "scale": -0.8, "tokens": "prompt"}],
        [beside, {**inject, "tokens": "all"}, after],
        [{**inject, "layers": late, "scale": 3.0, "tokens": "all", "when": gate}],
    ]
    for i, interventions in enumerate(asked):
        check(server, oracle, {"interventions": interventions}, f"injection #{i}")


def test_features_are_read(served: tuple[Server, Oracle]) -> None:
    """A probe on a feature reports what the dictionary's own encoder says of the prompt's tokens."""
    server, oracle = served
    assets(oracle, server, server.http.get("/v1/steering/model").json())
    data = oracle.assets["resid_post-sae"]
    [(layer, p)] = data.layers.items()
    acts = ops.activations(leaving(oracle, layer), p)
    probes = [{"dictionary": "resid_post-sae", "index": i} for i in range(FEATURES)]
    answer = server.complete(PROMPT, {"probes": probes}, max_tokens=1)
    for i, told in enumerate(answer["steering"]["probes"]):
        assert told["asset"].endswith(f"#{i}")
        seen, want = told["layers"][str(layer)], acts[:, i]
        assert seen["tokens"] == len(PROMPT)
        for name, value in (("mean", want.mean()), ("max", want.max()), ("last", want[-1])):
            assert abs(seen[name] - float(value)) < TOLERANCE * max(1.0, float(want.max())), (i, name)
    assert 0 < int((acts > 0).sum()) < acts.numel()


def test_features_that_take_the_whole_encoder(served: tuple[Server, Oracle]) -> None:
    """TopK dictionaries, whose activations the worker encodes from its own store; what that costs is told before."""
    server, oracle = served
    model = server.http.get("/v1/steering/model").json()
    assets(oracle, server, model)
    about = {"id": model["model"], "n_layers": model["n_layers"], "d_model": model["d_model"]}
    if server.model not in ("llama", "gpt2"):
        pytest.skip("the encode is the same whatever the architecture: shown on llama and gpt2")
    for site in ("resid_post", "mlp_post"):
        layer = model["sites"][site][1]
        width, name = model["widths"][site][str(layer)], f"{site}-topk"
        dictionary(oracle, server, about, name, site, layer, width, k=5)
        feature = {"op": "feature", "dictionary": name, "index": [0, 3, 4, 7, 9]}
        changes: list[dict[str, Any]] = [
            {"mode": "set", "value": 3.0},
            {"mode": "scale", "value": -3.0, "only_if_active": True, "tokens": "prompt"},
            {"mode": "ablate", "preserve_norm": True},
        ]
        for change in changes:
            check(server, oracle, {"interventions": [{**feature, **change}]}, f"{name} {change['mode']}")
        asked = {"steering": {"interventions": [{**feature, "value": 1.0}]}}
        [cost] = server.post("/v1/steering/resolve", asked).json()["cost"]["encodes"]
        assert cost["multiply_adds_per_token"] == FEATURES * width
        read_by_encoding(server, oracle, name, site, layer)


def read_by_encoding(server: Server, oracle: Oracle, name: str, site: str, layer: int) -> None:
    """Probes and gates of a dictionary that encodes say what the dictionary does of the prompt's tokens."""
    stream = oracle.capture(PROMPT, [(layer, site)], prompt_len=len(PROMPT))[layer, site]
    acts = ops.activations(stream, oracle.assets[name].layers[layer])
    probes = [{"dictionary": name, "index": i} for i in range(FEATURES)]
    answer = server.complete(PROMPT, {"probes": probes}, max_tokens=1)
    for i, told in enumerate(answer["steering"]["probes"]):
        seen = told["layers"][str(layer)]
        for number, value in (("mean", acts[:, i].mean()), ("max", acts[:, i].max()), ("last", acts[-1, i])):
            assert abs(seen[number] - float(value)) < TOLERANCE * max(1.0, float(acts[:, i].max())), (i, number)
    index = int((acts > 0).float().mean(0).sub(0.5).abs().argmin())
    assert 0 < int((acts[:, index] > 0).sum()) < len(PROMPT)
    some = acts[:, index].sort().values
    base = {"op": "add", "vector": "resid_post", "scale": 2.0, "layers": [layer + 1]}
    for over in ("token", "last_prompt"):
        when = {"dictionary": name, "index": index, "above": float(some[-3:-1].mean()), "over": over}
        check(server, oracle, {"interventions": [{**base, "when": when}]}, f"{name} {over}", matters=over == "token")


def leaving(oracle: Oracle, layer: int) -> torch.Tensor:
    """[tokens, d] the prompt's stream as it leaves a layer."""
    return oracle.capture(PROMPT, [(layer, "resid_post")], prompt_len=len(PROMPT))[layer, "resid_post"]


def projections(oracle: Oracle, layer: int) -> torch.Tensor:
    """Of the prompt's tokens on the layer's direction."""
    v = oracle.assets["resid_post"].layers[layer]
    return leaving(oracle, layer) @ (v / v.norm())


def middle_of(values: torch.Tensor) -> float:
    """A threshold between the two middle ones."""
    return float(values.sort().values[len(PROMPT) // 2 - 1 : len(PROMPT) // 2 + 1].mean())


def gates(oracle: Oracle) -> list[dict[str, Any]]:
    """Gates with thresholds in the middle of what is measured, so that they open for some and not for others."""
    projection = projections(oracle, 1)
    middle = middle_of(projection)
    gate = {"vector": "resid_post", "layer": 1, "measure": "projection"}
    acts = ops.activations(leaving(oracle, 1), oracle.assets["early-sae"].layers[1])
    index = int((acts > 0).float().mean(0).sub(0.5).abs().argmin())
    some = acts[:, index].sort().values
    half = float(some[-3:-1].mean())  # active on some tokens more than this
    feature = {"dictionary": "early-sae", "index": index}
    return [
        {**feature, "above": half, "over": "token"},
        {**feature, "below": half, "over": "token", "measure": "feature"},
        {**gate, "above": middle, "over": "token"},
        {**gate, "below": middle, "over": "token", "measure": "projection"},
        {**gate, "above": middle, "over": "token", "hold": True},
        {**gate, "above": float(projection.mean()) - 0.05, "over": "prompt_mean"},
        {**gate, "above": float(projection.mean()) + 0.05, "over": "prompt_mean"},
        {**gate, "above": float(projection[-1]) - 0.05, "over": "last_prompt"},
        {**gate, "measure": "cosine", "above": 0.0, "over": "token"},
    ]


def interventions(site: str, layers: list[int]) -> list[dict[str, Any]]:
    """Each op at one site, at one layer and at all of them."""
    one = layers[len(layers) // 2]
    where = {"site": site, "vector": site}
    found: list[dict[str, Any]] = [
        {"op": "add", **where, "scale": 1.5, "layers": one},
        {"op": "add", **where, "scale": 0.2, "relative": "norm", "layers": layers},
        {"op": "add", **where, "scale": 1.5, "layers": one, "preserve_norm": True},
        {"op": "feature", "dictionary": f"{site}-sae", "index": [2, 5, 11], "mode": "set", "value": 3.0},
        {"op": "feature", "dictionary": f"{site}-sae", "index": 3, "mode": "add", "value": 2.0},
        {
            "op": "feature",
            "dictionary": f"{site}-sae",
            "index": [0, 1, 4, 7],
            "mode": "scale",
            "value": -3.0,
            "only_if_active": True,
        },
        {
            "op": "feature",
            "dictionary": f"{site}-sae",
            "index": list(range(9)),
            "mode": "ablate",
            "preserve_norm": True,
        },
        {"op": "ablate", **where, "layers": layers},
        {"op": "ablate", **where, "vector": f"{site}-plane", "layers": layers, "strength": 0.7},
        {"op": "clamp", **where, "value": 2.5, "layers": one, "tokens": {"generated": True, "last": 2}},
        {"op": "clamp", **where, "min": -0.3, "max": 0.3, "layers": layers},
        {"op": "multiply", **where, "factor": -1.5, "layers": layers},
        {"op": "rotate", **where, "toward": f"{site}-other", "degrees": 70.0, "layers": layers},
        {"op": "affine", "affine": f"{site}-affine", "site": site, "strength": 0.8, "layers": one},
    ]
    if site == "attn_z":
        found += [
            {"op": "heads", "heads": [[one, 0]], "factor": 0.0},
            {"op": "heads", "heads": [[one, 0], [layers[0], 1]], "factor": 2.0},
            {"op": "heads", "heads": [[one, 1]], "vector": site, "scale": 1.5},
        ]
    if site == "mlp_post":
        pairs = [[one, 3], [one, 17], [layers[0], 5]]
        found += [
            {"op": "neurons", "neurons": {"inline": pairs}, "mode": mode, "value": value}
            for mode, value in (("set", 2.0), ("add", 1.0), ("scale", -3.0))
        ]
    return found


def assets(oracle: Oracle, server: Server, model: dict[str, Any]) -> None:
    """Random directions of every site, in the oracle and in the server's store."""
    if oracle.assets:
        return
    generator = torch.Generator().manual_seed(7)
    about = {"id": model["model"], "n_layers": model["n_layers"], "d_model": model["d_model"]}
    for site, layers in model["sites"].items():
        widths = [model["widths"][site][str(layer)] for layer in layers]
        by_width: dict[int, list[int]] = {}
        for layer, width in zip(layers, widths, strict=True):
            by_width.setdefault(width, []).append(layer)
        width, chosen = max(by_width.items(), key=lambda item: len(item[1]))
        common = {"kind": "vector", "site": site, "layers": chosen, "model": about}
        for name, shape in ((site, (width,)), (f"{site}-other", (width,)), (f"{site}-plane", (2, width))):
            stacked = torch.randn(len(chosen), *shape, generator=generator)
            oracle.assets[name] = AssetData("vector", site, dict(zip(chosen, stacked, strict=True)))
            upload(server, {**common, "name": name}, {"vectors": stacked})
        r = torch.linalg.qr(torch.randn(len(chosen), width, 3, generator=generator)).Q.mT.contiguous()
        a = torch.randn(len(chosen), 3, width, generator=generator) * 0.2
        b = torch.randn(len(chosen), 3, generator=generator)
        parts = {layer: {"R": r[i], "A": a[i], "b": b[i]} for i, layer in enumerate(chosen)}
        oracle.assets[f"{site}-affine"] = AssetData("affine", site, parts)
        upload(server, {**common, "kind": "affine", "name": f"{site}-affine"}, {"R": r, "A": a, "b": b})
        one = layers[len(layers) // 2]
        dictionary(oracle, server, about, f"{site}-sae", site, one, model["widths"][site][str(one)])
    dictionary(oracle, server, about, "early-sae", "resid_post", 1, model["widths"]["resid_post"]["1"])


def dictionary(
    oracle: Oracle, server: Server, about: dict[str, Any], name: str, site: str, layer: int, width: int,
    k: int | None = None,
) -> None:  # fmt: skip
    """A random JumpReLU dictionary, or TopK, whose features are active on some of the prompt's tokens."""
    generator = torch.Generator().manual_seed(width + layer)
    stream = oracle.capture(PROMPT, [(layer, site)], prompt_len=len(PROMPT))[layer, site]
    encoder, decoder = (torch.randn(FEATURES, width, generator=generator) for _ in range(2))
    encoder = encoder / (stream.norm(dim=1).mean() / width**0.5) / width**0.5
    tensors = {
        "encoder": encoder, "decoder": decoder / decoder.norm(dim=1, keepdim=True),
        "b_enc": torch.randn(FEATURES, generator=generator) / 4, "b_dec": stream.mean(0) / 8,
        "threshold": torch.rand(FEATURES, generator=generator) / 2,
    }  # fmt: skip
    scale = float(stream.norm(dim=1).mean()) / 4  # so that an edit is felt
    tensors["decoder"] = tensors["decoder"] * scale
    if k is not None:
        del tensors["threshold"]
    numbers = {n: t for n, t in tensors.items() if n in ("b_enc", "b_dec", "threshold")}
    read = {"W_enc": encoder.T, "W_dec": tensors["decoder"], **numbers, **({"k": torch.tensor(k)} if k else {})}
    oracle.assets[name] = AssetData("dictionary", site, {layer: read})
    meta = {
        "kind": "dictionary",
        "architecture": "jumprelu" if k is None else "topk",
        "apply_b_dec_to_input": True,
        "site": site,
        "layer": layer,
        **({} if k is None else {"k": k}),
    }
    upload(server, {**meta, "name": name, "model": about}, tensors)


def upload(server: Server, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    packed = {
        name: {"dtype": "float32", "shape": list(t.shape), "data": base64.b64encode(t.numpy().tobytes()).decode()}
        for name, t in tensors.items()
    }
    response = server.post("/v1/steering/assets", {**metadata, "tensors": packed})
    assert response.status_code == 201, response.text


def check(
    server: Server, oracle: Oracle, steering: dict[str, Any], label: str, new: int = 5, matters: bool = True
) -> None:
    """Compares the likeliest tokens' logprobs at every position. ``matters``: the edit must move some."""
    wide, count = (
        oracle.model.config.vocab_size,
        64,
    )  # the server decodes every token that it names, which takes its time
    every = {"logprobs": count, "prompt_logprobs": count, "return_tokens_as_token_ids": True}
    answer = server.complete(PROMPT, steering, max_tokens=new, return_token_ids=True, **every)
    choice = answer["choices"][0]
    ids = PROMPT + choice["token_ids"]
    wanted = oracle.logprobs(ids, steering, len(PROMPT))
    got = torch.full_like(wanted, float("nan"))
    for position, entries in enumerate(choice["prompt_logprobs"][1:]):
        for token, entry in entries.items():
            got[position, int(token)] = entry["logprob"]
    for step, entries in enumerate(choice["logprobs"]["top_logprobs"]):
        for name, value in entries.items():
            got[len(PROMPT) - 1 + step, int(name.removeprefix("token_id:"))] = value
    got, wanted = got[: len(ids) - 1], wanted[: len(ids) - 1]
    assert (got.isnan().sum(-1) <= wide - count).all(), f"{label}: logprobs are missing or NaN"
    error = (got - wanted).nan_to_num().abs().max().item()
    assert error < TOLERANCE, f"{label}: logprobs differ by {error}"
    moved = not matters or (wanted - oracle.logprobs(ids, None, len(PROMPT))[: len(ids) - 1]).abs().max().item()
    assert not matters or moved > 10 * TOLERANCE, f"{label}: the edit moved nothing, so this shows nothing"
