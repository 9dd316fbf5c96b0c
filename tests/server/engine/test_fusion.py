"""Passes whose edits are fused with the norms after them give every row the bits of passes that are not.

The model has vLLM's own norms and the projections that sites are found by; the kernel is plain torch.
"""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from steersman.kernels.norms import DEFINED, Form, add_and_norm
from steersman.server.engine import hooks, norms, plugin
from steersman.server.engine.device import DevicePlans
from steersman.server.engine.fusion import Fusion
from steersman.server.engine.monitor import Monitor
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.worker import _fusable
from steersman.server.settings import Settings
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.kernels import table_reader
from tests.server.engine.layered import Gemma, Llama, Model, PreNorm, one_rank
from tests.server.engine.plans import add, gate
from tests.server.engine.toy import args, report
from tests.steering.library import LAYERS, D, noise, plan_of

MID, PRE, POST = Site.RESID_MID, Site.RESID_PRE, Site.RESID_POST
CPU = torch.device("cpu")
PROMPT = [3, 5, 9, 4]
LOOK = "vLLM changed what server/engine/norms.py relies on; see its docstring"


@pytest.fixture(autouse=True, scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from one_rank(tmp_path_factory.mktemp("group"))


def other_order(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *rest: Any, form: Form = DEFINED, **sizes: Any
) -> None:
    """A kernel whose norm is right and has other bits."""
    table_reader.edit(x, residual, *rest, **sizes)
    add_and_norm(x, residual, weight, eps + 2**-7, form)


class Steered:
    """A model whose layers are hooked, and perhaps fused, and the batches that run through it."""

    def __init__(
        self,
        layer: type[Llama] = Llama,
        asked: str = "auto",
        dtype: torch.dtype = torch.float32,
        kernel: Any = table_reader.edit_and_norm,
        traced: bool = False,
        hooked: frozenset[Site] = frozenset(Site),
    ) -> None:
        self.dtype, self.model, self.launches = dtype, Model(layer, dtype), 0
        self.runtime = Runtime()
        mine = list(enumerate(self.model.layers))
        found = norms.candidates(self.model, self.model.layers, mine, D, hooked)
        widths, _ = hooks.install(mine, D, self.runtime, hooked, traced=traced)
        places = [Place(i, site) for site, by_layer in widths.items() for i in by_layer]
        device = DevicePlans(self._counted(table_reader.edit), places, {}, CPU, rows=64, plans=16, nbytes=2**18)
        self.runtime.use_device(device)
        if asked != "off":
            self.runtime.fusion = norms.decide(asked, found, kernel, CPU, dtype)
            if traced:
                self.runtime.fusion.norms[:] = [
                    type(n)(**{**vars(n), "always": True}) for n in self.runtime.fusion.norms
                ]
            device.norm_kernel = self._counted(kernel)
            hooks.fuse(self.runtime, self.runtime.fusion.norms, traced=traced)
        self.run: Callable[[Tensor], Tensor] = self.model

    def _counted(self, kernel: Any) -> Any:
        def launch(*given: Any, **more: Any) -> None:
            self.launches += 1
            kernel(*given, **more)

        return launch

    def add(self, plans: Sequence[Plan | None]) -> None:
        for i, plan in enumerate(plans):
            if plan is not None:
                self.runtime.plans.add(plan.to_bytes(), "http")
                self.runtime.add_request(str(i), args(plan, PROMPT, str(i)))

    def passes(self, plans: Sequence[Plan | None], count: int = 4) -> list[Tensor]:
        """What the model makes of the requests' prompts, and of each token after them."""
        self.add(plans)
        out = []
        for step in range(count):
            n, start = (len(PROMPT), 0) if step == 0 else (1, len(PROMPT) + step - 1)
            batch = [Scheduled(str(i), start, i * n, n) for i in range(len(plans))]
            x = noise(len(plans) * n, D, seed=step).to(self.dtype)
            self.runtime.begin(batch, lambda row, count: np.zeros(count, np.int64))
            try:
                with torch.inference_mode():
                    out.append(self.run(x).clone())
            finally:
                self.runtime.end()
        return out


def everywhere(*sites: Site) -> Plan:
    edits = [{**add(i, site=site), "scale": 0.5 + i} for i, site in enumerate(sites)]
    return plan_of(*edits, {"op": "ablate", "vector": add(9)["vector"], "layers": "1-2", "site": sites[0]})


PLANS: list[Plan | None] = [
    everywhere(POST), None, everywhere(MID, POST), everywhere(PRE), None, everywhere(PRE, MID, POST, Site.MLP_OUT),
]  # fmt: skip


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [Llama, Gemma, PreNorm])
def test_fused_passes_have_the_bits_of_others(layer: type[Llama], dtype: torch.dtype) -> None:
    plain, fused = Steered(layer, "off", dtype), Steered(layer, "auto", dtype)
    want, got = plain.passes(PLANS), fused.passes(PLANS)
    assert same(want, got)
    assert not same(want, Steered(layer, "off", dtype).passes([None] * len(PLANS)))
    expected = 0 if layer is PreNorm else 2 * LAYERS  # a norm in the middle and one after each layer
    assert len(fused.runtime.fusion.norms) == expected
    assert fused.launches == plain.launches
    for i, plan in enumerate(PLANS):
        if plan is not None:
            assert report(fused.runtime, str(i)) == report(plain.runtime, str(i)), "what was measured is the same"


def test_a_fused_place_costs_no_launch_and_its_norm_none_of_the_model_s() -> None:
    steered = Steered()
    stock: list[int] = []
    for norm in steered.runtime.fusion.norms:
        plain = norm.module._forward_method
        norm.module._forward_method = lambda *a, plain=plain: (stock.append(1), plain(*a))[1]  # type: ignore[func-returns-value]
    steered.passes([everywhere(MID, POST)], 3)
    assert steered.launches == 3 * 2 * LAYERS
    assert not stock
    idle = Steered()
    assert same(idle.passes([None], 1), Steered(asked="off").passes([None], 1))
    assert not idle.launches


def test_neighbours_of_edited_rows_keep_the_bits_of_a_batch_without_edits() -> None:
    alone = Steered(asked="off").passes([None] * len(PLANS))
    beside = Steered().passes(PLANS)
    for a, b, n in zip(alone, beside, (len(PROMPT), 1, 1, 1), strict=True):
        for i, plan in enumerate(PLANS):
            rows = slice(i * n, (i + 1) * n)
            assert torch.equal(a[rows], b[rows]) == (plan is None)


def test_where_bits_differ_nothing_is_fused_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert not Steered(kernel=other_order).runtime.fusion.norms
    assert not caplog.text
    forced = Steered(asked="on", kernel=other_order)
    assert f"{2 * LAYERS} of {2 * LAYERS} norms are the kernel's in all passes" in caplog.text
    assert len(forced.runtime.fusion.norms) == 2 * LAYERS
    idle, stock = forced.passes([None] * len(PLANS)), Steered(asked="off").passes([None] * len(PLANS))
    assert forced.launches == 4 * 2 * LAYERS, "the kernel's norm is the model's in passes without edits too"
    assert not same(idle, stock)
    for a, b in zip(idle, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
    beside = Steered(asked="on", kernel=other_order).passes(PLANS)
    assert same(
        [rows[len(rows) // 6 : len(rows) // 3] for rows in idle], [r[len(r) // 6 : len(r) // 3] for r in beside]
    )


def test_a_traced_model_has_the_same_bits() -> None:
    """Its graph holds the op, which edits or does not, pass by pass."""
    nobody: list[Plan | None] = [None] * len(PLANS)
    want = [Steered(asked="off").passes(plans) for plans in (nobody, PLANS)]
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    traced = Steered(traced=True)
    traced.run = torch.compile(traced.model, backend=keep, dynamic=True, fullgraph=True)
    assert same(want[0], traced.passes(nobody))
    assert same(want[1], traced.passes(PLANS))
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("edit_and_norm" in call for call in calls) == 2 * LAYERS
    assert not any("fused_add_rms_norm" in call for call in calls)


@pytest.mark.parametrize("sites", [{POST}, {PRE, POST}, {MID}, {PRE, MID, POST, Site.ATTN_OUT}])
def test_while_a_graph_is_captured_each_place_is_launched_once(sites: set[Site]) -> None:
    steered = Steered()
    with steered.runtime.capturing(sites), torch.inference_mode():
        steered.run(noise(3, D))
    assert steered.launches == len(sites) * LAYERS
    assert not steered.runtime.live


def test_the_last_place_before_a_norm_is_the_one_that_is_fused() -> None:
    fusion, everything = Steered().runtime.fusion, frozenset(Place(i, site) for i in range(LAYERS) for site in Site)
    left, fused = fusion.split(everything, everything, ())
    assert set(fused.values()) == {
        *(Place(i, MID) for i in range(LAYERS)), *(Place(i, PRE) for i in range(1, LAYERS)), Place(LAYERS - 1, POST)
    }  # fmt: skip
    assert left == everything - set(fused.values())
    left, fused = fusion.split({Place(0, POST)}, everything, ())
    assert (left, list(fused.values())) == (frozenset(), [Place(0, POST)])
    for on_device, host in ((frozenset[Place](), frozenset[Place]()), (everything, frozenset({Place(1, PRE)}))):
        left, fused = fusion.split({Place(0, POST), Place(1, PRE)}, on_device, [host])
        assert (len(left), fused) == (2, {})


def test_where_the_host_reads_or_edits_nothing_is_fused() -> None:
    """Gates decide and statistics look at a place between its edit and what follows."""
    plans = [everywhere(MID, POST), plan_of(add(1, [2, 3], when=gate(layer=1))), None]
    results = []
    for asked in ("off", "auto"):
        steered = Steered(asked=asked)
        steered.runtime.monitor = Monitor(LAYERS, every=2)
        for i in range(len(plans)):
            steered.runtime.monitor.enter(str(i), len(PROMPT))
        results.append((steered.passes(plans, 6), steered.runtime.monitor.drain("http", {})))
    assert same(results[0][0], results[1][0])
    counts = [{k: v for k, v in told.items() if k != "worker"} for _, told in results]
    assert counts[0] == counts[1]


def test_an_edit_whose_norm_is_not_called_fails_its_request(caplog: pytest.LogCaptureFixture) -> None:
    steered = Steered()
    steered.model.forward = lambda x: _unnormed(steered.model, x)  # type: ignore[method-assign]
    steered.passes([everywhere(POST)], 1)
    assert f"layer {LAYERS - 1} resid_post was not edited" in report(steered.runtime, "0")["error"]
    with pytest.raises(RuntimeError, match="say --steering-fused-norm off"), steered.runtime.capturing({POST}):
        steered.run(noise(3, D))


def _unnormed(model: Model, x: Tensor) -> Tensor:
    residual = None
    for layer in model.layers:
        x, residual = layer(x, residual)
    assert residual is not None
    return model.norm(x + residual)  # type: ignore[no-any-return]


def test_a_kernel_that_fails_leaves_the_norm_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    steered = Steered()
    device = steered.runtime.device
    assert device is not None

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no such launch")

    device.norm_kernel = broken
    got = steered.passes([everywhere(POST), None], 1)
    assert same(got, Steered(asked="off").passes([None, None], 1))
    assert "no such launch" in report(steered.runtime, "0")["error"]


# Finding and trying


def test_what_reads_the_stream_between_layers_keeps_the_norms_there() -> None:
    model = Model(Llama)
    found = norms.candidates(model, model.layers, list(enumerate(model.layers)), D, {MID, POST}, between=False)
    assert [places for _, places in found] == [(Place(i, MID),) for i in range(LAYERS)]
    stage = list(enumerate(model.layers))[1:3]  # of a pipeline
    found = norms.candidates(model, model.layers, stage, D, {POST})
    assert [(norm, places) for norm, places in found] == [(model.layers[2].input_norm, (Place(1, POST),))]


def test_a_norm_of_another_kind_is_left_alone() -> None:
    class Own(RMSNorm):
        pass

    assert norms.form_of(RMSNorm(D)) == DEFINED
    assert norms.form_of(GemmaRMSNorm(D)) == Form.ONE_MORE
    assert norms.form_of(RMSNorm(D, var_hidden_size=4)) is None
    assert norms.form_of(Own(D)) is None
    assert norms.form_of(nn.LayerNorm(D)) is None
    model = Model(Llama)  # whose norms' weights are not in the stream's type
    found = norms.candidates(model, model.layers, list(enumerate(model.layers)), D, frozenset(Site))
    assert norms.decide("on", found, table_reader.edit_and_norm, CPU, torch.bfloat16) == Fusion()


@pytest.mark.parametrize("norm", [RMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_is_found_in_which_all_bits_agree(norm: Any, dtype: torch.dtype) -> None:
    made = norm(96).to(dtype)
    made.weight.data = noise(96).to(dtype)
    more = Form.ONE_MORE if norm is GemmaRMSNorm else Form(0)
    both = Form.ROUNDED_SUM | Form.ROUNDED_QUOTIENT
    forms = [more | rounded for rounded in (Form.ROUNDED_QUOTIENT, Form(0), Form.ROUNDED_SUM, both)]
    for form in forms:

        def stock(x: Tensor, residual: Tensor, form: Form = form) -> tuple[Tensor, Tensor]:
            add_and_norm(x, residual, made.weight.data, made.variance_epsilon, form)
            return x, residual

        found = norms.agreeing(made, stock, table_reader.edit_and_norm, CPU, dtype, (64, 3))
        assert found == (form if dtype != torch.float32 else forms[0]), "in float32 nothing is rounded"
    found = norms.agreeing(made, made.forward, table_reader.edit_and_norm, CPU, dtype, (64, 3, 1))
    assert found == norms.form_of(made) or (dtype == torch.float32 and found is not None), LOOK
    assert norms.agreeing(made, made.forward, other_order, CPU, dtype, (64, 3)) is None


def test_a_sum_in_another_order_is_noticed() -> None:
    """What the trial rests on: the same numbers added up in two orders."""
    made = RMSNorm(4096).to(torch.bfloat16)
    made.weight.data = noise(4096).bfloat16()

    def halves(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *_: Any, form: Form = DEFINED) -> None:
        z = x.float() + residual.float()
        residual.copy_(z)
        square = z.square()
        mean = (square[:, ::2].sum(-1) + square[:, 1::2].sum(-1)) / 4096
        x.copy_((z * torch.rsqrt(mean + eps)[:, None]).bfloat16().float() * weight.float())

    def mine(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        halves(x, residual, made.weight.data, made.variance_epsilon)
        return x, residual

    rows = (300, 64, 3)
    assert norms.agreeing(made, mine, halves, CPU, torch.bfloat16, rows) == DEFINED
    assert norms.agreeing(made, made.forward, halves, CPU, torch.bfloat16, rows) is None


@pytest.mark.slow
def test_a_compiled_model_s_norms_are_tried_as_they_are_compiled() -> None:
    """Inductor rounds once where vLLM's definition rounds twice, and the kernel follows it."""
    options = VllmConfig().compilation_config.inductor_compile_config
    model = Model(Llama, torch.bfloat16)
    found = norms.candidates(model, model.layers, list(enumerate(model.layers)), D, frozenset(Site))
    fused = norms.decide("auto", found, table_reader.edit_and_norm, CPU, torch.bfloat16, options).norms
    assert len(fused) == 2 * LAYERS, LOOK
    assert all(norm.always and norm.form == Form(0) for norm in fused), LOOK


def test_a_norm_that_cannot_be_tried_is_not_fused(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(Llama)
    found = norms.candidates(model, model.layers, list(enumerate(model.layers)), D, frozenset(Site))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    assert not norms.decide("auto", found, broken, CPU, torch.float32).norms
    assert "no such kernel" in caplog.text


@pytest.mark.parametrize("norm", [RMSNorm, GemmaRMSNorm])
def test_contract_norms_keep_what_they_multiply_by(norm: Any) -> None:
    made = norm(D, eps=0.125)
    assert made.weight.shape == (D,), LOOK
    assert made.variance_epsilon == 0.125, LOOK
    if norm is RMSNorm:
        assert made.has_weight, LOOK
        assert RMSNorm(D, has_weight=False).has_weight is False, LOOK


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, 2 * LAYERS),
        ({"asked": "off"}, 0),
        ({"quant_config": "fp8"}, 2 * LAYERS),
        ({"quant_config": "fp8", "mode": CompilationMode.VLLM_COMPILE}, 0),
        ({"fuse_allreduce_rms": True, "mode": CompilationMode.VLLM_COMPILE}, 0),
        ({"mode": CompilationMode.VLLM_COMPILE}, 2 * LAYERS),
        ({"speculative_config": "eagle3"}, LAYERS),
    ],
)
def test_what_stands_against_fusing(changed: dict[str, Any], found: int) -> None:
    """The norms of a compiled model that vLLM fuses with what is around them, and those between which drafters read."""
    model = Model(Llama)
    passes = SimpleNamespace(fuse_allreduce_rms=changed.get("fuse_allreduce_rms", False))
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            quant_config=changed.get("quant_config"),
            speculative_config=changed.get("speculative_config"),
            compilation_config=SimpleNamespace(mode=changed.get("mode", CompilationMode.NONE), pass_config=passes),
        ),
        model_runner=SimpleNamespace(get_model=lambda: model),
    )
    settings = Settings(fused_norm=changed.get("asked", "auto"))
    assert len(_fusable(worker, model.layers, list(enumerate(model.layers)), D, settings)) == found


def test_contract_what_is_asked_about_is_in_the_configuration() -> None:
    config = VllmConfig()
    assert config.quant_config is None, LOOK
    assert config.speculative_config is None, LOOK
    assert hasattr(config.compilation_config.pass_config, "fuse_allreduce_rms"), LOOK
    assert isinstance(config.compilation_config.inductor_compile_config, dict), LOOK


def test_a_graph_with_other_norms_is_another_one() -> None:
    hashes = set()
    for norms_of_graph in ([], [["layer 0 resid_mid"]], [["layer 0 resid_post", "layer 1 resid_pre"]]):
        config = VllmConfig(additional_config={"steersman": {}})
        plugin.mark_norms(config, norms_of_graph)
        hashes.add(config.compute_hash())
    assert len(hashes) == 3
