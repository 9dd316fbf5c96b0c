from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from steersman.server.engine.frontend import Frontend
from steersman.steering.formats import gguf, native
from tests.server.fakes import client, frontend
from tests.steering.archives import NPZ, bomb, lying, npz
from tests.steering.library import LAYERS, REF, D, asset, noise, vector

ASSETS = "/v1/steering/assets"
PROFILE = asset("p", "profile", steering={"interventions": []})


@pytest.fixture
def made(tmp_path: Path) -> Frontend:
    return frontend(tmp_path)


@pytest.fixture
def http(made: Frontend) -> TestClient:
    return client(made)


def error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def gauge(http: TestClient, kind: str) -> float:
    return float(http.app.state.steersman.metrics.store_assets.labels(kind)._value.get())  # type: ignore[attr-defined]


def names(answer: Any) -> list[str]:
    return [a["name"] for a in answer.json()["data"]]


def test_listing_and_filters(http: TestClient) -> None:
    everything = http.get(ASSETS).json()
    assert everything["object"] == "list"
    assert {"v", "calm", "cluster", "map"} < set(names(http.get(ASSETS)))
    assert names(http.get(ASSETS, params={"kind": "affine"})) == ["map", "wide-map"]
    assert names(http.get(ASSETS, params={"text": "CLUST"})) == ["cluster"]
    assert names(http.get(ASSETS, params={"model": "org/tiny", "kind": "neurons"})) == ["cluster", "far"]
    assert names(http.get(ASSETS, params={"model": "other"})) == []
    assert error(http.get(ASSETS, params={"kind": "spell"}), 400)["param"] == "kind"


def test_one_asset_with_its_provenance(http: TestClient, made: Frontend) -> None:
    found = http.get(f"{ASSETS}/v").json()
    info = made.store.info("v")
    assert (found["ref"], found["version"], found["sha256"]) == (info.ref, info.version, info.sha256)
    assert found["recommended"]["scale"] == 6.0
    assert "tensors" not in found
    assert http.get(f"{ASSETS}/v@{info.version[:3]}").json() == found


def test_uploads_of_every_form_come_back_alike(http: TestClient) -> None:
    own = vector("new", noise(2, D), [1, 3], description="a sea, calm", provenance={"by": "é"})
    answers = [
        http.post(ASSETS, json=native.to_json(own)),
        http.post(ASSETS, files={"file": native.to_safetensors(own)}),
        http.post(ASSETS, files={"file": gguf.to_gguf(own)}),
        http.post(
            ASSETS,
            files={"file": native.to_safetensors(own)},
            data={"metadata": json.dumps({k: v for k, v in native.to_json(own).items() if k != "tensors"})},
        ),
    ]
    assert [a.status_code for a in answers] == [201] * 4, [a.text for a in answers]
    assert {a.json()["ref"] for a in answers} == {own.ref}
    assert gauge(http, "vector") == len(http.get(ASSETS, params={"kind": "vector"}).json()["data"])


@pytest.mark.parametrize("ref", ["v", "plane", "map", "calm", "cluster"])
def test_what_is_fetched_can_be_uploaded_again(http: TestClient, made: Frontend, ref: str) -> None:
    whole = http.get(f"{ASSETS}/{ref}", params={"format": "json"})
    assert native.from_json(whole.content).ref == made.store.info(ref).ref
    if "tensors" in whole.json() and whole.json()["tensors"]:
        data = http.get(f"{ASSETS}/{ref}", params={"format": "safetensors"})
        assert data.headers["content-disposition"] == f'attachment; filename="{ref}.safetensors"'
        assert native.from_safetensors(data.content).ref == made.store.info(ref).ref


def test_gguf_out(http: TestClient, made: Frontend) -> None:
    data = http.get(f"{ASSETS}/v", params={"format": "gguf"}).content
    assert gguf.from_gguf(data).ref == made.store.info("v").ref
    assert error(http.get(f"{ASSETS}/calm", params={"format": "gguf"}), 400)["code"] == "asset_kind_mismatch"
    assert error(http.get(f"{ASSETS}/v", params={"format": "pickle"}), 400)["param"] == "format"


def test_a_foreign_gguf_needs_the_model_named(http: TestClient) -> None:
    own = vector("new", noise(2, D), [1, 3])
    data = gguf.to_gguf(own).replace(gguf.ASSET_KEY.encode(), b"x" * len(gguf.ASSET_KEY))
    assert error(http.post(ASSETS, files={"file": data}), 400)["param"] == "model"
    good = http.post(ASSETS, files={"file": data}, data={"metadata": json.dumps({"name": "new", "model": REF})})
    assert good.status_code == 201, good.text
    assert good.json()["layers"] == [1, 3]
    for bad, param in (
        ({"name": "new", "model": "tiny"}, "metadata.model"),
        ({"name": "new", "model": {"id": "x"}}, "metadata.model.n_layers"),
        ({"model": REF}, "name"),
        ({"name": "new", "model": REF, "data": "x"}, "data"),
        ({"name": 3, "model": REF}, "name"),
    ):
        found = error(http.post(ASSETS, files={"file": data}, data={"metadata": json.dumps(bad)}), 400)
        assert found["param"] == param


def test_versions(http: TestClient) -> None:
    refs = [
        http.post(ASSETS, json=native.to_json(vector("new", noise(1, D, seed=i), [1]))).json()["ref"] for i in (1, 2)
    ]
    assert http.get(f"{ASSETS}/new").json()["ref"] == refs[1]
    for ref in refs:
        assert http.get(f"{ASSETS}/{ref[: len('new@') + 5]}").json()["ref"] == ref
    assert error(http.get(f"{ASSETS}/new@ffffffffffff"), 404)["param"] == "ref"
    assert http.delete(f"{ASSETS}/{refs[1]}").json() == {"removed": [refs[1]]}
    assert http.get(f"{ASSETS}/new").json()["ref"] == refs[0]
    assert http.delete(f"{ASSETS}/new").json() == {"removed": [refs[0]]}
    assert error(http.get(f"{ASSETS}/new"), 404)["code"] == "asset_not_found"
    assert error(http.delete(f"{ASSETS}/new"), 404)["param"] == "ref"


GOOD = native.to_safetensors(vector("new", noise(1, D), [1]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        GOOD[:8],
        struct.pack("<Q", 2**63) + GOOD[8:],
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
        gguf.to_gguf(vector("new", noise(1, D), [1]))[:-40],
        b"PK\x03\x04 a pickle",
        b"\x80\x04\x95",
    ],
)
def test_corrupt_and_truncated_files(http: TestClient, data: bytes) -> None:
    before = names(http.get(ASSETS))
    found = error(http.post(ASSETS, files={"file": data}), 400)
    assert (found["code"], found["param"]) == ("upload_malformed", "file")
    assert names(http.get(ASSETS)) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b"{", "body"),
        (b'{"name": "x", "name": "y"}', "body"),
        (b'{"name": NaN}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"kind": "spell"}', "kind"),
        (b"{}", "kind"),
        (b'{"kind": "vector"}', "name"),
    ],
)
def test_json_that_is_no_asset(http: TestClient, body: bytes, param: str) -> None:
    found = error(http.post(ASSETS, content=body, headers={"content-type": "application/json"}), 400)
    assert found["param"] == param


def test_a_recipe_is_json_and_gets_its_layers(http: TestClient) -> None:
    rates = [0.1, 0.4, 0.3, 0.2]
    recipe = {"kind": "recipe", "name": "iri", "model": REF, "rr_attn": rates, "rr_mlp": rates}
    recipe |= {"lambda_a": 0.26, "lambda_m": 0.16}
    made = http.post(ASSETS, json=recipe)
    assert made.status_code == 201, made.text
    told = http.get(f"{ASSETS}/iri").json()
    assert told["sources"] == {"attn": [1, 2, 3], "mlp": [1, 2, 3]}
    assert told["targets"] == {"attn": [0, 1, 2, 3], "mlp": [0, 1, 2, 3]}
    late = {**recipe, "name": "late", "sources": {"attn": [3]}, "targets": {"attn": [1, 3]}}
    found = error(http.post(ASSETS, json=late), 400)
    assert (found["param"], "no target comes after layer 3" in found["message"]) == ("targets", True)
    assert "late" not in names(http.get(ASSETS))


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"name": "../../etc/passwd"}, "name", "invalid_steering"),
        ({"name": ".hidden"}, "name", "invalid_steering"),
        ({"name": "a/b"}, "name", "invalid_steering"),
        ({"name": "a..b"}, "name", "invalid_steering"),
        ({"name": "a\x00b"}, "name", "invalid_steering"),
        ({"name": ""}, "name", "invalid_steering"),
        ({"name": "x" * 200}, "name", "invalid_steering"),
        ({"name": "server-default.tiny"}, "name", "invalid_steering"),
        ({"layers": [1, 9]}, None, "layer_out_of_range"),
        ({"layers": [1, 1]}, "layers", "invalid_steering"),
        ({"layers": [1]}, "tensors.vectors", "invalid_steering"),
        ({"site": "nowhere"}, "site", "invalid_steering"),
        ({"colour": "red"}, "colour", "unknown_field"),
        ({"model": {**REF, "colour": 1}}, "model.colour", "unknown_field"),
        ({"model": {**REF, "d_model": 9}}, "tensors.vectors", "width_mismatch"),
        ({"recommended": {"scale": 1e999}}, "body", "invalid_steering"),
        ({"tensors": {}}, "tensors", "invalid_steering"),
        ({"tensors": []}, "tensors", "invalid_steering"),
        ({"tensors": {"vectors": "x"}}, "tensors.vectors", "inline_malformed"),
        ({"tensors": {"vectors": {"dtype": "float32", "shape": [2, 2**40], "data": ""}}}, None, "inline_malformed"),
        ({"tensors": {"vectors": {"dtype": "int8", "shape": [2, 8], "data": ""}}}, None, "inline_malformed"),
        ({"tensors": {"vectors": {"dtype": "float32", "shape": [2, 8], "data": "%%"}}}, None, "inline_malformed"),
        ({"tensors": {"vectors": [[1e39] * D] * 2}}, "tensors.vectors", "non_finite"),
        ({"tensors": {"\ud800": [[1]]}}, "tensors", "invalid_steering"),
        ({"description": "\ud800"}, "description", "invalid_steering"),
    ],
)
def test_metadata_that_is_wrong(http: TestClient, change: dict[str, Any], param: str | None, code: str) -> None:
    whole = {**native.to_json(vector("new", noise(2, D), [1, 3])), **change}
    answer = http.post(ASSETS, content=json.dumps(whole), headers={"content-type": "application/json"})
    found = error(answer, 400)
    assert found["code"] == code
    assert param is None or found["param"] == param
    assert "new" not in names(http.get(ASSETS))


def test_text_that_is_not_unicode_does_not_break_the_list(http: TestClient) -> None:
    whole = {**native.to_json(PROFILE), "provenance": {"by": "\ud800"}}
    answer = http.post(ASSETS, content=json.dumps(whole), headers={"content-type": "application/json"})
    assert answer.status_code in (201, 400)
    assert http.get(ASSETS).status_code == 200


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, "content-type"),
        ({"content": b"x"}, "content-type"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "body"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "body"),
        ({"files": {"other": b"x"}}, "file"),
        ({"files": [("file", b"x"), ("file", b"y")]}, "body"),
        ({"files": {"file": GOOD}, "data": {"metadata": "["}}, "metadata"),
        ({"files": {"file": GOOD}, "data": {"metadata": "[]"}}, "metadata"),
        ({"files": {"file": GOOD}, "data": {"metadata": "null"}}, "metadata"),
        ({"files": {"file": GOOD}, "data": {"metadata": '{"kind": 3}'}}, "metadata.kind"),
        ({"files": {"file": GOOD}, "data": {"metadata": "x" * (2**24 + 1)}}, "body"),
        ({"files": {"file": GOOD}, "data": {"a": "1", "b": "2"}}, "body"),
        ({"files": {"metadata": GOOD}}, "file"),
    ],
)
def test_forms_that_are_wrong(http: TestClient, kwargs: dict[str, Any], param: str) -> None:
    assert error(http.post(ASSETS, **kwargs), 400)["param"] == param


@pytest.mark.parametrize(
    "ref",
    ["..", "..%2F..%2Fetc%2Fpasswd", "%2e%2e", "v@..", "v@zz", "v@", "@abc", "v%00", ".tmp-x", "v%2Fx", "%ff", "a b"],
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_names_that_lead_elsewhere(http: TestClient, made: Frontend, tmp_path: Path, ref: str, method: str) -> None:
    (tmp_path.parent / "asset.json").write_text("{}")
    before = sorted(info.ref for info in made.store.list())
    assert http.request(method, f"{ASSETS}/{ref}").status_code in (404, 405)
    assert sorted(info.ref for info in made.store.list()) == before


def test_a_damaged_version_is_said_and_counted(http: TestClient, made: Frontend, tmp_path: Path) -> None:
    info = made.store.info("v")
    (tmp_path / "v" / info.version / "tensors.safetensors").write_bytes(b"broken")
    assert error(http.get(f"{ASSETS}/v", params={"format": "json"}), 500)["code"] == "asset_corrupt"
    errors = http.app.state.steersman.metrics.store_errors  # type: ignore[attr-defined]
    assert errors.labels("asset_corrupt")._value.get() == 1


@pytest.mark.parametrize(
    ("steering", "param"),
    [
        ({"interventions": 3}, "steering.interventions"),
        ({"interventions": [{"op": "add"}]}, "steering.interventions[0].vector"),
        ({"profile": "calm"}, "steering.profile"),
    ],
)
def test_profiles_are_read_when_they_are_stored(http: TestClient, steering: Any, param: str) -> None:
    assert error(http.post(ASSETS, json={**native.to_json(PROFILE), "steering": steering}), 400)["param"] == param


def test_what_the_default_needs_cannot_be_deleted(http: TestClient, made: Frontend) -> None:
    newer = http.post(ASSETS, json=native.to_json(vector("v", noise(2, D, seed=9), [1, 3]))).json()["ref"]
    older = next(info.ref for info in made.store.list(text="v") if info.name == "v" and info.ref != newer)
    assert http.put("/v1/steering/default", json={"profile": "calm"}).status_code == 200
    for ref in ("calm", "v", newer):
        assert error(http.delete(f"{ASSETS}/{ref}"), 409)["code"] == "asset_in_use"
    assert http.delete(f"{ASSETS}/{older}").status_code == 200
    assert http.delete("/v1/steering/default").status_code == 204
    assert http.delete(f"{ASSETS}/calm").status_code == 200


def test_tensors_of_every_dtype(http: TestClient) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        own = vector("new", noise(1, D).to(dtype), [LAYERS - 1])
        assert http.post(ASSETS, json=native.to_json(own)).json()["ref"] == own.ref
    assert len(base64.b64decode(native.to_json(own)["tensors"]["vectors"]["data"])) == 2 * D


def files(folder: Path) -> dict[str, int]:
    """Every file below and when it was written, hidden ones too; and what lies beside the folder and above it."""
    found = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return found | {str(path): 0 for above in folder.parents[:2] for path in above.iterdir()}


@pytest.mark.parametrize(
    ("data", "metadata"),
    [
        (bomb(), NPZ),
        (lying("(1000000000000,)"), NPZ),
        (npz()[:-30], NPZ),
        (npz(), {**NPZ, "name": "../../gemma"}),
        (npz(), {**NPZ, "name": "gemma/../../x"}),
        (npz(), {**NPZ, "hook_name": "../blocks.3"}),
        (npz(), {**NPZ, "layer": 3, "site": "attn_z\x00"}),
        (npz(), {**NPZ, "labels": {"99": "beyond"}}),
        (npz(), {**NPZ, "kind": "vector"}),
        (npz(W_enc=np.full((6, 9), np.nan, np.float32)), NPZ),
        (npz(b_enc=np.zeros((9, 1), np.float32)), NPZ),
        (GOOD[:-1], None),
        (struct.pack("<Q", 2**63) + GOOD[8:], None),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), None),
        (gguf.to_gguf(vector("new", noise(1, D), [1]))[:-40], None),
    ],
)  # fmt: skip
def test_of_a_refused_upload_no_file_is_left(
    http: TestClient, tmp_path: Path, data: bytes, metadata: dict[str, Any] | None
) -> None:
    """Not in the store, not beside it: bombs, lies, cut files, paths for names, wrong types."""
    before = files(tmp_path)
    form = {} if metadata is None else {"data": {"metadata": json.dumps(metadata)}}
    error(http.post(ASSETS, files={"file": data}, **form), 400)
    assert files(tmp_path) == before


def test_the_sound_one_of_these_is_stored(http: TestClient, tmp_path: Path) -> None:
    """Else the files above could be refused for anything."""
    before = files(tmp_path)
    answer = http.post(ASSETS, files={"file": npz()}, data={"metadata": json.dumps(NPZ)})
    assert answer.status_code == 201, answer.text
    assert len(files(tmp_path)) == len(before) + 2
