"""Kept captures as files: whole or not there, found by every process, and nothing outside of their folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from steersman.server.kept import KeptCaptures
from steersman.steering.activations import Captured, CapturedPrompt, Reduction, to_parts
from steersman.steering.errors import PayloadTooLarge, StoreUnavailable, UnknownCapture
from steersman.steering.plan import Place
from steersman.steering.sites import Site

PLACES = [Place(0, Site.MLP_POST), Place(2, Site.RESID_POST)]


def captured(reduce: Reduction = "none", seed: int = 0) -> Captured:
    chance = np.random.default_rng(seed)
    prompts = []
    for n in (3, 1):
        shape = (n, 5) if reduce == "none" else (5,)
        rows = {place: chance.normal(size=shape).astype(np.float32) for place in PLACES}
        prompts.append(CapturedPrompt(list(range(n + 2)), list(range(n)), rows))
    return Captured("org/model", PLACES, prompts, reduce, None)


@pytest.mark.parametrize("reduce", ["none", "mean"])
def test_rows_come_back_one_by_one(tmp_path: Path, reduce: Reduction) -> None:
    given = captured(reduce)
    found = KeptCaptures(tmp_path, 1 << 20).add(to_parts(given))
    opened = KeptCaptures(tmp_path, 1 << 20).open(found)  # as another process would
    assert found == hashlib.sha256((tmp_path / f"{found}.safetensors").read_bytes()).hexdigest()
    for i, prompt in enumerate(given.prompts):
        for place, rows in prompt.rows.items():
            for j, row in enumerate(np.atleast_2d(rows)):
                assert np.array_equal(opened.rows(place, i, [j])[0], row)
    assert opened.about["sites"] == {"mlp_post": [0], "resid_post": [2]}


def test_what_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes | memoryview]:
        yield from list(to_parts(captured()))[:1]
        raise RuntimeError("cut short")

    kept = KeptCaptures(tmp_path, 1 << 20)
    with pytest.raises(RuntimeError):
        kept.add(parts())
    assert list(tmp_path.iterdir()) == []


def test_room(tmp_path: Path) -> None:
    kept = KeptCaptures(tmp_path / "not yet made", 5000)
    kept.refuse(5000)
    size = (kept.folder / f"{kept.add(to_parts(captured()))}.safetensors").stat().st_size
    kept.refuse(5000 - size)
    with pytest.raises(PayloadTooLarge, match=f"and {size} of 5000 are taken"):
        kept.refuse(5001 - size)


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    kept = KeptCaptures(tmp_path, 1 << 20)
    (tmp_path / "notes.safetensors").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    assert kept.list() == []
    for name in ("notes", "secret", "../secret", "", "0" * 64):
        for call in (kept.path, kept.open, kept.remove):
            with pytest.raises(UnknownCapture):
                call(name)
    damaged = "a" * 64
    (tmp_path / f"{damaged}.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(StoreUnavailable, match="damaged"):
        kept.open(damaged)
