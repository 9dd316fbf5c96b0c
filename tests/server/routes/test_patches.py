"""Op ``patch`` around the toy model, in which a row depends on its own token alone: what is put in goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steersman.clients.activations import Capture
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from tests.server.engine.test_captures import truth
from tests.server.toy_engine import ToyEngine
from tests.steering.library import LAYERS, D, inline, noise

PATH = "/v1/steering/captures"
SOURCE, TARGET = [3, 9, 12, 4, 1, 60], [5, 8, 2, 31, 7, 6, 10]
POST = [Place(layer, Site.RESID_POST) for layer in range(LAYERS)]
PLANE = noise(2, D, seed=12)
AFTER = [2, 3]  # layers that show what was done at the first two


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyEngine:
    return ToyEngine(tmp_path, monkeypatch)


def keep(engine: ToyEngine, *prompts: list[int], **asked: Any) -> str:
    response = engine.http.post(PATH, json={"prompts": prompts or [SOURCE], "keep": True, **asked})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def patched(engine: ToyEngine, capture: str, **fields: Any) -> tuple[dict[int, Tensor], str]:
    """The stream of TARGET leaving each layer, and the plan's id."""
    steering = {"interventions": [{"op": "patch", "capture": capture, **fields}]}
    response = engine.http.post(PATH, json={"prompts": [TARGET], "steering": steering})
    assert response.status_code == 200, response.text
    found = Capture.from_bytes(response.content)
    rows = {layer: torch.from_numpy(found.rows("resid_post", layer, 0).copy()) for layer in range(LAYERS)}
    return rows, str(found.about["plan"])


def agree(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


SOURCES, TARGETS = truth(None, SOURCE), truth(None, TARGET)


def test_all_that_was_captured_in_place(engine: ToyEngine) -> None:
    """Every layer after it goes on from there; what was not captured, and the token after the last, stays."""
    found, _ = patched(engine, keep(engine), layers=[1])
    n = len(SOURCE)
    assert torch.equal(found[0], TARGETS[POST[0]])
    for layer in (1, *AFTER):
        agree(found[layer][:n], SOURCES[POST[layer]])
        assert torch.equal(found[layer][n:], TARGETS[POST[layer]][n:])
    assert not torch.allclose(TARGETS[POST[3]][:n], SOURCES[POST[3]], atol=0.1)


@pytest.mark.parametrize("from_end", [False, True])
def test_chosen_rows_at_chosen_positions(engine: ToyEngine, from_end: bool) -> None:
    sources, targets = [4, 1], [0, 6]
    shift = (len(SOURCE), len(TARGET)) if from_end else (0, 0)
    chosen = {"source_positions": [p - shift[0] for p in sources]}
    at = {"tokens": {"positions": [p - shift[1] for p in targets]}}
    found, _ = patched(engine, keep(engine, [1], SOURCE, layers=[1]), prompt=1, **chosen, **at)
    for layer in (1, *AFTER):
        agree(found[layer][targets], SOURCES[POST[layer]][sources])
        rest = [p for p in range(len(TARGET)) if p not in targets]
        assert torch.equal(found[layer][rest], TARGETS[POST[layer]][rest])


@pytest.mark.parametrize("basis", [PLANE, PLANE[:1]])
def test_a_subspace(engine: ToyEngine, basis: Tensor) -> None:
    vectors = inline(basis[None] if len(basis) > 1 else basis[0], [1] if len(basis) > 1 else None)
    found, _ = patched(engine, keep(engine, layers=[1]), basis=vectors)
    n = len(SOURCE)
    q = torch.linalg.qr(basis.double().T).Q
    x, own = TARGETS[POST[1]][:n].double(), SOURCES[POST[1]].double()
    agree(found[1][:n], (x + (own - x) @ q @ q.T).float())


def test_a_whole_basis_is_the_whole(engine: ToyEngine) -> None:
    capture = keep(engine, layers=[1])
    part, _ = patched(engine, capture, basis=inline(noise(D, D, seed=5)[None], [1]))
    whole, _ = patched(engine, capture)
    agree(part[3], whole[3])


@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_one_row_goes_to_all_that_are_selected(engine: ToyEngine, reduce: str) -> None:
    capture = keep(engine, [1, 2], SOURCE, layers=[1], reduce=reduce)
    rows = SOURCES[POST[1]]
    row = rows.mean(0) if reduce == "mean" else rows[-1]
    everywhere, _ = patched(engine, capture, prompt=1)
    agree(everywhere[1], row.expand(len(TARGET), -1))
    some, _ = patched(engine, capture, prompt=1, tokens={"last": 2})
    agree(some[1][-2:], row.expand(2, -1))
    assert torch.equal(some[1][:-2], TARGETS[POST[1]][:-2])


def test_with_a_gate_and_other_edits_in_order(engine: ToyEngine) -> None:
    capture = keep(engine, layers=[1])
    gate = {"vector": inline(torch.eye(D)[0]), "layer": 0, "measure": "projection", "above": 6.5}
    found, _ = patched(engine, capture, when=gate)
    opened = [p for p in range(len(SOURCE)) if TARGET[p] > 6.5]
    assert 0 < len(opened) < len(SOURCE)
    rest = [p for p in range(len(TARGET)) if p not in opened]
    agree(found[1][opened], SOURCES[POST[1]][opened])
    assert torch.equal(found[1][rest], TARGETS[POST[1]][rest])
    add = {"op": "add", "vector": inline(noise(D)), "layers": [1]}
    patch = {"op": "patch", "capture": capture}
    for order, moved in (([add, patch], 0.0), ([patch, add], 1.0)):
        body = {"prompts": [TARGET], "layers": [1], "steering": {"interventions": order}}
        rows = Capture.from_bytes(engine.http.post(PATH, json=body).content).rows("resid_post", 1, 0)[: len(SOURCE)]
        np.testing.assert_allclose(rows, (SOURCES[POST[1]] + moved * noise(D)).numpy(), rtol=1e-5, atol=1e-5)


def test_a_plan_is_its_content(engine: ToyEngine) -> None:
    one, same, other = keep(engine), keep(engine), keep(engine, [4, *SOURCE[1:]])
    assert one == same != other
    ids = [patched(engine, capture, layers=[1])[1] for capture in (one, same, other)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("chunk", [5, 7, 64])
def test_more_rows_than_there_may_be_interventions(engine: ToyEngine, chunk: int) -> None:
    """In any chunks, and from the last row to the first."""
    engine.chunk = chunk
    source, target = [i % 60 for i in range(63)], [(7 * i + 1) % 60 for i in range(63)]
    capture = keep(engine, source, layers=[1])
    back = [*range(63)][::-1]
    steering = {"interventions": [{"op": "patch", "capture": capture, "tokens": {"positions": back}}] * 3}
    response = engine.http.post(PATH, json={"prompts": [target], "layers": [3], "steering": steering})
    assert response.status_code == 200, response.text
    found = torch.from_numpy(Capture.from_bytes(response.content).rows("resid_post", 3, 0).copy())
    agree(found, truth(None, source)[POST[3]][back])


def test_the_norm_is_kept_where_it_is_to_be(engine: ToyEngine) -> None:
    found, _ = patched(engine, keep(engine, layers=[1]), preserve_norm=True)
    x, own = (rows[POST[1]][: len(SOURCE)] for rows in (TARGETS, SOURCES))
    agree(found[1][: len(SOURCE)], own * (x.norm(dim=-1) / own.norm(dim=-1))[:, None])


def test_two_rows_at_one_place_the_last_one_stays(engine: ToyEngine) -> None:
    at = {"tokens": {"positions": [-1, len(TARGET) - 1]}, "source_positions": [0, 1]}
    found, _ = patched(engine, keep(engine, layers=[1]), **at)
    agree(found[1][-1], SOURCES[POST[1]][1])


def test_the_steps_that_a_patch_becomes(engine: ToyEngine) -> None:
    capture = keep(engine)
    steering = {"interventions": [{"op": "patch", "capture": capture, "layers": "1-2"}]}
    told = engine.http.post("/v1/steering/resolve", json={"steering": steering, "prompt": TARGET}).json()
    (step,) = told["interventions"]
    assert step["prompt_positions"] == [[0, len(SOURCE)]]
    assert (step["path"], step["layers"]) == ("steering.interventions[0]", [1, 2])
    assert step["assets"] == [f"capture@{capture}"]
    assert told["cost"]["rows"] == 2 * len(SOURCE)


def test_a_capture_that_is_gone_is_gone_for_remembered_plans_too(engine: ToyEngine) -> None:
    capture = keep(engine)
    patched(engine, capture)
    assert engine.http.delete(f"{PATH}/{capture}").status_code == 204
    assert refused(engine, capture=capture) == (404, "capture_not_found", "capture")


# -- what is refused ------------------------------------------------------------------------------------


def refused(engine: ToyEngine, **fields: Any) -> tuple[int, str, str]:
    """Status, code and the patch's field."""
    body = {"steering": {"interventions": [{"op": "patch", **fields}]}}
    response = engine.http.post("/v1/steering/resolve", json=body)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"].removeprefix("steering.interventions[0].")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"layers": 9}, "layer_out_of_range", "layers"),
    ({"layers": 3}, "layer_missing", "layers"),
    ({"site": "mlp_out"}, "site_unsupported", "site"),
    ({"prompt": 2}, "out_of_range", "prompt"),
    ({"source_positions": []}, "invalid_steering", "source_positions"),
    ({"source_positions": [0, 6]}, "out_of_range", "source_positions[1]"),
    ({"source_positions": [-7]}, "out_of_range", "source_positions[0]"),
    ({"source_positions": [1, 1]}, "invalid_steering", "source_positions"),
    ({"tokens": {"positions": [1, 2]}}, "invalid_steering", "tokens.positions"),
    ({"tokens": {"positions": [1, 2, 3, 4, 5, 5]}}, "invalid_steering", "tokens.positions"),
    ({"tokens": "prompt"}, "invalid_steering", "tokens"),
    ({"tokens": {"positions": [1, 2, 3, 4, 5, 6], "generated": True}}, "invalid_steering", "tokens"),
    ({"basis": inline(noise(D + 1))}, "width_mismatch", "basis"),
    ({"basis": inline(torch.zeros(D))}, "invalid_steering", "basis"),
    ({"basis": "nobody"}, "asset_not_found", "basis"),
    ({"scale": 2}, "unknown_field", "scale"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD, ids=[f"{p}-{i}" for i, (_, _, p) in enumerate(BAD)])
def test_bad_patches_name_their_field(engine: ToyEngine, fields: dict[str, Any], code: str, param: str) -> None:
    capture = keep(engine, SOURCE, [1, 2], layers=[1, 2])
    status, its_code, its_param = refused(engine, capture=capture, **fields)
    assert (status // 100, its_code, its_param) == (4, code, param)


def test_captures_that_cannot_be_patched_in(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(engine, capture="x") == (400, "invalid_steering", "capture")
    assert refused(engine, capture="0" * 64) == (404, "capture_not_found", "capture")
    both = keep(engine, sites=["resid_pre", "resid_post"])
    assert refused(engine, capture=both) == (400, "invalid_steering", "site")
    reduced = keep(engine, reduce="mean")
    assert refused(engine, capture=reduced, source_positions=[0]) == (400, "invalid_steering", "source_positions")
    monkeypatch.setattr(engine.frontend.resolver.library, "_names", {"another"})
    assert refused(engine, capture=both) == (400, "model_mismatch", "capture")
