"""``steersman serve-policy``: what the application and its server are made with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import uvicorn

from steersman.server import cli
from steersman.server.pi0 import app


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Put back afterwards."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been built, and run."""
    found: list[Any] = []
    monkeypatch.setattr(app, "build", lambda *args, **options: found.append((args, options)))
    monkeypatch.setattr(uvicorn, "run", lambda made, **options: found.append(options))
    return found


def test_options_reach_the_application(made: list[Any], tmp_path: Path) -> None:
    options = ["--device", "cpu", "--max-num-seqs", "3", "--api-key", "a", "--api-key", "b", "--port", "81"]
    more = ["--served-model-name", "pi0", "--steering-store", str(tmp_path), "--steering-max-robots", "5"]
    assert cli.main(["serve-policy", str(tmp_path), *options, *more]) == 0
    ((folder, settings), about), served = made
    assert (folder, settings.store, settings.max_robots) == (tmp_path, str(tmp_path), 5)
    assert about == {
        "device": "cpu", "dtype": "float32", "limit": 3, "api_keys": ["a", "b"], "aliases": ("pi0",),
    }  # fmt: skip
    assert served["port"] == 81


def test_vllms_variable_is_the_key(made: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "VLLM_API_KEY", "key")
    cli.main(["serve-policy", str(tmp_path), "--dtype", "bfloat16", "--device", "cpu"])
    assert (made[0][1]["api_keys"], made[0][1]["dtype"]) == (["key"], "bfloat16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--steering-dosage", "some"], "--steering-dosage must be"),
    ],
)
def test_bad_options_are_one_line(made: list[Any], options: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^steersman serve-policy: {said}"):
        cli.main(["serve-policy", str(tmp_path), *options])
    assert not made


def test_a_checkpoint_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit, match=r"^steersman serve-policy: .* is a llama, not a pi0"):
        cli.main(["serve-policy", str(tmp_path), "--steering-store", str(tmp_path / "store")])
