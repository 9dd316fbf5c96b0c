"""Any list of interventions at one place, compiled to one read and one write, does what they do one after another."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.kernels.program import Program
from steersman.kernels.reference import edit
from steersman.steering.plan import Place
from steersman.steering.sites import ModelInfo, Site
from tests.steering import formulas
from tests.steering.library import LAYERS, REF, asset, inline, noise, resolve

HEADS, D_HEAD = 4, 4
D = HEADS * D_HEAD
MODEL = ModelInfo("tiny", "Tiny", LAYERS, D, HEADS, D_HEAD, {site: dict.fromkeys(range(LAYERS), D) for site in Site})
SPOT = Place(1, Site.ATTN_Z)  # where every op may work
GATE = {"vector": inline(noise(D)), "layer": 0, "above": 0}
N = 6  # tokens
FEATURES = 5


def directions(exact: bool, k: int = 1) -> st.SearchStrategy[Tensor]:
    """[k, d]. Exact ones have unit vectors of halves and ones, which float32 holds, and no rounding at all."""
    if not exact:
        return st.integers(0, 10**6).map(lambda seed: noise(k, D, seed=seed))
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4)
    where = st.permutations(range(D)).map(lambda order: order[:4])
    single = st.sampled_from([0, D // 2]).map(lambda i: torch.eye(D)[i])

    def spread(args: tuple[list[float], list[int]]) -> Tensor:
        v = torch.zeros(D)
        v[args[1]] = torch.tensor(args[0])
        return v

    return (st.tuples(signs, where).map(spread) | single).map(lambda v: v[None])


def numbers(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low * 8, high * 8).map(lambda n: n / 8)  # exact in float32


OTHER_SEEDS = st.integers(2 * 10**6, 3 * 10**6)  # than directions() has: never parallel
UNITS = st.lists(st.integers(0, D - 1), min_size=1, max_size=4)


def dictionary(seed: int) -> dict[str, Tensor]:
    """Thresholds are far from what an activation is likely to be, up to float32's rounding."""
    shapes = {"encoder": (FEATURES, D), "decoder": (FEATURES, D), "b_enc": (FEATURES,), "b_dec": (D,)}
    out = {name: noise(*shape, seed=seed + i) / 4 for i, (name, shape) in enumerate(shapes.items())}
    return {**out, "threshold": noise(FEATURES, seed=seed + 9).abs()}


@st.composite
def interventions(draw: st.DrawFn, exact: bool) -> dict[str, Any]:
    """One intervention, with tensors where the request will have inline vectors or an asset."""
    op = draw(st.sampled_from(sorted(set(formulas.OPS) - ({"rotate", "affine", "feature"} if exact else set()))))
    out: dict[str, Any] = {"op": op, "preserve_norm": draw(st.booleans()), "gated": draw(st.booleans())}
    v = draw(directions(exact))[0]
    if op == "add":
        out |= {"vector": v, "scale": draw(numbers(-3, 3))}
        if draw(st.booleans()):
            out |= {"relative": "norm", "scale": draw(numbers(-1, 1))}
    elif op == "ablate":
        k = 1 if exact else draw(st.integers(1, 3))
        out |= {"vector": draw(directions(exact, k)), "strength": draw(numbers(-1, 2))}
    elif op == "clamp":
        low, high = sorted((draw(numbers(-2, 2)), draw(numbers(-2, 2))))
        bounds: list[dict[str, float]] = [{"min": low}, {"max": high}, {"min": low, "max": high}, {"value": low}]
        out |= {"vector": v, **draw(st.sampled_from(bounds))}
    elif op == "multiply":
        out |= {"vector": v, "factor": draw(numbers(-2, 2))}
    elif op == "rotate":
        out |= {"vector": v, "toward": noise(D, seed=draw(OTHER_SEEDS)), "degrees": draw(numbers(-360, 360))}
    elif op == "feature":
        mode = draw(st.sampled_from(["set", "add", "scale", "ablate"]))
        index = draw(st.lists(st.integers(0, FEATURES - 1), min_size=1, max_size=3, unique=True))
        out |= {"dictionary": dictionary(draw(st.integers(0, 1000))), "index": index, "mode": mode}
        out |= {"value": 0.0 if mode == "ablate" else draw(numbers(-2, 2)), "only_if_active": draw(st.booleans())}
    elif op == "neurons":
        mode = draw(st.sampled_from(["set", "add", "scale"]))
        out |= {"neurons": [(1, i) for i in draw(UNITS)], "mode": mode, "value": draw(numbers(-2, 2))}
    elif op == "heads":
        out |= {"heads": [(1, i % HEADS) for i in draw(UNITS)], "d_head": D_HEAD}
        out |= draw(st.sampled_from([{"factor": draw(numbers(-1, 2))}, {"vector": v, "scale": draw(numbers(-2, 2))}]))
    else:
        seed = draw(st.integers(0, 1000))
        maps = {"R": noise(1, 2, D, seed=seed) / 4, "A": noise(1, 2, D, seed=seed + 1) / 4, "b": noise(1, 2)}
        out |= {"affine": maps, "strength": draw(numbers(-1, 1))}
    return out


def compiled(wanted: list[dict[str, Any]]) -> Program:
    """Through the request's schema, the resolver, and the plan's bytes' structures."""
    assets, asked = [], []
    for i, each in enumerate(wanted):
        body = {k: v for k, v in each.items() if k not in ("gated", "d_head")}
        for name in ("vector", "toward"):
            if name in body:
                vectors = torch.atleast_2d(body[name])
                body[name] = inline(vectors[None], [1])
        if each["op"] == "neurons":
            body["neurons"] = {"inline": each["neurons"]}
        elif each["op"] == "affine":
            model = {**REF, "d_model": D}
            assets.append(asset(f"map-{i}", "affine", each["affine"], layers=[1], site="attn_z", model=model))
            body["affine"] = f"map-{i}"
        elif each["op"] == "feature":
            model = {**REF, "d_model": D}
            about = {"layer": 1, "site": "attn_z", "architecture": "jumprelu", "apply_b_dec_to_input": True}
            assets.append(asset(f"sae-{i}", "dictionary", each["dictionary"], model=model, **about))
            body["dictionary"] = f"sae-{i}"
            if each["mode"] == "ablate":
                del body["value"]
        if each["op"] not in ("neurons", "heads", "affine", "feature"):
            body["layers"] = 1
        if each["gated"]:
            body["when"] = GATE
        asked.append({**body, "site": "attn_z"})
    plan = resolve({"interventions": asked}, *assets, model=MODEL)
    assert set(plan.blocks) == {SPOT}
    return Program(plan.blocks[SPOT], D)


def one_after_another(x: Tensor, wanted: list[dict[str, Any]], open_: Tensor) -> tuple[Tensor, Tensor, float]:
    """x', for each row how far a kept norm was stretched at most, and the largest number met.

    An addition in proportion to what is left of a row that others have taken away stretches it as well: its length is
    the root of a difference of large squares.
    """
    stretch, largest = torch.ones(len(x), dtype=torch.float64), float(x.norm(dim=1).max())
    for each in wanted:
        before = x
        bare = formulas.apply(x, {**each, "preserve_norm": False})
        x = formulas.apply(x, each)
        if each["preserve_norm"]:
            stretch = torch.maximum(stretch, before.norm(dim=1) / bare.norm(dim=1).clamp_min(1e-12))
        if each.get("relative") == "norm":
            stretch = torch.where(before.norm(dim=1) < 1e-5 * largest, torch.inf, stretch)
        if each["gated"]:
            x = torch.where(open_[:, None] > 0, x, before)
        largest = max(largest, float(x.norm(dim=1).max()), float(bare.norm(dim=1).max()))
    return x, stretch, largest


def gates_of(program: Program, open_: Tensor) -> Tensor:
    return open_[:, None].expand(-1, 1 + max((b.gate for b in program.blocks), default=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=150, deadline=None)
@given(wanted=st.lists(interventions(exact=False), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_compiled_is_one_after_another(dtype: torch.dtype, wanted: list[dict[str, Any]], seed: int) -> None:
    x = torch.cat([3 * noise(N, D, seed=seed), torch.zeros(1, D)])
    open_ = (noise(N + 1, seed=seed + 1) > 0).double()
    want, stretch, largest = one_after_another(x.double(), wanted, open_)
    program = compiled(wanted)
    got = x.to(dtype) + edit(x.to(dtype), program, gates_of(program, open_))
    # A norm restored from next to nothing is made of rounding errors, in any arithmetic.
    fair = stretch < 30
    tolerance = largest * (3e-5 if dtype is torch.float64 else 3e-4)  # rows are stored in float32
    torch.testing.assert_close(got[fair].double(), want[fair], rtol=0, atol=tolerance)
    assert torch.isfinite(got).all()


@settings(max_examples=200, deadline=None)
@given(wanted=st.lists(interventions(exact=True), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_where_float32_holds_the_rows_there_is_no_difference(wanted: list[dict[str, Any]], seed: int) -> None:
    x = 3 * noise(N, D, seed=seed).double()
    open_ = (noise(N, seed=seed + 1) > 0).double()
    want, stretch, largest = one_after_another(x, wanted, open_)
    program = compiled(wanted)
    got = x + edit(x, program, gates_of(program, open_))
    fair = stretch < 30
    torch.testing.assert_close(got[fair], want[fair], rtol=0, atol=1e-9 * largest)


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(interventions(exact=False), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(wanted: list[dict[str, Any]], seed: int) -> None:
    x, program = noise(N, D, seed=seed), compiled(wanted)
    gates = gates_of(program, torch.ones(N))
    whole = edit(x, program, gates)
    for i in range(N):
        assert torch.equal(edit(x[i : i + 1], program, gates[:1]), whole[i : i + 1])
    assert torch.equal(edit(x.flip(0), program, gates), whole.flip(0))


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(interventions(exact=False), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_the_sizes_of_edits_are_those_of_each_alone(wanted: list[dict[str, Any]], seed: int) -> None:
    x = 3 * noise(N, D, seed=seed).double()
    program = compiled(wanted)
    norms = torch.empty(N, len(wanted), dtype=torch.float64)
    edit(x, program, gates_of(program, torch.ones(N)), norms)
    now, fair, largest = x, torch.ones(N, dtype=torch.bool), 1.0
    for i, each in enumerate(wanted):
        new, stretch, here = one_after_another(now, [each], torch.ones(N))
        fair, largest = fair & (stretch < 30), max(largest, here)
        # a difference of two large numbers: its square is exact to float32's rounding of the rows
        torch.testing.assert_close(norms[fair, i], (new - now).norm(dim=1)[fair], rtol=1e-3, atol=3e-3 * largest)
        now = new
