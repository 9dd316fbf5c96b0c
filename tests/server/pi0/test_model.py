"""π0's edits against Transformers with plain hooks on the same weights, in padded batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steersman.steering.errors import InvalidRequest, SteeringError
from steersman.steering.sites import Site
from tests.models.tiny_pi0 import BACKBONE, CHUNK, D_EXPERT, D_FF, D_MODEL, EXPERT, EXPERT_FF, PATCHES, STEPS
from tests.server.pi0.served import Oracle, Station, observation
from tests.steering.library import inline

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
TOKENS = CHUNK + 1
ATTN_Z = 128
LONG = "move the arm forward, then up, then left; close the gripper"


def width(layer: int, site: Site) -> int:
    expert = layer >= BACKBONE
    if site is Site.MLP_POST:
        return EXPERT_FF if expert else D_FF
    return ATTN_Z if site is Site.ATTN_Z else D_EXPERT if expert else D_MODEL


def direction(layer: int, site: Site = Site.RESID_POST, seed: int = 0) -> Tensor:
    return torch.randn(width(layer, site), generator=torch.Generator().manual_seed(100 * seed + layer))


def edit(op: str, layer: int, site: Site = Site.RESID_POST, **fields: Any) -> dict[str, Any]:
    return {"op": op, "vector": inline(direction(layer, site)), "layers": [layer], "site": site.value, **fields}


def asked(*edits: Any, **fields: Any) -> dict[str, Any]:
    return {"interventions": list(edits), **fields}


def added(v: Tensor, x: Tensor) -> Tensor:
    return x + 2 * v


def ablated(v: Tensor, x: Tensor) -> Tensor:
    unit = v / v.norm()
    return x - (x @ unit)[..., None] * unit


def chosen(columns: list[int], value: float, x: Tensor) -> Tensor:
    out = x.clone()
    out[..., columns] = value
    return out


def differs(a: Any, b: Any) -> bool:
    return float(np.abs(a - b).max()) > 1e-2


def test_a_padded_batch_is_transformers_own_sampling(station: Station, oracle: Oracle) -> None:
    seen = [observation(1), observation(2, LONG), observation(3, "go", (10, 40))]
    assert len({len(station.prompt(o).token_ids) for o in seen}) == 3
    for one, (actions, report) in zip(seen, station.batch([(o, None) for o in seen]), strict=True):
        np.testing.assert_allclose(actions, oracle.sample(station.prompt(one)), **CLOSE)
        assert report is None


@pytest.mark.parametrize("site", list(Site))
@pytest.mark.parametrize("layer", [1, BACKBONE + 1])
def test_every_site_of_both_parts(station: Station, oracle: Oracle, layer: int, site: Site) -> None:
    """Beside a longer prompt, which pads it."""
    one, other = observation(4), observation(5, LONG)
    (actions, report), (beside, _) = station.batch([(one, asked(edit("add", layer, site, scale=2.0))), (other, None)])
    prompt = station.prompt(one)
    wanted = oracle.sample(prompt, {(layer, site): partial(added, direction(layer, site))})
    np.testing.assert_allclose(actions, wanted, **CLOSE)
    np.testing.assert_allclose(beside, oracle.sample(station.prompt(other)), **CLOSE)
    assert differs(wanted, oracle.sample(prompt)), "the edit moves nothing, so this shows nothing"
    edited = len(prompt.token_ids) if layer < BACKBONE else STEPS * TOKENS
    assert report["interventions"][0]["tokens"] == edited


def test_ablation_at_prompt_and_action_tokens_of_several_layers(station: Station, oracle: Oracle) -> None:
    places = [(0, Site.RESID_PRE), (1, Site.RESID_MID), (BACKBONE, Site.RESID_PRE), (BACKBONE + 2, Site.RESID_POST)]
    steering = asked(*(edit("ablate", layer, site) for layer, site in places))
    changes = {(layer, site): partial(ablated, direction(layer, site)) for layer, site in places}
    ((actions, _),) = station.batch([(observation(6), steering)])
    prompt = station.prompt(observation(6))
    np.testing.assert_allclose(actions, oracle.sample(prompt, changes), **CLOSE)
    assert differs(actions, oracle.sample(prompt))


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated"])
def test_neurons_by_the_papers_scopes(station: Station, oracle: Oracle, tokens: str) -> None:
    sets = {0: [3, 70], 1: [5], BACKBONE: [7, 8, 79], BACKBONE + 1: [0]}
    named = [[layer, index] for layer, columns in sets.items() for index in columns]
    steering = asked({"op": "neurons", "neurons": {"inline": named}, "mode": "set", "value": 4.0, "tokens": tokens})
    (actions, report), _ = station.batch([(observation(7), steering), (observation(8, LONG), None)])
    prompt = station.prompt(observation(7))
    parts = {"all": sets, "prompt": {0: sets[0], 1: sets[1]}}.get(
        tokens, {k: v for k, v in sets.items() if k >= BACKBONE}
    )
    changes = {(layer, Site.MLP_POST): partial(chosen, columns, 4.0) for layer, columns in parts.items()}
    np.testing.assert_allclose(actions, oracle.sample(prompt, changes), **CLOSE)
    assert differs(actions, oracle.sample(prompt))
    length = len(prompt.token_ids)
    edited = {"all": length + STEPS * TOKENS, "prompt": length, "generated": STEPS * TOKENS}[tokens]
    assert report["interventions"][0]["tokens"] == edited


def test_single_denoising_steps_tokens_and_image_parts(station: Station, oracle: Oracle) -> None:
    prompt = station.prompt(observation(9))
    start = len(prompt.token_ids) + 2 * TOKENS  # of step 2
    for tokens, at, layer in (
        ({"ranges": [[start, start + TOKENS]]}, range(start, start + TOKENS), BACKBONE + 1),
        ({"positions": [start + 3]}, [start + 3], BACKBONE + 1),
        ({"image": 1}, range(PATCHES, 2 * PATCHES), 1),
        ({"image": 0, "box": [0, 0, 9, 28]}, [0, 2], 1),
        ({"text": "red"}, None, 1),
        ("last_prompt", [len(prompt.token_ids) - 1], 1),
    ):
        asking = asked(edit("add", layer, scale=2.0, tokens=tokens), report="tokens")
        ((actions, report),) = station.batch([(observation(9), asking)])
        (sequence,) = report["sequences"]
        (sizes,) = sequence["interventions"]
        told = [p for p, size in zip(sequence["positions"], sizes["relative_norms"], strict=True) if size is not None]
        assert told if at is None else told == list(at)
        wanted = oracle.sample(prompt, {(layer, Site.RESID_POST): partial(added, direction(layer))}, told)
        np.testing.assert_allclose(actions, wanted, **CLOSE)
        assert report["interventions"][0]["tokens"] == len(told)
        assert (actions != oracle.sample(prompt)).any()


def test_neighbours_do_not_change_by_a_bit(station: Station) -> None:
    seen = [observation(i, LONG if i % 2 else "go") for i in range(4)]
    plain = [actions for actions, _ in station.batch([(o, None) for o in seen])]
    strong = asked(edit("add", 0, scale=50.0), edit("add", BACKBONE, scale=50.0))
    mixed = station.batch(
        [(seen[0], strong), (seen[1], None), (seen[2], asked(edit("add", 1, scale=0.0))), (seen[3], None)]
    )
    assert (mixed[0][0] != plain[0]).any()
    for i in (1, 2, 3):
        np.testing.assert_array_equal(mixed[i][0], plain[i])


def test_robots_with_plans_of_their_own_in_one_batch(station: Station, oracle: Oracle) -> None:
    cases = [(observation(20 + i, LONG[: 5 + 7 * i]), i % 2 * BACKBONE + i % 3, float(i)) for i in range(6)]
    found = station.batch([(o, asked(edit("add", layer, scale=scale))) for o, layer, scale in cases])
    for (seen, layer, scale), (actions, _) in zip(cases, found, strict=True):
        v = direction(layer) * scale / 2
        wanted = oracle.sample(station.prompt(seen), {(layer, Site.RESID_POST): partial(added, v)})
        np.testing.assert_allclose(actions, wanted, **CLOSE)


def test_a_gate_over_the_prompt_decides_for_the_expert(station: Station, oracle: Oracle) -> None:
    prompt = station.prompt(observation(30))
    edited = oracle.sample(prompt, {(BACKBONE + 1, Site.RESID_POST): partial(added, direction(BACKBONE + 1))})
    for above, wanted in ((-1e6, edited), (1e6, oracle.sample(prompt))):
        when = {
            "vector": inline(direction(1)),
            "layer": 1,
            "measure": "projection",
            "above": above,
            "over": "prompt_mean",
        }
        ((actions, report),) = station.batch(
            [(observation(30), asked(edit("add", BACKBONE + 1, scale=2.0, when=when)))]
        )
        np.testing.assert_allclose(actions, wanted, **CLOSE)
        assert report["interventions"][0]["gate"]["open"] == [above < 0]


@pytest.mark.parametrize("layer", [1, BACKBONE + 1])
def test_probes_read_every_token_of_their_part(station: Station, layer: int) -> None:
    probe = {"vector": inline(direction(layer)), "layers": [layer]}
    ((_, report),) = station.batch([(observation(31), {"probes": [probe]})])
    length = len(station.prompt(observation(31)).token_ids)
    read = report["probes"][0]["layers"][str(layer)]
    assert read["tokens"] == (length if layer < BACKBONE else STEPS * TOKENS)
    assert read["min"] < read["mean"] < read["max"]


def _when(layer: int, over: str) -> dict[str, Any]:
    return {"vector": inline(direction(layer)), "layer": layer, "measure": "projection", "above": 0.0, "over": over}


@pytest.mark.parametrize(
    ("steering", "param"),
    [
        (asked(edit("add", 1, tokens="generated")), "interventions[0].tokens"),
        (asked(edit("add", BACKBONE, tokens="prompt")), "interventions[0].tokens"),
        (asked(edit("add", BACKBONE, tokens={"last": 1})), "interventions[0].tokens"),
        (asked(edit("add", BACKBONE + 1, when=_when(BACKBONE, "last_prompt"))), "interventions[0].when.layer"),
        (asked(edit("add", BACKBONE + 1, when=_when(1, "token"))), "interventions[0].when.layer"),
        (asked(edit("add", BACKBONE + EXPERT)), "interventions[0]"),
        ({"signals": ["entropy"]}, "signals"),
        ({"probes": [{"vector": inline(direction(k)), "layers": [k]} for k in (1, BACKBONE)]}, "probes"),
    ],
)
def test_what_can_never_happen_is_refused(station: Station, steering: Any, param: str) -> None:
    with pytest.raises(SteeringError) as refused:
        station.batch([(observation(40), steering)])
    assert isinstance(refused.value, InvalidRequest)
    assert (refused.value.param or "").startswith(f"steering.{param}")
