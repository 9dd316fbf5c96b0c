"""What a worker process does for steering: hooks its model after loading, and answers the HTTP processes.

The contract with vLLM: ``Worker.load_model`` ends with ``self.model_runner`` holding the loaded model
(``get_model()``), which torch.compile traces later where ``compilation_config.mode`` says so; methods of the worker
class are reached by ``collective_rpc(name)``, which gives one answer per rank; ``Worker.vllm_config`` describes the
model, ``use_v2_model_runner`` the runner.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from vllm.config import CompilationMode
from vllm.distributed import get_pp_group, get_tp_group, tensor_model_parallel_all_reduce

from steersman.kernels import cpu_library
from steersman.server.engine import hooks, runner_v1, runner_v2
from steersman.server.engine.layers import decoder_layers
from steersman.server.engine.runtime import Runtime
from steersman.server.settings import Settings
from steersman.steering.errors import SiteUnsupported, SteeringError
from steersman.steering.plan import Plan
from steersman.steering.sites import ModelInfo, Site

logger = logging.getLogger(__name__)


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
            widths, shards = hooks.install(mine, self.d_model, self.runtime, settings.hooked_sites, traced=traced)
            self.runtime.shard(shards)
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
        plans = self.runtime.plans
        try:
            plans.release(release, holder)
            self._refuse_far_gates(Plan.from_bytes(data))
            return {"plan": plans.add(data, holder), "resident": len(plans)}
        except SteeringError as error:
            return {"error": error.message, "code": error.code}
        except Exception as error:
            logger.exception("a plan could not be loaded")
            return {"error": str(error), "code": "engine_unsteered"}

    def _refuse_far_gates(self, plan: Plan) -> None:
        """A gate is read on the pipeline stage that has its layer, and the other stages do not hear of it."""
        for step in plan.steps:
            if step.gate >= 0 and self.layers.intersection(step.layers):
                layer = plan.gates[step.gate].place.layer
                if layer not in self.layers:
                    raise SiteUnsupported(f"layer {layer} is on another pipeline stage than the edit that it gates")

    def reports(self, asked: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Raw reports by key; ``asked`` says how many positions of each sequence count.

        Ranks that hold another's shard say only what went wrong on them.
        """
        found = self.runtime.reports(asked)
        if self.leads:
            return found
        return {
            key: [{**report, "relative": [], "probes": []} for report in reports if report["error"]]
            for key, reports in found.items()
        }

    def stats(self) -> dict[str, Any]:
        return {"plans_resident": len(self.runtime.plans), "plan_bytes": self.runtime.plans.size}


def _sum_over_ranks(partial: Tensor) -> Tensor:
    """In float32, whatever it is: not every all-reduce of vLLM's knows float64."""
    return tensor_model_parallel_all_reduce(partial.float()).to(partial.dtype)


def _head_width(widths: dict[Site, dict[int, int]], heads: int) -> int:
    """The width of one head's output, from what o_proj takes."""
    known = set(widths.get(Site.ATTN_Z, {}).values())
    return next(iter(known)) // heads if len(known) == 1 else 0
