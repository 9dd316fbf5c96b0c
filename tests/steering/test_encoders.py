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
from steersman.steering.assets import Asset
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
    found.encoder = Encoder.of(asset)
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
    [(place, encode)] = plan.encodes
    rounds, matrix = (1, "encoder") if found is TOPK else (3, "decoder")
    numbers = found.tensors["b_enc"].nbytes if found is TOPK else 0
    assert place == Place(2, Site.RESID_POST)
    assert encode.cost() == {
        "dictionary": found.ref,
        "features": 7,
        "multiply_adds_per_token": rounds * 7 * D,
        "bytes_per_worker": found.tensors[matrix].nbytes + found.tensors["b_dec"].nbytes + numbers,
    }
    again = Plan.from_bytes(plan.to_bytes())
    assert again.id == plan.id
    assert [e for _, e in again.encodes] == [encode]
    held = Encoder.of(found)
    assert sum(t.nbytes for t in held.tensors.values()) == encode.nbytes
    with pytest.raises(RuntimeError, match="has not been loaded"):
        again.encodes[0][1](torch.zeros(1, D))


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
    with pytest.raises(ValueError, match="the whole of x"):
        program.shard(0, D // 2)
