"""Wrappers are on a model's modules only for passes that want what they touch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steersman.server.engine import hooks
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from tests.server.engine.layered import Llama, Model, PreNorm, one_rank
from tests.server.engine.plans import add
from tests.server.engine.test_device import on_device
from tests.server.engine.toy import args
from tests.steering.library import D, noise, plan_of

PROMPT = [3, 5, 9, 4]


@pytest.fixture(autouse=True, scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from one_rank(tmp_path_factory.mktemp("group"))


def hooked(layer: type[Llama]) -> tuple[Model, Runtime]:
    model, runtime = Model(layer), Runtime()
    hooks.install(enumerate(model.layers), D, runtime)
    return model, runtime


def run(model: Model, runtime: Runtime, steered: bool) -> Tensor:
    runtime.begin([Scheduled("r" if steered else "other", 0, 0, 4)], lambda row, count: np.zeros(count, np.int64))
    try:
        with torch.inference_mode():
            return model(noise(4, D))
    finally:
        runtime.end()


def wrapped(model: Model) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.mark.parametrize(
    ("layer", "site", "needed"),
    [
        (Llama, "resid_post", {""}),
        (Llama, "resid_pre", {""}),
        (Llama, "resid_mid", {"mid_norm"}),
        (Llama, "attn_out", {"self_attn"}),
        (Llama, "mlp_out", {"mlp"}),
        (PreNorm, "resid_mid", {"", "self_attn"}),
    ],
)
def test_a_pass_runs_the_wrappers_that_it_needs(layer: type[Llama], site: str, needed: set[str]) -> None:
    stock = Model(layer)
    with torch.inference_mode():
        want = stock(noise(4, D))
    model, runtime = hooked(layer)
    plan = plan_of(add(0, [1, 3], site=site))
    runtime.plans.add(plan.to_bytes(), "http")
    runtime.add_request("r", args(plan, PROMPT, "r"))
    for _ in range(2):
        assert torch.equal(run(model, runtime, steered=False), want)
        assert wrapped(model) == set()
        moved = run(model, runtime, steered=True)
        assert wrapped(model) == {f"layers.{i}.{name}".rstrip(".") for i in (1, 3) for name in needed}
        assert not torch.equal(moved, want)
    with torch.inference_mode():
        assert torch.equal(model(noise(4, D)), want), "outside of a pass nothing is edited"


def test_a_forward_of_a_module_s_own_comes_back() -> None:
    model = Model(Llama)
    own = model.layers[1].self_attn.forward
    model.layers[1].self_attn.__dict__["forward"] = own
    runtime = Runtime()
    hooks.install(enumerate(model.layers), D, runtime)
    place = Place(1, Site.ATTN_OUT)
    assert runtime.switch is not None
    runtime.switch(())
    assert model.layers[1].self_attn.__dict__["forward"] is own
    runtime.switch({place})
    assert model.layers[1].self_attn.__dict__["forward"] is not own
    runtime.switch(())
    assert wrapped(model) == {"layers.1.self_attn"}


def test_what_a_graph_captures_has_its_wrappers() -> None:
    """Graphs of an eager model are captured outside of any pass."""
    runtime, seen = on_device(), list[Any]()
    runtime.switch = lambda wanted: seen.append(set(wanted))
    with runtime.capturing({Site.RESID_POST}):
        assert seen == [runtime.wanted]
