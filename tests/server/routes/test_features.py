"""Uploading dictionaries and searching their labels through the routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from steersman.server import cli
from steersman.steering import dictionaries
from steersman.steering.assets import KINDS
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from tests.server.engine.test_captures import truth
from tests.server.fakes import client, frontend
from tests.server.toy_engine import ToyEngine
from tests.steering.library import REF, D

DATA = Path(__file__).parents[2] / "data" / "dictionaries"
CONFIG = json.loads((DATA / "jumprelu" / "cfg.json").read_text())
WEIGHTS = (DATA / "jumprelu" / "sae_weights.safetensors").read_bytes()
TEXTS = {"3": "sailing ships", "7": "shipping costs", "11": "the colour red"}
FIELDS = {"name": "sae", "model": REF, "config": CONFIG, "labels": TEXTS}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def post(http: Any, data: bytes = WEIGHTS, **changes: Any) -> Any:
    fields = {"metadata": json.dumps({**FIELDS, **changes})}
    return http.post("/v1/steering/assets", files={"file": ("sae.safetensors", data)}, data=fields)


def test_a_foreign_dictionary_is_uploaded_searched_and_used(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    http = client(frontend(tmp_path / "store"))
    answer = post(http)
    assert answer.status_code == 201, answer.text
    about = answer.json()
    assert (about["kind"], about["layer"], about["site"]) == ("dictionary", 2, "resid_post")
    found = http.get("/v1/steering/assets/sae/features", params={"query": "ship"}).json()
    assert (found["dictionary"], found["total"]) == (about["ref"], 2)
    assert {each["index"]: each["label"] for each in found["data"]} == {3: TEXTS["3"], 7: TEXTS["7"]}
    page = http.get("/v1/steering/assets/sae/features", params={"limit": 1, "offset": 2}).json()
    assert page["data"] == [{"index": 11, "label": TEXTS["11"]}]
    steering = {"interventions": [{"op": "feature", "dictionary": "sae", "index": [3, 7], "mode": "ablate"}]}
    plan = http.post("/v1/steering/resolve", json={"steering": steering}).json()
    assert plan["cost"]["rows"] == 2
    assert plan["interventions"][0]["layers"] == [2]


def test_the_whole_file_comes_back(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    http = client(frontend(tmp_path / "store"))
    ref = post(http).json()["ref"]
    whole = http.get(f"/v1/steering/assets/{ref}?format=safetensors").content
    other = tmp_path / "again"
    other.mkdir()
    back = client(frontend(other)).post("/v1/steering/assets", files={"file": ("sae.safetensors", whole)})
    assert back.json()["ref"] == ref


def test_labels_may_be_larger_than_a_part_of_a_form_is_by_itself(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    http = client(frontend(tmp_path / "store"))
    answer = post(http, labels=TEXTS, provenance={"note": "x" * (3 << 20)})
    assert answer.status_code == 201, answer.text[:200]


def test_a_large_one_goes_out_in_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.server.routes.assets.MAX_WHOLE", 1000)
    (tmp_path / "store").mkdir()
    http = client(frontend(tmp_path / "store"))
    ref = post(http).json()["ref"]
    refused = http.get(f"/v1/steering/assets/{ref}?format=json")
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "format")
    assert http.get(f"/v1/steering/assets/{ref}?format=safetensors").status_code == 200
    assert http.get("/v1/steering/assets/v?format=json").status_code == 200


def test_features_that_are_active_on_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(tmp_path, monkeypatch)
    ref = post(engine.http).json()["ref"]
    path = "/v1/steering/assets/sae/features"
    found = engine.http.get(path, params={"active_on": "hello", "limit": 3}).json()
    ids = engine.frontend.tokenizer.encode("hello")
    acts = dictionaries.encode(engine.frontend.store.get(ref), truth(None, ids)[Place(2, Site.RESID_POST)])
    assert (found["dictionary"], found["layer"], found["site"]) == (ref, 2, "resid_post")
    assert [t["id"] for t in found["tokens"]] == ids
    assert "".join(t["token"] for t in found["tokens"]) == "^hello"
    assert acts.count_nonzero(1).max() > 3, "a limit that cuts nothing shows nothing"
    for token, row in zip(found["tokens"], acts, strict=True):
        values, index = row.sort(descending=True)
        wanted = [(int(i), float(v)) for i, v in zip(index[:3], values[:3], strict=True) if v > 0]
        told = [(one["index"], one["activation"]) for one in token["features"]]
        assert [i for i, _ in told] == [i for i, _ in wanted]
        assert [v for _, v in told] == pytest.approx([v for _, v in wanted], rel=1e-5)
        assert all(one["label"] == TEXTS.get(str(one["index"])) for one in token["features"])
    peaks, where = acts.max(0)
    strongest = peaks.argsort(descending=True)[:3].tolist()
    assert [(one["index"], one["position"]) for one in found["data"]] == [(i, int(where[i])) for i in strongest]
    every = engine.http.get(path, params={"active_on": "hello", "limit": 1000}).json()
    assert {one["index"] for one in every["data"]} == set(peaks.nonzero().flatten().tolist())
    assert {one["label"] for one in every["data"]} > {None}
    assert engine.idle()


def test_a_text_that_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(tmp_path, monkeypatch)
    post(engine.http)
    answer = engine.http.get("/v1/steering/assets/sae/features?active_on=")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "active_on")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("sae/features?active_on=hello&query=ship", "active_on"),
        ("sae/features?active_on=hello&offset=3", "active_on"),
        ("v/features?active_on=hello", "ref"),
        ("sae/features?query=%20", "query"),
        ("v/features", "ref"),
        ("nope/features", "ref"),
    ],
)
def test_bad_searches_name_their_field(tmp_path: Path, path: str, param: str) -> None:
    (tmp_path / "store").mkdir()
    http = client(frontend(tmp_path / "store"))
    assert post(http).status_code == 201
    answer = http.get(f"/v1/steering/assets/{path}")
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"format": "nonsense"}, "format"),
        ({"format": ["saelens"]}, "format"),
        ({"config": {**CONFIG, "architecture": "topk", "k": 10**400}}, "config.k"),
        ({"config": {**CONFIG, "architecture": "temporal"}}, "config.architecture"),
        ({"labels": {"99": "too far"}}, "labels"),
        ({"labels": 3}, "labels"),
        ({"model": {"id": "tiny", "d_model": D}}, "model.n_layers"),
        ({"model": {**REF, "d_model": D + 1}}, "tensors.decoder"),
        ({"layer": 99}, None),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_uploads_name_their_field_and_write_nothing(
    tmp_path: Path, changes: dict[str, Any], param: str | None
) -> None:
    (tmp_path / "store").mkdir()
    made = frontend(tmp_path / "store")
    before = [info.ref for info in made.store.list()]
    answer = post(client(made), **changes)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert [info.ref for info in made.store.list()] == before


def test_the_command_line_adds_folders_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(TEXTS))
    store = ["assets", "--store", str(tmp_path / "store")]
    metadata = json.dumps({"model": REF})
    add = [*store, "add", str(DATA / "jumprelu"), "--kind", "dictionary", "--name", "sae", "--metadata", metadata]
    assert cli.main([*add, "--labels", str(tmp_path / "labels.json")]) == 0
    assert capsys.readouterr().out.startswith("sae@")
    assert cli.main([*store, "list", "--kind", KINDS[1]]) == 0
    assert "\tdictionary\torg/tiny\t2\t" in capsys.readouterr().out
    assert cli.main([*store, "export", "sae", str(tmp_path / "out"), "--saelens"]) == 0
    assert (
        safetensors.torch.load_file(tmp_path / "out" / "sae_weights.safetensors").keys()
        == safetensors.torch.load(WEIGHTS).keys()
    )
    capsys.readouterr()
    assert cli.main([*add, "--format", "gemma_scope"]) == 1
    assert "layer" in capsys.readouterr().err
    bad = tmp_path / "bad"
    bad.mkdir()
    state = safetensors.torch.load(WEIGHTS) | {"b_dec": torch.full((D,), torch.nan)}
    safetensors.torch.save_file(state, bad / "sae_weights.safetensors")
    (bad / "cfg.json").write_text(json.dumps(CONFIG))
    assert cli.main([*store, "add", str(bad), "--kind", "dictionary", "--name", "b", "--metadata", metadata]) == 1
    assert "NaN" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--kind dictionary"):
        cli.main([*store, "add", str(bad / "sae_weights.safetensors"), "--labels", str(tmp_path / "labels.json")])
    assert len(list((tmp_path / "store").iterdir())) == 1
