"""Edits on requests that use a LoRA adapter, against the same edits on a model with the adapter merged in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE, Asked, agree, ask, distance, matters, random_assets, together
from tests.models.tiny import tiny_model
from tests.oracle.hf import SITES, Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PROMPT = [1, 40, 51, 62, 73, 84, 95, 106, 117, 128, 139, 31]
RANK, ALPHA = 8, 16
TARGETS = {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}


def adapter(folder: Path, model: torch.nn.Module) -> None:
    """Writes a random PEFT adapter of every linear layer, and merges it into ``model``."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in model.named_modules():
        part, _, leaf = name.rpartition(".")
        if leaf not in TARGETS.get(part.rpartition(".")[2], ()):
            continue
        out, width = module.weight.shape
        a = torch.randn(RANK, width, generator=generator) / width**0.5
        b = torch.randn(out, RANK, generator=generator) * 0.2
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        module.weight.data += ALPHA / RANK * b @ a
    assert len(tensors) == 2 * 7 * len(model.model.layers)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": [leaf for leaves in TARGETS.values() for leaf in leaves],
        "base_model_name_or_path": "tiny", "inference_mode": True,
    }  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle, Oracle]]:
    """The server, and the oracles of the model without and with the adapter."""
    path, tmp = tiny_model("llama"), tmp_path_factory.mktemp("lora")
    base, merged = Oracle(path, {}), Oracle(path, {})
    adapter(tmp / "adapter", merged.model)
    options = [*WIDE, "--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"tuned={tmp / 'adapter'}"]
    options.append("--enable-prompt-tokens-details")
    with serve(path, tmp, [*options, "--block-size", "32"], env=DEVELOPER, forked=True) as server:
        random_assets(base, server)
        merged.assets.update(base.assets)
        yield server, base, merged


def test_the_adapter_works(served: tuple[Server, Oracle, Oracle]) -> None:
    server, base, merged = served
    tuned = ask(server, PROMPT, model="tuned")
    agree(tuned, merged, None, "unsteered, with the adapter")
    agree(ask(server, PROMPT), base, None, "unsteered, without")
    moved = distance(base.logprobs(tuned.ids, None, len(PROMPT)), merged.logprobs(tuned.ids, None, len(PROMPT)))
    assert moved > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize("site", SITES)
def test_edits(served: tuple[Server, Oracle, Oracle], site: str) -> None:
    server, base, merged = served
    where = {"vector": site, "site": site, "layers": [1, 3]}
    for edit in (
        {"op": "add", **where, "scale": 1.5},
        {"op": "ablate", **where},
        {"op": "clamp", **where, "min": -0.3, "max": 0.3},
        {"op": "add", **where, "scale": 0.3, "relative": "norm", "preserve_norm": True},
    ):
        steering = {"interventions": [edit]}
        label = f"{edit['op']} at {site}"
        answer = ask(server, PROMPT, steering, model="tuned")
        agree(answer, merged, steering, f"{label}, with the adapter")
        matters(merged, answer, steering, label)
        agree(ask(server, PROMPT, steering), base, steering, f"{label}, without the adapter")


def test_units(served: tuple[Server, Oracle, Oracle]) -> None:
    server, _, merged = served
    steering: dict[str, Any] = {
        "interventions": [
            {"op": "heads", "heads": [[1, 0], [2, 3]], "factor": 0.0},
            {"op": "neurons", "neurons": {"inline": [[1, 3], [2, 150]]}, "mode": "set", "value": 3.0},
        ]
    }
    answer = ask(server, PROMPT, steering, model="tuned")
    agree(answer, merged, steering, "heads and neurons")
    matters(merged, answer, steering, "heads and neurons")


def test_gates_and_a_mixed_batch(served: tuple[Server, Oracle, Oracle]) -> None:
    """A batch of several plans with the adapter, then one without.

    Not both in one batch, and without the prompt's logprobs: on the CPU vLLM 0.32 gives the adapter to every
    request of a batch that has one which uses it, and dies of prompt logprobs beside other requests.
    """
    server, base, merged = served
    plans: list[Any] = [None]
    for site in ("attn_z", "mlp_post", "resid_post"):
        when = {"vector": "mlp_post", "site": "mlp_post", "layer": 0, "measure": "projection", "above": 0.0}
        add = {"op": "add", "vector": site, "site": site, "scale": 1.5, "layers": [2]}
        plans += [{"interventions": [{**add, "when": when}]}, {"interventions": [{**add, "tokens": "generated"}]}]
    for model, oracle in (("tuned", merged), (server.model, base)):
        batch = [Asked(PROMPT[: 6 + i], plan, 4 + i, f"{model}: {plan}", model) for i, plan in enumerate(plans)]
        for request, answer in zip(batch, together(server, batch, whole=False), strict=True):
            agree(answer, oracle, request.steering, request.label)


def test_the_cache_is_not_shared_with_the_adapter(served: tuple[Server, Oracle, Oracle]) -> None:
    server, base, merged = served
    prompt = [1, *range(100, 199)]
    steering = {"interventions": [{"op": "add", "vector": "mlp_post", "site": "mlp_post", "scale": 2.0}]}
    for model, oracle in ((server.model, base), ("tuned", merged)):
        for cached in (0, 96):
            answer = ask(server, prompt, steering, whole=False, model=model)
            assert answer.cached == cached, f"{model}: {answer.cached} tokens from the cache"
            agree(answer, oracle, steering, f"{model}, {cached} tokens from the cache")
