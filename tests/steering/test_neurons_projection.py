"""The blocked projection against the dense one, its memory, and neurons that were planted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from steersman.steering.errors import InvalidRequest, NonFinite
from steersman.steering.neurons_checkpoint import Checkpoint
from steersman.steering.neurons_projection import Projection, project
from tests.models.tiny import tiny_model
from tests.steering.checkpoints import D_FF, LAYERS, V, columns, tensors, write
from tests.steering.library import noise


def dense(rows: Tensor, unembedding: Tensor) -> Tensor:
    """All logits [n, V] in float64."""
    return rows.double() @ unembedding.double().T


def assert_is(found: Projection, logits: Tensor, k: int) -> None:
    values, tokens = logits.topk(k + 1, dim=1)
    torch.testing.assert_close(found.logits.double(), values[:, :k], rtol=1e-5, atol=1e-5)
    clear = (values[:, :-1] - values[:, 1:] > 1e-4).all(1)  # no two so near that rounding may swap them
    assert clear.float().mean() > 0.9
    assert torch.equal(found.tokens[clear].long(), tokens[clear, :k])
    torch.testing.assert_close(found.mean.double(), logits.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.deviation.double(), logits.std(1, correction=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logsumexp.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("memory", [30_000, 500_000, 1 << 30])  # many blocks, few, one
def test_blocks_give_what_the_whole_gives(name: str, memory: int) -> None:
    """The layout of the checkpoint is checked elsewhere, against transformers: this is the arithmetic."""
    checkpoint = Checkpoint(tiny_model(name))
    rows = torch.cat([checkpoint.down(i) for i in checkpoint.widths()])
    logits = dense(rows, checkpoint.unembedding(0, checkpoint.vocabulary))
    assert_is(project(checkpoint, checkpoint.vocabulary, top_k=7, memory=memory), logits, 7)


def test_openvla_s_layout_with_layers_chosen_and_padding_left_out(tmp_path: Path) -> None:
    prefix, used = "language_model.model.", V - 6
    weights = tensors(prefix, "language_model.lm_head.weight")
    weights["language_model.lm_head.weight"][used:] *= 1000  # padding, which must not win
    found = project(Checkpoint(write(tmp_path, weights)), used, top_k=4, layers=(0, 2))
    logits = dense(columns(weights, prefix), weights["language_model.lm_head.weight"][:used])
    assert_is(found, torch.cat([logits[:D_FF], logits[2 * D_FF :]]), 4)


def test_a_planted_neuron_writes_its_token_first(tmp_path: Path) -> None:
    weights, planted = tensors(), {(0, 3): 11, (1, 19): 42, (2, 0): 7}
    head = weights["lm_head.weight"] = torch.nn.functional.normalize(weights["lm_head.weight"])
    for (layer, index), token in planted.items():
        weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, index] = head[token]
    found = project(Checkpoint(write(tmp_path, weights)), V)
    for (layer, index), token in planted.items():
        assert int(found.tokens[layer * D_FF + index, 0]) == token
        assert float(found.logits[layer * D_FF + index, 0]) == pytest.approx(1)


def test_a_norm_is_applied_to_the_columns(tmp_path: Path) -> None:
    weights = tensors()
    checkpoint = Checkpoint(write(tmp_path, weights))
    rows = columns(weights).double()
    rows = rows / rows.square().mean(1, keepdim=True).sqrt() * weights["model.norm.weight"].double()
    assert_is(project(checkpoint, V, norm=checkpoint.final_norm()), dense(rows, weights["lm_head.weight"]), 10)


def test_half_precision_is_widened_before_it_is_multiplied(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    found = project(Checkpoint(write(tmp_path, weights)), V)
    assert_is(found, dense(columns(weights), weights["lm_head.weight"]), 10)


class Counting:
    """Weights that remember the largest part of the unembedding that was asked for."""

    d_model = 16

    def __init__(self, vocabulary: int, width: int) -> None:
        self.head, self.columns, self.largest = noise(vocabulary, 16), noise(width, 16, seed=1), 0

    def widths(self, layers: tuple[int, ...] | None = None) -> dict[int, int]:
        return {0: len(self.columns)}

    def down(self, layer: int) -> Tensor:
        return self.columns

    def unembedding(self, start: int, stop: int) -> Tensor:
        self.largest = max(self.largest, stop - start)
        return self.head[start:stop]


def test_blocks_stay_within_the_memory_that_they_are_given() -> None:
    weights, memory = Counting(40_000, 300), 2 << 20
    blocked = project(weights, 40_000, memory=memory)
    assert 1 < weights.largest * (16 + 3 * 300) * 4 <= memory
    whole = project(weights, 40_000, memory=1 << 30)
    assert weights.largest == 40_000
    torch.testing.assert_close(blocked.logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_progress_counts_every_neuron_once(tmp_path: Path) -> None:
    done: list[int] = []
    project(Checkpoint(write(tmp_path, tensors())), V, memory=5000, advance=done.append)
    assert sum(done) == LAYERS * D_FF
    assert len(done) > LAYERS
    assert min(done) >= 0


@pytest.mark.parametrize("k", [0, V + 1])
def test_tokens_kept_must_be_of_the_vocabulary(tmp_path: Path, k: int) -> None:
    with pytest.raises(InvalidRequest, match=f"1 to {V}"):
        project(Checkpoint(write(tmp_path, tensors())), V, top_k=k)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite(tmp_path: Path, name: str) -> None:
    weights = tensors()
    weights[name][0, 0] = torch.nan
    with pytest.raises(NonFinite):
        project(Checkpoint(write(tmp_path, weights)), V)
