"""Stored directions beside a checkpoint's W_down: planted null directions are found, others are not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steersman.steering.errors import ModelMismatch, WidthMismatch
from steersman.steering.neurons_checkpoint import Checkpoint
from steersman.steering.weights_lint import SHOWN, applies, lint_weights
from tests.steering.library import asset, noise, vector

LAYERS, D_MODEL, WIDTH = 4, 8, 32


def down(layer: int) -> Tensor:
    """W_down [d_model, d_ff], as a linear layer keeps it."""
    return noise(D_MODEL, WIDTH, seed=20 + layer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": down(i) for i in range(LAYERS)}
    save_file({"model.embed_tokens.weight": noise(11, D_MODEL), **tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return Checkpoint(folder)


def null(layer: int, seed: int) -> Tensor:
    """A direction that W_down of this layer does not see."""
    v = noise(WIDTH, seed=seed)
    return v - torch.linalg.pinv(down(layer)) @ (down(layer) @ v)


def row(layer: int, seed: int) -> Tensor:
    return down(layer).T @ noise(D_MODEL, seed=seed)


def test_a_planted_direction_is_found_at_its_layer_alone(checkpoint: Checkpoint) -> None:
    found = vector("v", torch.stack([row(0, 1), null(2, 2)]), [0, 2], site="mlp_post")
    assert applies(found)
    [finding] = lint_weights(found, checkpoint)
    assert finding.message.startswith("layer 2: 1.000 of its length lies where the next map reads nothing (0.866")
    assert lint_weights(vector("v", torch.stack([null(2, 2)]), [1], site="mlp_post"), checkpoint) == []


def test_of_many_the_worst_are_told_and_the_rest_counted(checkpoint: Checkpoint) -> None:
    rows = torch.stack([null(1, seed) for seed in range(SHOWN + 3)] + [row(1, 30), torch.zeros(WIDTH)])
    tensors = {"decoder": rows, "b_dec": torch.zeros(WIDTH)}
    found = asset("snmf", "dictionary", tensors, layer=1, site="mlp_post", architecture="basis")
    findings = lint_weights(found, checkpoint)
    assert len(findings) == SHOWN + 1
    assert findings[-1].message == f"layer 1: and 3 more of {len(rows) - 1} directions"


def test_what_it_cannot_tell(checkpoint: Checkpoint) -> None:
    assert not applies(vector("v", noise(1, D_MODEL), [1]))
    with pytest.raises(WidthMismatch):
        lint_weights(vector("v", noise(1, WIDTH + 1), [1], site="mlp_post"), checkpoint)
    other = {"id": "org/other", "n_layers": 5, "d_model": D_MODEL}
    with pytest.raises(ModelMismatch, match="5 layers"):
        lint_weights(vector("v", noise(1, WIDTH), [1], site="mlp_post", model=other), checkpoint)
