import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.kernels.program import Block, Program
from steersman.kernels.reference import edit
from steersman.steering import lower
from steersman.steering.errors import InvalidRequest, NonFinite
from tests.steering import formulas
from tests.steering.library import noise

D = 12
V, W = noise(2, D)
PLANE = noise(3, D, seed=1)
X = noise(7, D, seed=2).double()
MAP = {"R": noise(1, 2, D), "A": noise(1, 2, D, seed=1), "b": noise(1, 2)}


def after(*blocks: Block, x: Tensor = X, gates: Tensor | None = None) -> Tensor:
    return x + edit(x, Program(blocks, x.shape[1]), gates)


CASES: list[tuple[Block, dict[str, Any]]] = [
    (lower.add(0, V, -2.5, False), {"op": "add", "vector": V, "scale": -2.5}),
    (lower.add(0, V, 0.3, True), {"op": "add", "vector": V, "scale": 0.3, "relative": "norm"}),
    (lower.ablate(0, V[None], 1.0), {"op": "ablate", "vector": V, "strength": 1}),
    (lower.ablate(0, PLANE, 0.5), {"op": "ablate", "vector": PLANE, "strength": 0.5}),
    (lower.ablate(0, torch.cat([PLANE, PLANE]), 1.0), {"op": "ablate", "vector": PLANE, "strength": 1}),
    (lower.clamp(0, V, -0.5, 0.5), {"op": "clamp", "vector": V, "min": -0.5, "max": 0.5}),
    (lower.clamp(0, V, None, 0.5), {"op": "clamp", "vector": V, "max": 0.5}),
    (lower.clamp(0, V, 0.5, None), {"op": "clamp", "vector": V, "min": 0.5}),
    (lower.clamp(0, V, 4.0, 4.0), {"op": "clamp", "vector": V, "value": 4}),
    (lower.multiply(0, V, -1.0), {"op": "multiply", "vector": V, "factor": -1}),
    (lower.rotate(0, V, W, 33.0), {"op": "rotate", "vector": V, "toward": W, "degrees": 33}),
    (lower.rotate(0, V, W, -450.0), {"op": "rotate", "vector": V, "toward": W, "degrees": -90}),
    *(
        (
            lower.neurons(0, torch.tensor([3, 0]), D, mode, 1.5),
            {"op": "neurons", "neurons": [(0, 0), (0, 3)], "mode": mode, "value": 1.5},
        )
        for mode in ("set", "add", "scale")
    ),
    (lower.heads_factor(0, [1], 4, D, 0.0), {"op": "heads", "heads": [(0, 1)], "d_head": 4, "factor": 0}),
    (
        lower.heads_add(0, [0, 2], 4, V, 2.0),
        {"op": "heads", "heads": [(0, 0), (0, 2)], "d_head": 4, "vector": V, "scale": 2},
    ),
    (
        lower.affine(0, MAP["R"][0], MAP["A"][0], MAP["b"][0], 0.5),
        {"op": "affine", "affine": MAP, "strength": 0.5},
    ),
]


@pytest.mark.parametrize(("block", "given"), CASES)
def test_a_block_does_what_the_formula_says(block: Block, given: dict[str, Any]) -> None:
    want = formulas.apply(X, given)
    torch.testing.assert_close(after(block), want, rtol=0, atol=1e-5)  # rows are stored in float32
    single = after(block, x=X.float())
    torch.testing.assert_close(single.double(), want, rtol=0, atol=1e-5)


def test_zero_strength_changes_nothing() -> None:
    for block in (
        lower.add(0, V, 0.0, False),
        lower.add(0, V, 0.0, True),
        lower.ablate(0, PLANE, 0.0),
        lower.multiply(0, V, 1.0),
        lower.rotate(0, V, W, 0.0),
        lower.rotate(0, V, W, 360.0),
        lower.affine(0, MAP["R"][0], MAP["A"][0], MAP["b"][0], 0.0),
        lower.neurons(0, torch.tensor([1]), D, "scale", 1.0),
    ):
        assert torch.equal(after(block), X)


def test_a_vector_and_then_its_negative_cancel() -> None:
    torch.testing.assert_close(after(lower.add(0, V, 3.0, False), lower.add(1, V, -3.0, False)), X)


def test_ablating_twice_is_ablating_once() -> None:
    once, twice = after(lower.ablate(0, PLANE, 1.0)), after(lower.ablate(0, PLANE, 1.0), lower.ablate(1, PLANE, 1.0))
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-5)
    torch.testing.assert_close(once @ PLANE.double().T, torch.zeros(7, 3).double(), rtol=0, atol=1e-5)


def test_rotating_there_and_back() -> None:
    torch.testing.assert_close(after(lower.rotate(0, V, W, 70), lower.rotate(1, V, W, -70)), X, rtol=0, atol=1e-5)
    torch.testing.assert_close(after(lower.rotate(0, V, W, 70), lower.rotate(1, W, V, 70)), X, rtol=0, atol=1e-5)
    half = after(lower.rotate(0, V, W, 180))
    torch.testing.assert_close(half @ V.double(), -X @ V.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(half.norm(dim=1), X.norm(dim=1), rtol=1e-6, atol=0)


def test_quarter_turns_are_exact() -> None:
    e1, e2 = torch.eye(D)[:2]
    turned = after(lower.rotate(0, e1, e2, 90.0))
    assert torch.equal(turned[:, :2], torch.stack([-X[:, 1], X[:, 0]], 1))
    assert torch.equal(turned[:, 2:], X[:, 2:])


def test_a_gate_is_one_or_nothing() -> None:
    block = lower.ablate(0, PLANE, 1.0, gate=1)
    gates = torch.stack([torch.ones(7), torch.arange(7) % 2], 1)
    out, whole = after(block, gates=gates), after(lower.ablate(0, PLANE, 1.0))
    assert torch.equal(out[1::2], whole[1::2])
    assert torch.equal(out[::2], X[::2])
    norms = after(lower.add(0, V, 1.0, True, gate=0, preserve_norm=True), gates=torch.zeros(7, 1))
    assert torch.equal(norms, X)


def test_norms_are_kept_also_of_nothing() -> None:
    x = torch.cat([X, torch.zeros(1, D).double()])
    out = after(lower.add(0, V, 5.0, False, preserve_norm=True), x=x)
    torch.testing.assert_close(out.norm(dim=1), x.norm(dim=1), rtol=1e-6, atol=0)
    assert not out[-1].any()
    parallel = V.double()[None].expand(2, D)
    gone = after(lower.clamp(0, V, 0.0, 0.0, preserve_norm=True), x=parallel)
    assert torch.isfinite(gone).all()


def test_extreme_directions() -> None:
    for scale in (1e-30, 1e18):
        torch.testing.assert_close(lower.unit(V * scale), lower.unit(V))
        torch.testing.assert_close(lower.orthonormal(PLANE * scale).abs(), lower.orthonormal(PLANE).abs())
    assert float(lower.unit(torch.full((D,), 3e38)).norm()) == pytest.approx(1)
    with pytest.raises(NonFinite):
        lower.add(0, torch.full((D,), 3e38), 2.0, False)


def test_a_basis_is_orthonormal_and_of_the_right_rank() -> None:
    dependent = torch.cat([PLANE, PLANE[:1] + PLANE[1:2]])
    basis = lower.orthonormal(dependent)
    assert basis.shape == (3, D)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [lower.unit, lambda v: lower.orthonormal(v[None]), lambda v: lower.rotate(0, v, V, 1)])
def test_no_direction(make: Any) -> None:
    with pytest.raises(InvalidRequest, match="no direction"):
        make(torch.zeros(D))


@pytest.mark.parametrize("toward", [V, -V, 2 * V, V * (1 + 1e-8), torch.zeros(D)])
def test_no_plane(toward: Tensor) -> None:
    with pytest.raises(InvalidRequest, match="parallel"):
        lower.rotate(0, V, toward, 30)


def test_setting_neurons_is_exact_where_numbers_are_alike() -> None:
    x = noise(3, D)
    out = x + edit(x, Program((lower.neurons(0, torch.tensor([2]), D, "set", 0.0),), D))
    assert not out[:, 2].any()
    assert torch.equal(out[:, 3:], x[:, 3:])
    zeroed = x + edit(x, Program((lower.heads_factor(0, [0], 6, D, 0.0),), D))
    assert not zeroed[:, :6].any()


def test_degrees_are_degrees() -> None:
    out = after(lower.rotate(0, V, W, 60), x=V.double()[None])
    cosine = float(out[0] @ V.double() / (out[0].norm() * V.double().norm()))
    assert cosine == pytest.approx(math.cos(math.radians(60)), abs=1e-6)
    assert float(out[0] @ formulas.unit(W)) > float(V.double() @ formulas.unit(W))
