"""The oracle obeys the algebra of its own ops on every tiny model, before anything is compared with it."""

import base64
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import EOS, N_LAYERS, REGISTRY, VOCAB_SIZE, build, tiny_model
from tests.oracle import ops
from tests.oracle.hf import SITES, AssetData, Oracle, PromptContext
from tests.oracle.request import select

MODELS = sorted(REGISTRY)
MOE = {"mixtral", "deepseek_v2"}
IDS = [1, 200, 34, 301, 77, 410, 12, 95, 333, 150]  # prompt of 7, then 3 generated tokens
PROMPT = 7
LAYERS = range(N_LAYERS)


@cache
def oracle(name: str) -> Oracle:
    """The oracle of a tiny model with assets `v-SITE` and `u-SITE` (directions), `s-SITE` (3 directions)."""
    found = Oracle(tiny_model(name), {})
    where = [(layer, site) for layer in LAYERS for site in found.sites(layer)]
    width = {place: x.shape[1] for place, x in found.capture([1, 2], where).items()}
    g = torch.Generator().manual_seed(7)
    for site in SITES:
        layers = [layer for layer in LAYERS if (layer, site) in width]
        for letter, k in (("v", None), ("u", None), ("s", 3)):
            shapes = {layer: (width[layer, site],) if k is None else (k, width[layer, site]) for layer in layers}
            drawn = {layer: torch.randn(shape, generator=g) for layer, shape in shapes.items()}
            found.assets[f"{letter}-{site}"] = AssetData("vector", site, drawn)
        low = {
            layer: {"R": ortho(g, width[layer, site]), "A": torch.randn(2, width[layer, site], generator=g),
                    "b": torch.randn(2, generator=g)}
            for layer in layers
        }  # fmt: skip
        found.assets[f"a-{site}"] = AssetData("affine", site, low)
    found.assets["some"] = AssetData(
        "neurons", "mlp_post", neurons=[(layer, i) for layer, site in where if site == "mlp_post" for i in (0, 5)]
    )
    return found


def ortho(g: torch.Generator, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, 2, generator=g)).Q.T


def run(name: str, *edits: dict[str, Any], ids: list[int] = IDS, prompt: int = PROMPT, **kw: Any) -> Tensor:
    return oracle(name).logprobs(ids, {"interventions": list(edits)}, prompt, **kw)


@cache
def baseline(name: str) -> Tensor:
    return oracle(name).logprobs(IDS, None, PROMPT)


def sites_of(name: str) -> list[str]:
    return [site for site in SITES if oracle(name).assets[f"v-{site}"].layers]


def close(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance)


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2)


# The models


@pytest.mark.parametrize("name", MODELS)
def test_model_generates_and_idle_oracle_is_the_model(name: str) -> None:
    o = oracle(name)
    with torch.no_grad():
        assert torch.equal(o.model(torch.tensor([IDS])).logits[0].log_softmax(-1), baseline(name))
        out = o.model.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False, eos_token_id=VOCAB_SIZE + 1)
    assert o.generate(IDS, None, 6) == out[0, len(IDS) :].tolist()
    spread = baseline(name).std(-1)
    assert spread.min() > 1  # the logits are not flat
    assert baseline(name).max() < -0.01  # nor is one of them everything


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(name))
    text = "What is the capital of France? Très bien, 42!"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) < VOCAB_SIZE == len(tokenizer)
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    turns = [{"role": r, "content": f"Be {r}."} for r in ("system", "user", "assistant", "user")]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|bos|><|system|>Be system.<|end|>")
    assert chat.endswith("<|user|>Be user.<|end|><|assistant|>")


def test_building_is_deterministic(tmp_path: Any) -> None:
    build("gemma3", tmp_path)
    for file in tiny_model("gemma3").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


# The sites


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_the_sum_of_its_parts(name: str) -> None:
    o = oracle(name)
    parallel = name == "gpt_neox"
    seen = o.capture(IDS, [(layer, site) for layer in LAYERS for site in o.sites(layer)])
    hidden = o.model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    for layer in LAYERS:
        assert torch.equal(seen[layer, "resid_pre"], hidden[layer][0])
        if layer + 1 < N_LAYERS:
            assert torch.equal(seen[layer, "resid_post"], seen[layer + 1, "resid_pre"])
        mid = seen[layer, "resid_pre"] + seen[layer, "attn_out"]
        assert close(mid + seen[layer, "mlp_out"], seen[layer, "resid_post"], 1e-5)
        assert parallel or torch.equal(mid, seen[layer, "resid_mid"])
        assert seen[layer, "attn_z"].shape[1] % o.config.num_attention_heads == 0
    assert ("resid_mid" in o.sites(1)) is not parallel
    assert ("mlp_post" in o.sites(1)) is (name not in MOE)
    assert ("mlp_post" in o.sites(0)) is (name != "mixtral")


@pytest.mark.parametrize("name", MODELS)
def test_one_place_by_two_names(name: str) -> None:
    o = oracle(name)
    v = o.assets["v-resid_post"].layers
    o.assets["next"] = AssetData("vector", "resid_pre", {layer + 1: v[layer] for layer in range(N_LAYERS - 1)})
    for op in ({"op": "add"}, {"op": "ablate"}, {"op": "clamp", "min": 0.5}):
        a = run(name, {**op, "vector": "v-resid_post", "layers": "0-2"})
        assert differs(a, baseline(name))
        assert torch.equal(a, run(name, {**op, "vector": "next"}))
    if name != "gpt_neox":  # adding to what attention adds is adding to the stream after it
        a = run(name, {"op": "add", "vector": "v-resid_mid"})
        assert close(a, run(name, {"op": "add", "vector": "v-resid_mid", "site": "attn_out"}))


# The algebra, at every site of every model


@pytest.mark.parametrize("name", MODELS)
def test_zero_strength_is_the_baseline(name: str) -> None:
    for site in sites_of(name):
        v, a = {"vector": f"v-{site}"}, {"affine": f"a-{site}"}
        off: list[dict[str, Any]] = [
            {"op": "add", **v, "scale": 0},
            {"op": "add", **v, "scale": 0, "relative": "norm", "preserve_norm": True},
            {"op": "ablate", "vector": f"s-{site}", "strength": 0},
            {"op": "clamp", **v, "min": -1e9, "max": 1e9},
            {"op": "multiply", **v, "factor": 1},
            {"op": "rotate", **v, "toward": f"u-{site}", "degrees": 0},
            {"op": "rotate", **v, "toward": f"u-{site}", "degrees": 360},
            {"op": "affine", **a, "strength": 0},
        ]
        assert close(run(name, *off), baseline(name)), site
    heads = [[layer, 1] for layer in LAYERS]
    assert close(run(name, {"op": "heads", "heads": heads, "factor": 1}), baseline(name))
    assert close(run(name, {"op": "neurons", "neurons": "some", "mode": "add", "value": 0}), baseline(name))


@pytest.mark.parametrize("name", MODELS)
def test_edits_compose_in_request_order(name: str) -> None:
    for site in sites_of(name):
        v = {"vector": f"v-{site}"}
        once = run(name, {"op": "ablate", "vector": f"s-{site}"})
        assert differs(once, baseline(name)), site
        assert close(run(name, *[{"op": "ablate", "vector": f"s-{site}"}] * 2), once), site
        assert close(run(name, {"op": "add", **v}, {"op": "add", **v, "strength": -1}), baseline(name)), site
        turned = {"op": "rotate", **v, "toward": f"u-{site}"}
        back_and_forth = run(name, {**turned, "degrees": 40}, {**turned, "degrees": -40})
        assert close(back_and_forth, baseline(name)), site
        doubled = run(name, {"op": "multiply", **v, "factor": 2}, {"op": "multiply", **v, "factor": 1.5})
        assert close(doubled, run(name, {"op": "multiply", **v, "factor": 3})), site
        first = run(name, {"op": "add", **v, "scale": 3}, {"op": "clamp", **v, "value": 0})
        assert close(first, run(name, {"op": "ablate", **v})), site
        assert differs(first, run(name, {"op": "clamp", **v, "value": 0}, {"op": "add", **v, "scale": 3})), site


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_changes_nothing_before_it(name: str) -> None:
    for site in sites_of(name):
        layer = min(oracle(name).assets[f"v-{site}"].layers)
        at = {"tokens": {"positions": [4]}, "layers": layer}
        lp = run(name, {"op": "add", "vector": f"v-{site}", "scale": 5, **at})
        # An expert multiplies its tokens in one batch, whose make-up shows in the last bits
        assert close(lp[:4], baseline(name)[:4], 1e-4 if name in MOE else 0), site
        assert (lp[4:] - baseline(name)[4:]).abs().amax(-1).min() > 1e-4, site


@pytest.mark.parametrize("name", MODELS)
def test_captured_effect_of_each_op(name: str) -> None:
    o = oracle(name)
    for site in sites_of(name):
        layer = max(o.assets[f"v-{site}"].layers)
        v, u = (ops.unit(o.assets[f"{letter}-{site}"].layers[layer]) for letter in "vu")
        common = {"vector": f"v-{site}", "layers": [layer], "tokens": "prompt"}

        def effect(spec: dict[str, Any], place: tuple[int, str] = (layer, site), **more: Any) -> tuple[Tensor, Tensor]:
            steering = {"interventions": [{**spec, **more}]}
            before, after = (o.capture(IDS, [place], steering, PROMPT, edited=e)[place] for e in (False, True))
            assert torch.equal(before[PROMPT:], after[PROMPT:])
            return before[:PROMPT], after[:PROMPT]

        x, y = effect({"op": "add", "scale": 2.0, "relative": "norm"}, **common)
        assert torch.allclose((y - x).norm(dim=-1), 2 * x.norm(dim=-1), rtol=1e-4)
        x, y = effect({"op": "ablate"}, **common)
        assert (y @ v).abs().max() < 1e-4 * x.norm(dim=-1).max()
        x, y = effect({"op": "clamp", "min": -0.1, "max": 0.2}, **common)
        assert torch.allclose(y @ v, (x @ v).clamp(-0.1, 0.2), atol=1e-4)
        x, y = effect({"op": "multiply", "factor": -2}, **common, preserve_norm=True)
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-4)
        x, y = effect({"op": "rotate", "toward": f"u-{site}", "degrees": 90}, **common)
        e2 = ops.unit(u - (u @ v) * v)
        assert torch.allclose(y @ e2, x @ v, atol=1e-4)
        assert torch.allclose(y @ v, -(x @ e2), atol=1e-4)
        p = o.assets[f"a-{site}"].layers[layer]
        x, y = effect({"op": "affine", "affine": f"a-{site}", "layers": layer, "tokens": "prompt"})
        assert torch.allclose(y @ p["R"].T, x @ p["A"].T + p["b"], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_neurons(name: str) -> None:
    o = oracle(name)
    n_heads = o.config.num_attention_heads
    where = [(1, "attn_z")]
    z = o.capture(IDS, where)[where[0]].view(len(IDS), n_heads, -1)
    off = o.capture(IDS, where, {"interventions": [{"op": "heads", "heads": [[1, 0]], "factor": 0}]})[where[0]]
    off = off.view_as(z)
    assert off[:, 0].abs().max() == 0
    assert torch.equal(off[:, 1:], z[:, 1:])
    shift = {"op": "heads", "heads": [[1, 1]], "vector": "v-attn_z", "scale": 0.5}
    moved = o.capture(IDS, where, {"interventions": [shift]})[where[0]].view_as(z)
    v = o.assets["v-attn_z"].layers[1].view(n_heads, -1)
    assert close(moved[:, 1], z[:, 1] + 0.5 * v[1], 1e-5)
    assert torch.equal(moved[:, 0], z[:, 0])
    if "mlp_post" in sites_of(name):
        place = (0, "mlp_post")
        a = o.capture(IDS, [place])[place]
        for mode, expected in (("set", 3.0), ("add", a[:, 5] + 3), ("scale", a[:, 5] * 3)):
            edit = {"op": "neurons", "neurons": {"inline": [[0, 5]]}, "mode": mode, "value": 3.0}
            b = o.capture(IDS, [place], {"interventions": [edit]})[place]
            assert close(b[:, 5], torch.as_tensor(expected), 1e-5)
            assert torch.equal(b[:, :5], a[:, :5])


RECIPE: dict[str, Any] = {
    "rr_attn": [0.5, 0.9, 0.2, 0.1], "rr_mlp": [0.1, 0.7, 0.4, 0.3], "lambda_a": 2.0, "lambda_m": 1.5,
    "sources": {"attn": [0, 1], "mlp": [1, 2]}, "targets": {"attn": [1, 2, 3], "mlp": [0, 1, 3]},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_injection(name: str) -> None:
    """Last prompt token and generated ones; norms stay; nothing where no source comes before."""
    o = oracle(name)
    where = [(layer, site) for layer in LAYERS for site in ("attn_out", "mlp_out")]
    spec = {"op": "inject", "recipe": {"inline": RECIPE}}
    before, after = (
        o.capture(IDS, where, {"interventions": [spec]}, PROMPT, edited=edited) for edited in (False, True)
    )
    for layer, site in where:
        x, y = before[layer, site], after[layer, site]
        moved = (x != y).any(-1).nonzero().flatten().tolist()
        receives = (site, layer) in {("attn_out", 1), ("attn_out", 2), ("attn_out", 3), ("mlp_out", 3)}
        assert moved == ([6, 7, 8, 9] if receives else []), (layer, site)
        assert torch.allclose(x.norm(dim=-1), y.norm(dim=-1), rtol=1e-5)
    a, raw = after[2, "attn_out"], [before[layer, "attn_out"] for layer in (0, 1, 2)]
    wanted = raw[2] + 2.0 * (0.5 * raw[0] + 0.9 * raw[1])
    wanted = wanted * (raw[2].norm(dim=-1) / wanted.norm(dim=-1))[:, None]
    assert close(a[6:], wanted[6:], 1e-5)
    assert differs(run(name, spec), baseline(name))
    assert close(run(name, {**spec, "scale": 0.0}), baseline(name), 1e-5)


# Tokens, gates, fields: one model is enough


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", range(10)),
        ("prompt", range(7)),
        ("generated", range(7, 10)),
        ("last_prompt", [6]),
        ({"generated": True, "last": 1}, [6, 7, 8, 9]),
        ({"last": 99}, range(7)),
        ({"positions": [0, -1, -7, -9, 8, 50]}, [0, 6, 8]),
        ({"ranges": [[1, 3], [-2, 8], [5, 2]]}, [1, 2, 5, 6, 7]),
        ({"token_ids": [IDS[2], IDS[9]]}, [2, 9]),
        ({"text": "calm"}, [3, 4]),
        ({"roles": ["user", "system"]}, [1, 2, 5]),
        ({"image": True, "exclude": {"positions": [1]}}, [2]),
        ({"prompt": True, "exclude": {"ranges": [[0, 5]]}}, [5, 6]),
        ({"exclude": {"prompt": True, "positions": [9]}}, [7, 8]),
        ({"prompt": False, "image": False}, []),
        ({"prompt": True, "exclude": "last_prompt"}, range(6)),
    ],
)
def test_token_selection(spec: Any, expected: Any) -> None:
    context = PromptContext(text={"calm": [3, 4]}, roles={"user": [1, 2], "system": [5]}, image=[1, 2])
    assert select(spec, IDS, PROMPT, context).nonzero().flatten().tolist() == list(expected)
    edit = {"op": "add", "vector": "v-mlp_out", "layers": N_LAYERS - 1, "tokens": spec, "scale": 3}
    moved = (run("llama", edit, context=context) != baseline("llama")).any(-1)
    assert moved.nonzero().flatten().tolist() == list(expected)


def edited_at(when: dict[str, Any], layer: int, site: str = "resid_post", ids: list[int] = IDS) -> list[int]:
    """The positions a gated edit changes at its own place."""
    o, place = oracle("llama"), (layer, site)
    edit = {"op": "add", "vector": f"v-{site}", "layers": layer, "when": when}
    pair = [o.capture(ids, [place], {"interventions": [edit]}, PROMPT, edited=e)[place] for e in (False, True)]
    return (pair[0] != pair[1]).any(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("measure", ["cosine", "projection"])
def test_token_gate(measure: str) -> None:
    o = oracle("llama")
    v = ops.unit(o.assets["u-resid_post"].layers[1])
    x = o.capture(IDS, [(1, "resid_post")])[1, "resid_post"]
    value = x @ v / (x.norm(dim=-1) if measure == "cosine" else 1.0)
    middle = float(value.median()) + 1e-4
    when = {"vector": "u-resid_post", "layer": 1, "measure": measure, "over": "token"}
    expected = (value > middle).nonzero().flatten().tolist()
    assert 0 < len(expected) < len(IDS)
    assert edited_at({**when, "above": middle}, 2) == expected
    assert edited_at({**when, "below": middle}, 2) == [p for p in range(len(IDS)) if p not in expected]
    assert edited_at({**when, "above": middle, "below": 1e9}, 2, "resid_mid") == expected
    assert edited_at({**when, "above": middle, "hold": True}, 2) == list(range(expected[0], len(IDS)))
    for layer, site in ((1, "resid_post"), (1, "attn_z"), (0, "resid_post")):
        with pytest.raises(ValueError, match="token gate"):
            edited_at({**when, "above": middle}, layer, site)


@pytest.mark.parametrize("over", ["prompt_mean", "last_prompt"])
def test_request_gate(over: str) -> None:
    o = oracle("llama")
    v = ops.unit(o.assets["u-resid_post"].layers[1])
    x = o.capture(IDS, [(1, "resid_post")])[1, "resid_post"][:PROMPT]
    value = float((x.mean(0) if over == "prompt_mean" else x[-1]) @ v)
    when = {"vector": "u-resid_post", "layer": 1, "measure": "projection", "over": over}
    opened, shut = {**when, "above": value - 1e-3}, {**when, "above": value + 1e-3}
    assert edited_at(opened, 2) == [6, 7, 8, 9]
    assert edited_at(opened, 1, "mlp_out") == edited_at(opened, 1) == [7, 8, 9]  # not later than the gate
    assert edited_at(opened, 0) == [7, 8, 9]
    assert edited_at(shut, 2) == edited_at(shut, 0) == []


def test_gate_reads_before_the_edits_at_its_place_and_after_earlier_ones() -> None:
    o = oracle("llama")
    v = o.assets["v-resid_post"].layers
    when = {"vector": "v-resid_post", "layer": 1, "measure": "projection", "above": 50, "over": "token"}
    gated = {"op": "add", "vector": "u-resid_post", "layers": 3, "when": when}
    push = {"op": "add", "vector": "v-resid_post", "scale": 100 / float(v[1].norm())}
    alone = run("llama", {**push, "layers": 1})
    assert torch.equal(run("llama", {**push, "layers": 1}, gated), alone)
    o.assets["early"] = AssetData("vector", "mlp_out", {1: v[1]})
    earlier = {**push, "vector": "early"}
    assert differs(run("llama", earlier, gated), run("llama", earlier))


def test_generation_takes_the_steered_argmax_at_each_step() -> None:
    o = oracle("llama")
    when = {"vector": "u-resid_post", "layer": 2, "above": -1, "over": "last_prompt"}
    steering = {"interventions": [{"op": "add", "vector": "v-resid_pre", "scale": 2, "layers": 1, "when": when}]}
    out = o.generate(IDS[:PROMPT], steering, 6)
    lp = o.logprobs(IDS[:PROMPT] + out, steering, PROMPT)
    assert lp[PROMPT - 1 : -1].argmax(-1).tolist() == out
    assert out != o.generate(IDS[:PROMPT], None, 6)
    assert o.generate(IDS[:PROMPT], steering, 6, eos_token_id=out[2])[-1] == out[2]


def test_fields() -> None:
    o = oracle("llama")
    v = o.assets["v-resid_post"].layers
    o.assets["two"] = AssetData("vector", "resid_post", {1: v[1], 3: v[3]}, scale=2.0)
    by_default = run("llama", {"op": "add", "vector": "two"})
    for same in (
        {"vector": "two@3fa9c1", "scale": 2},
        {"vector": "two", "strength": 2, "layers": "all"},
        {"vector": "two", "coefficient": 2, "layers": [3, 1], "site": "resid_post", "tokens": "all"},
        {"vector": {"inline": inline(v[1], v[3])}, "scale": 2},
    ):
        assert torch.equal(run("llama", {"op": "add", **same}), by_default)
    assert torch.equal(
        run("llama", {"op": "add", "vector": "v-resid_post", "layers": "1-3"}),
        run("llama", {"op": "add", "vector": "v-resid_post", "layers": [1, 2, 3]}),
    )
    wrong: list[dict[str, Any]] = [
        {"op": "add", "vector": "two", "layers": [2]},
        {"op": "add", "vector": "two", "scales": 2},
        {"op": "add", "vector": "two", "scale": 2, "strength": 2},
        {"op": "add", "vector": "s-resid_post"},
        {"op": "clamp", "vector": "two"},
        {"op": "rotate", "vector": "two", "toward": "two", "degrees": 3},
        {"op": "heads", "heads": [[1, 0]]},
        {"op": "neurons", "neurons": {"inline": [[0, 5], [0, 5]]}, "mode": "add", "value": 1},
        {"op": "add", "vector": "two", "tokens": {"first": 1}},
        {"op": "add", "vector": "two", "when": {"vector": "two", "layer": 1, "over": "prompt_mean"}},
    ]
    for spec in wrong:
        with pytest.raises(ValueError):
            run("llama", spec)
    with pytest.raises(NotImplementedError):
        run("llama", {"op": "graft", "vector": "two"})
    with pytest.raises(ValueError, match="no resid_mid"):
        oracle("gpt_neox").capture(IDS, [(0, "resid_mid")])
    assert math.isclose(float(by_default.exp().sum(-1).mean()), 1, rel_tol=1e-4)


def inline(*rows: Tensor) -> dict[str, Any]:
    stacked = torch.stack(rows)
    data = base64.b64encode(stacked.numpy().tobytes()).decode()
    return {"dtype": "float32", "shape": list(stacked.shape), "layers": [1, 3], "data": data}
