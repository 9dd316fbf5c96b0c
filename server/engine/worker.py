"""What a worker process does for steering: hooks its model after loading, and answers the HTTP processes.

The contract with vLLM: ``Worker.load_model`` ends with ``self.model_runner`` holding the loaded model
(``get_model()``), which torch.compile traces later where ``compilation_config.mode`` says so; methods of the worker
class are reached by ``collective_rpc(name)``, which gives one answer per rank; ``Worker.vllm_config`` describes the
model, ``use_v2_model_runner`` the runner.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.config import CompilationMode
from vllm.distributed import get_pp_group, get_tp_group, tensor_model_parallel_all_reduce

from steersman.kernels import choice, cpu_library
from steersman.server.engine import graphs, hooks, norms, plugin, runner_v1, runner_v2
from steersman.server.engine.device import DevicePlans, Kernel
from steersman.server.engine.dosage import Dosage
from steersman.server.engine.encoders import Encoders
from steersman.server.engine.fusion import NormKernel
from steersman.server.engine.layers import decoder_layers
from steersman.server.engine.monitor import Monitor
from steersman.server.engine.resident import Shard
from steersman.server.engine.runtime import Runtime
from steersman.server.engine.signals import watch_logits
from steersman.server.settings import Settings
from steersman.steering.errors import SiteUnsupported
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.store import Store

logger = logging.getLogger(__name__)

EVERY_ON_CPU = 32  # passes of which statistics look at one
EVERY_WITH_GRAPHS = 256  # the same, where that pass is slower than others because it replays no graph
PADDING = 64  # rows that a runner may add to its largest batch


class WorkerSteering:
    """One rank's part."""

    def __init__(self, worker: Any) -> None:
        settings = Settings.from_env()
        config = worker.vllm_config.model_config
        text = config.hf_text_config
        self.n_layers: int = text.num_hidden_layers
        self.d_model: int = config.get_hidden_size()
        tp = get_tp_group()
        self.leads = tp.rank_in_group == 0
        self.runtime = Runtime(
            reduce=_sum_over_ranks if tp.world_size > 1 else None,
            capacity=settings.plan_memory_mb * 2**20,
            limit=settings.max_plans,
        )
        self.runtime.keeps = self.leads
        encoders = Encoders(lambda ref: Store(settings.store).get(ref), worker.device)
        self.runtime.plans.on_load = encoders.load
        if settings.max_relative_norm is not None:
            self.runtime.dosage = Dosage(settings.max_relative_norm, settings.dosage)
        if settings.monitor == "on":
            on_cpu = worker.device.type == "cpu"
            every = settings.monitor_every or (EVERY_ON_CPU if on_cpu else EVERY_WITH_GRAPHS)
            self.runtime.monitor = Monitor(self.n_layers, every, counts=self.leads)
        watch_logits(worker.model_runner.get_model(), self.runtime.see_logits)
        if worker.device.type == "cpu":
            cpu_library.library(cpu_library.backend())  # compiled now, not in the first steered step
        widths: dict[Site, dict[int, int]] = {}
        self.layers: frozenset[int] = frozenset()
        try:
            layers = decoder_layers(worker.model_runner.get_model(), self.n_layers)
        except LookupError as error:
            logger.error("nothing can be steered: %s", error)
        else:
            mine = [(i, m) for i, m in enumerate(layers) if any(True for _ in m.parameters())]
            self.layers = frozenset(i for i, _ in mine)
            traced = worker.vllm_config.compilation_config.mode != CompilationMode.NONE
            fusable = _fusable(worker, layers, mine, self.d_model, settings)
            widths, shards = hooks.install(mine, self.d_model, self.runtime, settings.hooked_sites, traced=traced)
            self.runtime.shard(shards)
            kernel = choice.choose(worker.device, width=_widest(widths, shards))
            if kernel is not None:
                graphs.use(settings.hooked_sites)
                self.runtime.use_device(_device_plans(kernel, worker, settings, widths, shards))
                _fuse(self.runtime, choice.and_norm(kernel), fusable, worker, settings.fused_norm, traced)
        runner = runner_v2 if worker.use_v2_model_runner else runner_v1
        runner.attach(worker.model_runner, self.runtime)
        self.info = ModelInfo(
            name=config.model,
            architecture=(config.hf_config.architectures or ["unknown"])[0],
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=text.num_attention_heads,
            d_head=_head_width(widths, text.num_attention_heads),
            sites=widths,
        )
        self.pp_rank = get_pp_group().rank_in_group

    def model(self) -> dict[str, Any] | None:
        """This rank's layers and sites; None from ranks that hold another's shard."""
        return dict(self.info.to_json()) if self.leads else None

    def load_plan(self, data: bytes, holder: str, release: list[str]) -> dict[str, Any]:
        """Pins a plan for ``holder``, after it gave up those of ``release``; its id, and how many are resident now."""
        return self.runtime.plans.load(data, holder, release, self._refuse_far_reads)

    def _refuse_far_reads(self, plan: Plan) -> None:
        """What is read on the pipeline stage that has the layer, the other stages do not hear of."""
        for step in plan.steps:
            if step.gate >= 0 and self.layers.intersection(step.layers):
                layer = plan.gates[step.gate].place.layer
                if layer not in self.layers:
                    raise SiteUnsupported(f"layer {layer} is on another pipeline stage than the edit that it gates")
        for injection in plan.injections:
            mine = self.layers.intersection(injection.targets)
            far = [k for k, _ in injection.sources if k not in self.layers and mine and k < max(mine)]
            if far:
                raise SiteUnsupported(
                    f"layer {far[0]} is on another pipeline stage than layer {max(mine)}, into which it is injected; "
                    "use sources and targets of one stage"
                )

    def reports(self, asked: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Raw reports by key; ``asked`` says how many positions of each sequence count.

        Ranks that hold another's shard say only what went wrong on them.
        """
        found = self.runtime.reports(asked)
        if self.leads:
            return found
        nothing: dict[str, Any] = {"relative": [], "probes": [], "over": [], "tokens": [], "signals": {}}
        return {key: [{**r, **nothing} for r in reports if r["error"]] for key, reports in found.items()}

    def probes(self, asked: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, Any]] | None:
        """What requests' probes read: by key and engine's id, of the positions [from, to) that are asked for."""
        return self.runtime.probe_rows(asked) if self.leads else None

    def captured(self, key: str) -> dict[str, Any] | None:
        """[layer, site, *shape] of the arrays that were captured of a request, and what went wrong.

        None where the request was not computed.
        """
        state = self.runtime.captured(key)
        if state is None or state.capture is None:
            return None
        try:
            return {"error": state.error, "arrays": state.capture.manifest()}
        except LookupError as missing:
            return {"error": state.error or str(missing), "arrays": []}

    def captured_bytes(self, key: str, start: int, end: int) -> bytes:
        """A part of these arrays one after another; nothing from ranks that have none."""
        state = self.runtime.captured(key)
        return b"" if state is None or state.capture is None else state.capture.read(start, end)

    def drop_captured(self, key: str) -> None:
        """What was captured of a request is not asked for again."""
        state = self.runtime.captured(key)
        if state is not None:
            state.capture = None

    def watch(self, data: bytes) -> None:
        """The probes of this plan are read in every pass that statistics look at."""
        if self.runtime.monitor is not None:
            self.runtime.monitor.watch_probes(Plan.from_bytes(data))

    def norms(self) -> dict[str, Any] | None:
        """What norms this worker has seen; None from ranks that do not count."""
        monitor = self.runtime.monitor
        return monitor.norms_seen() if monitor is not None and self.leads else None

    def baseline(self, mean: list[float], deviation: list[float]) -> None:
        """See :meth:`Monitor.use_baseline`."""
        if self.runtime.monitor is not None:
            self.runtime.monitor.use_baseline(mean, deviation)

    def statistics(self, holder: str, received: dict[str, int]) -> dict[str, Any] | None:
        """See :meth:`Monitor.drain`. None from ranks that do not count."""
        monitor = self.runtime.monitor
        return monitor.drain(holder, received) if monitor is not None and self.leads else None

    def stats(self) -> dict[str, Any]:
        return {"plans_resident": len(self.runtime.plans), "plan_bytes": self.runtime.plans.size}


def _fusable(
    worker: Any, layers: Any, mine: list[tuple[int, Any]], d_model: int, settings: Settings
) -> list[norms.Candidate]:
    """The norms that may be fused with edits; norms.py says what stands against it."""
    config = worker.vllm_config
    compilation = config.compilation_config
    fuses_itself = config.quant_config is not None or getattr(compilation.pass_config, "fuse_allreduce_rms", False)
    if settings.fused_norm == "off" or (compilation.mode != CompilationMode.NONE and fuses_itself):
        return []
    model, between = worker.model_runner.get_model(), config.speculative_config is None
    return norms.candidates(model, layers, mine, d_model, settings.hooked_sites, between)


def _fuse(
    runtime: Runtime, kernel: NormKernel, found: list[norms.Candidate], worker: Any, asked: str, traced: bool
) -> None:
    assert runtime.device is not None
    config = worker.vllm_config
    options = config.compilation_config.inductor_compile_config if traced else None
    runtime.fusion = norms.decide(asked, found, kernel, worker.device, config.model_config.dtype, options)
    runtime.device.norm_kernel = kernel
    hooks.fuse(runtime, runtime.fusion.norms, traced=traced)
    always = [[place.name for place in norm.places] for norm in runtime.fusion.norms if norm.always]
    plugin.mark_norms(config, always)


def _device_plans(
    kernel: Kernel,
    worker: Any,
    settings: Settings,
    widths: Mapping[Site, Mapping[int, int]],
    shards: Mapping[Place, Shard],
) -> DevicePlans:
    places = sorted((Place(layer, site) for site, by_layer in widths.items() for layer in by_layer), key=_order)
    compilation = worker.vllm_config.compilation_config
    rows = max(worker.vllm_config.scheduler_config.max_num_batched_tokens, compilation.max_cudagraph_capture_size or 0)
    return DevicePlans(
        kernel, places, shards, worker.device,
        rows=rows + PADDING, plans=settings.max_plans, nbytes=settings.plan_memory_mb * 2**20,
        d_model=worker.vllm_config.model_config.get_hidden_size(),
        carry_nbytes=settings.carry_memory_mb * 2**20, probe_nbytes=settings.probe_memory_mb * 2**20,
    )  # fmt: skip


def _widest(widths: Mapping[Site, Mapping[int, int]], shards: Mapping[Place, Shard]) -> int:
    """Of the rows that this rank's hooks see."""
    whole = {Place(layer, site): width for site, by_layer in widths.items() for layer, width in by_layer.items()}
    parts = {place: shard.stop - shard.start for place, shard in shards.items()}
    return max((whole | parts).values(), default=1)


def _order(place: Place) -> tuple[int, int]:
    return place.order


def _sum_over_ranks(partial: Tensor) -> Tensor:
    """In float32, whatever it is: not every all-reduce of vLLM's knows float64."""
    return tensor_model_parallel_all_reduce(partial.float()).to(partial.dtype)


def _head_width(widths: dict[Site, dict[int, int]], heads: int) -> int:
    """The width of one head's output, from what o_proj takes."""
    known = set(widths.get(Site.ATTN_Z, {}).values())
    return next(iter(known)) // heads if len(known) == 1 else 0
