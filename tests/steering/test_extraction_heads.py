"""Heads that were planted are found, and the edit that comes of it is the paper's, on a real forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.steering.assets import Asset, ProfileMeta, VectorMeta
from steersman.steering.extraction_heads import HeadDirections, find_heads, head_assets
from tests.steering import planned
from tests.steering.foreign import LAYERS, MODEL, D, expected, model
from tests.steering.library import noise

N, L, H, E = 50, 3, 4, 6
LAYER_NAMES = (2, 5, 9)
PLANTED = ((5, 1), (9, 3))


def planted(gap: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """States in which two heads tell the classes apart, the second less well, and their unit directions [2, E]."""
    positive, negative = noise(N, L, H, E), noise(N - 8, L, H, E, seed=1)
    v = torch.nn.functional.normalize(noise(2, E, seed=2), dim=1)
    for i, (layer, head) in enumerate(PLANTED):
        positive[:, LAYER_NAMES.index(layer), head] += gap / (i + 1) * v[i]
    return positive, negative, v


def find(**changed: Any) -> HeadDirections:
    positive, negative, _ = planted()
    return find_heads(positive, negative, LAYER_NAMES, **{"k": 2, **changed})


@pytest.mark.parametrize("direction", ["means", "probe"])
def test_the_planted_heads_and_their_directions_are_found(direction: Any) -> None:
    _, _, v = planted()
    found = find(direction=direction)
    assert set(found.heads) == set(PLANTED)
    for i, (layer, head) in enumerate(PLANTED):
        part = found.vectors.view(L, H, E)[LAYER_NAMES.index(layer), head]
        assert torch.nn.functional.cosine_similarity(part, v[i], dim=0) > 0.85


def test_the_best_head_is_first_and_chance_is_half() -> None:
    found = find(k=L * H, held_out=0.4)
    assert found.heads[0] == PLANTED[0]
    ranked = [float(found.accuracy[LAYER_NAMES.index(layer), head]) for layer, head in found.heads]
    assert ranked == sorted(ranked, reverse=True)
    assert ranked[0] > 0.9
    others = [a for pair, a in zip(found.heads, ranked, strict=True) if pair not in PLANTED]
    assert abs(sum(others) / len(others) - 0.5) < 0.1


def test_accuracy_is_of_examples_that_the_probe_did_not_see() -> None:
    """With as many coordinates as examples a probe is always right about what it saw."""
    found = find_heads(noise(20, 1, 40, 30), noise(20, 1, 40, 30, seed=1), [0], 1, held_out=0.5, l2=1e-3)
    assert abs(float(found.accuracy.mean()) - 0.5) < 0.08


def test_the_length_is_the_spread_of_every_example_along_it() -> None:
    positive, negative, _ = planted()
    found = find()
    for layer, head in found.heads:
        row = LAYER_NAMES.index(layer)
        part = found.vectors.view(L, H, E)[row, head]
        theta = positive[:, row, head].mean(0) - negative[:, row, head].mean(0)
        along = torch.cat([positive, negative])[:, row, head] @ (theta / theta.norm())
        torch.testing.assert_close(part, along.std(correction=0) * theta / theta.norm(), rtol=1e-4, atol=1e-6)


def test_only_the_chosen_heads_are_touched() -> None:
    found = find(k=1)
    nonzero = found.vectors.view(L, H, E).abs().sum(-1).nonzero().tolist()
    assert [(LAYER_NAMES[row], head) for row, head in nonzero] == list(found.heads)


def test_the_seed_alone_decides_which_examples_are_held_out() -> None:
    assert torch.equal(find().accuracy, find().accuracy)
    assert not torch.equal(find(seed=1).accuracy, find().accuracy)
    assert torch.equal(find(seed=1, k=L * H).vectors, find(k=L * H).vectors)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 13}, "12 heads"),
        ({"held_out": 0.0}, "held_out"),
        ({"held_out": 1.0}, "held_out"),
        ({"layers": (1, 2)}, "layers"),
        ({"layers": (2, 1, 3)}, "ascending"),
        ({"negative": torch.zeros(4, L, H, E + 1)}, "states"),
        ({"negative": torch.zeros(1, L, H, E)}, "2 examples"),
        ({"negative": torch.full((4, L, H, E), torch.nan)}, "NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any], match: str) -> None:
    positive, negative, _ = planted()
    given = {"positive": positive, "negative": negative, "layers": LAYER_NAMES, "k": 2, **changed}
    with pytest.raises(ValueError, match=match):
        find_heads(**given)


def test_a_head_without_a_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="do not differ"):
        find_heads(torch.zeros(4, 1, 1, 2), torch.zeros(4, 1, 1, 2), [0], 1)


# -- the assets -----------------------------------------------------------------------------------------

HEADS, WIDTH, ALPHA = 2, D // 2, 3.0


def assets() -> tuple[Asset, Asset]:
    positive, negative = noise(12, LAYERS, HEADS, WIDTH), noise(12, LAYERS, HEADS, WIDTH, seed=1)
    positive[:, 1, 0] += 3
    positive[:, 3, 1] -= 3
    found = find_heads(positive, negative, range(LAYERS), 2)
    assert set(found.heads) == {(1, 0), (3, 1)}
    vector, profile = head_assets(found, "honest", MODEL, ALPHA, licence="MIT")
    return vector, profile


def test_the_profile_names_the_vector_and_the_tokens() -> None:
    vector, profile = assets()
    assert isinstance(vector.meta, VectorMeta)
    assert isinstance(profile.meta, ProfileMeta)
    assert (vector.name, vector.meta.site, vector.meta.layers) == ("honest-heads", "attn_z", (1, 3))
    assert vector.tensors["vectors"].shape == (2, D)
    (edit,) = profile.meta.steering["interventions"]
    assert edit["vector"] == vector.ref
    assert edit["tokens"] == {"generated": True, "last": 1}
    assert profile.meta.licence == vector.meta.licence == "MIT"


def test_the_profiles_edit_is_the_papers() -> None:
    """z_h + α·σ_h·θ̂_h at the input of o_proj, by a hook of our own and by the plan."""
    vector, profile = assets()
    edit = {**profile.meta.steering["interventions"][0], "vector": vector.name}  # type: ignore[union-attr]
    ids, net = expected()["ids"], model()

    def hook(row: Tensor) -> Any:
        return lambda _module, args: (args[0] + ALPHA * row, *args[1:])

    handles = [
        net.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook(row))
        for layer, row in zip((1, 3), vector.tensors["vectors"], strict=True)
    ]
    with torch.inference_mode():
        wanted = net(input_ids=ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    got = planned.logits(net, ids, {"interventions": [edit]}, vector)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - expected()["logits.plain"]).abs().max() > 0.1
