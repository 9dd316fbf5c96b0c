"""Features whose activation takes the whole encoder: against the libraries' own activations, and by way of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.kernels.cpu import Table
from steersman.kernels.program import Program
from steersman.kernels.reference import edit
from steersman.kernels.tables import supports
from steersman.steering import dictionaries, lower
from steersman.steering import encoders as module
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.encoders import Encoder, FeatureEncode
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.steering.library import D, asset, noise, resolve
from tests.steering.saes import EXPECTED, load

WHOLE = ["topk", "topk_rescaled", "matching_pursuit", "constant_norm", "layers.2", "dl_topk", "v5_topk"]
PARITY = {"rtol": 0, "atol": 1e-4}
CHOSEN = [17, 3, 11, 2]


def bound(asset: Asset, indices: list[int]) -> FeatureEncode:
    found = FeatureEncode.of(asset, indices)
    found.encoder = found.load(asset, torch.device("cpu"))
    return found


def block_of(asset: Asset, mode: str, value: float, only_if_active: bool = False) -> Any:
    meta = dictionaries.dictionary(asset)
    write, relative = dictionaries.writes(asset, CHOSEN), dictionaries.writes_by_norm(meta)
    return lower.feature(0, write, None, mode, [value] * 4, only_if_active, relative, bound(asset, CHOSEN))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    ("mode", "value", "change"),
    [
        ("set", 3.0, lambda a: torch.full_like(a, 3.0)),
        ("add", -1.5, lambda a: a - 1.5),
        ("scale", 2.5, lambda a: a * 2.5),
        ("ablate", 0.0, torch.zeros_like),
    ],
)
@pytest.mark.parametrize("only_if_active", [False, True])
def test_an_edit_is_the_librarys_decode_of_changed_activations_with_the_error_kept(
    name: str, mode: str, value: float, change: Any, only_if_active: bool, tmp_path: Path
) -> None:
    """x′ = decode(a′) + (x − decode(a)), the activations being those that the library itself computed."""
    found = load(name, tmp_path)
    x, acts, out = (EXPECTED[f"{name}.{part}"] for part in ("x", "acts", "out"))
    after = acts.clone()
    after[:, CHOSEN] = change(acts[:, CHOSEN])
    if only_if_active:
        after = torch.where(acts > 0, after, acts)
    want = dictionaries.decode(found, after, x) + (x - out)
    got = x + edit(x, Program((block_of(found, mode, value, only_if_active),), x.shape[1]))
    torch.testing.assert_close(got, want, **PARITY)
    assert float((want - x).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["topk", "matching_pursuit"])
def test_it_reads_the_stream_as_it_is_by_then(name: str, tmp_path: Path) -> None:
    """Two blocks one after another are two edits one after another, the second encoding what the first has made."""
    found, x = load(name, tmp_path), EXPECTED[f"{name}.x"]
    push = lower.add(0, noise(x.shape[1], seed=5), 3.0, False)
    both = Program((push, block_of(found, "scale", -2.0)), x.shape[1])
    pushed = x + edit(x, Program((push,), x.shape[1]))
    want = pushed + edit(pushed, Program((block_of(found, "scale", -2.0),), x.shape[1]))
    alone = x + edit(x, both)
    torch.testing.assert_close(alone, want, **PARITY)
    unmoved = pushed + edit(x, Program((block_of(found, "scale", -2.0),), x.shape[1]))
    assert float((want - unmoved).abs().max()) > 0.1


def sae(architecture: str, **fields: Any) -> Asset:
    tensors = {"decoder": torch.nn.functional.normalize(noise(7, D, seed=1)), "b_dec": noise(D, seed=2)}
    if architecture == "topk":
        tensors |= {"encoder": noise(7, D, seed=3), "b_enc": noise(7, seed=4)}
    return asset("sae", "dictionary", tensors, layer=2, architecture=architecture, apply_b_dec_to_input=True, **fields)


TOPK, PURSUIT = sae("topk", k=2), sae("matching_pursuit", max_iterations=3)
FEATURE = {"op": "feature", "dictionary": "sae", "index": [4, 1], "value": 3.0}


@pytest.mark.parametrize("found", [TOPK, PURSUIT], ids=["topk", "matching_pursuit"])
def test_a_plan_names_the_dictionary_and_says_what_it_costs(found: Asset) -> None:
    plan = resolve({"interventions": [FEATURE]}, found)
    [(place, use, encode)] = plan.encodes
    rounds, matrix = (1, "encoder") if found is TOPK else (3, "decoder")
    numbers = found.tensors["b_enc"].nbytes if found is TOPK else 0
    assert (place, use) == (Place(2, Site.RESID_POST), "edit")
    assert encode.cost() == {
        "dictionary": found.ref,
        "features": 7,
        "multiply_adds_per_token": rounds * 7 * D,
        "bytes_per_worker": found.tensors[matrix].nbytes + found.tensors["b_dec"].nbytes + numbers,
    }
    again = Plan.from_bytes(plan.to_bytes())
    assert again.id == plan.id
    assert [e.encode for e in again.encodes] == [encode]
    held = Encoder.of(found)
    assert sum(t.nbytes for t in held.tensors.values()) == encode.nbytes
    with pytest.raises(RuntimeError, match="has not been loaded"):
        again.encodes[0].encode(torch.zeros(1, D))


def test_another_dictionary_is_another_plan() -> None:
    """A plan's id keys the prefix cache, so it must tell encoders apart where all else is the same."""
    tensors: dict[str, Tensor] = {**TOPK.tensors, "encoder": noise(7, D, seed=9)}
    other = asset("sae", "dictionary", tensors, layer=2, architecture="topk", k=2, apply_b_dec_to_input=True)
    plans = [resolve({"interventions": [FEATURE]}, found) for found in (TOPK, other)]
    assert plans[0].id != plans[1].id


def test_only_the_reference_runs_it() -> None:
    [[block]] = resolve({"interventions": [FEATURE]}, TOPK).blocks.values()
    program = Program((block,), D)
    assert program.encodes
    assert program.constant is None
    assert not supports(program)
    assert not Table.supports(program)
    with pytest.raises(ValueError, match="for the reference"):
        Table.build([(program, torch.arange(2))], D)


@pytest.mark.parametrize("mode", ["set", "scale"])
@pytest.mark.parametrize("name", ["topk", "matching_pursuit", "constant_norm"])
def test_shards_encode_what_they_have_together(name: str, mode: str, tmp_path: Path) -> None:
    """Two ranks, one after the other: what each sends is what the other's half comes to there."""
    found, x = load(name, tmp_path), EXPECTED[f"{name}.x"]
    d = x.shape[1]
    cut = d // 2 + 1
    push = lower.add(0, noise(d, seed=5), 3.0, False)
    program = Program((push, block_of(found, mode, 2.0)), d)
    halves = [(slice(0, cut), program.shard(0, cut)), (slice(cut, d), program.shard(cut, d))]
    sent: list[list[Tensor]] = [[], []]

    def run(rank: int, others: list[Tensor]) -> Tensor:
        got: list[Tensor] = []

        def reduce(partial: Tensor) -> Tensor:
            got.append(partial.clone())
            return partial + others[len(got) - 1] if others else partial

        half, part = halves[rank]
        out = edit(x[:, half], part, reduce=reduce)
        sent[rank] = got
        return out

    for rank in (0, 1):  # the sums that the first block needs, then those of the second, which depend on them
        run(rank, [])
    for _ in range(len(sent[0])):
        first, second = sent
        parts = [run(0, second), run(1, first)]
    want = edit(x, program)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-5, atol=1e-5)
    assert float(want.abs().max()) > 0.1


# -- a row by itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [31, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [
    {"architecture": "topk", "k": 5},
    {"architecture": "matching_pursuit", "max_iterations": 6},
    {"architecture": "gated", "normalize": "constant_norm_rescale"},
    {"architecture": "standard", "normalize": "layer_norm"},
], ids=lambda f: f["architecture"])  # fmt: skip
def test_a_row_is_encoded_to_the_same_bits_whatever_it_is_beside(
    fields: dict[str, Any], dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, at any place among any number of others, and in parts; features of equal rows are not told apart else."""
    features = 1003
    rows = noise(features, width, seed=1)
    rows[500:900] = rows[100:500] * (1 + 2**-22 * torch.arange(400)[:, None])  # nearly equal, and some equal
    parts = {"decoder": torch.nn.functional.normalize(rows), "b_dec": noise(width, seed=2)}
    if fields["architecture"] != "matching_pursuit":
        parts["encoder"] = rows
    if fields["architecture"] == "gated":
        parts |= {name: noise(features, seed=i) / 4 for i, name in enumerate(("b_gate", "b_mag", "r_mag"))}
    elif "encoder" in parts:
        parts["b_enc"] = torch.zeros(features)
    tensors = {name: part.to(dtype) for name, part in parts.items()}
    model = {"id": "org/wide", "n_layers": 4, "d_model": width}
    about = {"name": "wide", "kind": "dictionary", "model": model, "layer": 1, "apply_b_dec_to_input": True}
    found = Asset(parse_metadata({**about, **fields}), tensors)
    encode = bound(found, list(range(features)))
    x = 3 * noise(37, width, seed=3)
    together = encode(x)
    assert 0 < int((together != 0).sum()) < together.numel()
    for at in range(0, 37, 6):
        assert torch.equal(encode(x[at : at + 1])[0], together[at]), at
    for a, b in ((0, 2), (3, 10), (1, 37), (20, 33)):
        assert torch.equal(encode(x[a:b]), together[a:b])
    assert torch.equal(encode(x.flip(0)).flip(0), together)
    monkeypatch.setattr(module, "AT_ONCE", 5 * features)
    assert torch.equal(encode(x), together)


def test_near_ties_are_decided_by_the_exact_sums() -> None:
    """Of features that a plain product cannot tell apart, topk takes those that are larger by less than its error."""
    width, features, k = 64, 40, 7
    row, order = noise(width, seed=1), torch.randperm(features, generator=torch.Generator().manual_seed(2))
    steps = order.double() * 2.0**-36
    bias = torch.zeros(features)
    encoder = row.repeat(features, 1)
    encoder[:, 0] = 2.0**-30 * order  # times an x of 2^-6 there: far below what the other 63 products leave of float32
    tensors = {"decoder": encoder, "encoder": encoder, "b_enc": bias, "b_dec": torch.zeros(width)}
    about = {"name": "ties", "kind": "dictionary", "model": {"id": "o/m", "n_layers": 4, "d_model": width}, "layer": 1}
    found = Asset(parse_metadata({**about, "architecture": "topk", "k": k}), tensors)
    x = row.clone()
    x[0] = 2.0**-6
    plain = x @ encoder.T
    assert float(plain.max() - plain.min()) < 1e-4 * float(plain.max())
    assert float(steps.max()) < torch.finfo(torch.float32).eps
    active = bound(found, list(range(features)))(x[None])[0] > 0
    assert torch.equal(active, steps >= steps.sort(descending=True).values[k - 1])
