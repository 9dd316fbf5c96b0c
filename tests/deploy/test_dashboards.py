"""The committed dashboards: what the code makes, valid by Grafana's own types, laid out without gaps or overlaps.

No Grafana runs here. The schema was made from @grafana/schema's types by deploy/grafana/schema/make.sh.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.grafana import generate
from deploy.grafana.panels import WIDTH
from tests.deploy.prometheus import DEPLOY, dashboards

BOARDS = dashboards()
SCHEMAS = json.loads(gzip.decompress((DEPLOY / "grafana/schema/dashboard.schema.json.gz").read_bytes()))


def faults(board: dict[str, Any]) -> list[str]:
    """What Grafana's types have against a dashboard, and against the options of each of its panels."""
    found = _against("dashboard", {"dashboard": board})
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        given = {"options": panel["options"]}
        if panel["type"] != "stat":  # which has no field settings of its own
            given["custom"] = panel.get("fieldConfig", {}).get("defaults", {}).get("custom", {})
        found += [f"{panel['title']}: {fault}" for fault in _against(panel["type"], given)]
    return found


def _against(schema: str, instance: dict[str, Any]) -> list[str]:
    errors = jsonschema.Draft7Validator(SCHEMAS[schema]).iter_errors(instance)
    return [f"{error.json_path}: {error.message}" for error in errors]


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return list(board["panels"])


def test_they_are_what_the_code_makes() -> None:
    """Otherwise: python -m deploy.grafana.generate."""
    assert {name: json.dumps(board) for name, board in BOARDS.items()}.keys() == generate.files().keys()
    for name, text in generate.files().items():
        assert (generate.FOLDER / name).read_bytes() == text.encode(), f"{name} is out of date"


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_types_accept_them(name: str) -> None:
    assert faults(BOARDS[name]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("timezon",), "browser"),
        (("graphTooltip",), 7),
        (("panels", 1, "gridPos", "w"), "wide"),
        (("panels", 1, "options", "colour"), {}),
        (("panels", 1, "options", "color", "scale"), "cubic"),
        (("panels", 1, "options", "cellGap"), "none"),
    ],
)
def test_the_schema_refuses_what_is_wrong(path: tuple[str | int, ...], value: Any) -> None:
    board: Any = copy.deepcopy(BOARDS["layers.json"])
    assert board["panels"][1]["type"] == "heatmap"
    place = board
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert faults(board)


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_the_grid(name: str) -> None:
    """Every line of it is full, and no cell is taken twice."""
    cells = [
        (x, y)
        for panel in BOARDS[name]["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    height = max(y for _, y in cells) + 1
    assert sorted(cells) == [(x, y) for x in range(WIDTH) for y in range(height)]


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows(name: str) -> None:
    for panel in panels(BOARDS[name]):
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["targets"], panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_every_variable_is_used(name: str) -> None:
    text = json.dumps([BOARDS[name]["panels"], BOARDS[name]["templating"]])
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == {v["name"] for v in BOARDS[name]["templating"]["list"]}


def test_ids_are_unique() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)
    for board in BOARDS.values():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)


def test_they_ask_the_provisioned_datasource() -> None:
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (source,) = provisioned["datasources"]
    for board in BOARDS.values():
        (choice,) = (v for v in board["templating"]["list"] if v["type"] == "datasource")
        assert (choice["query"], choice["current"]["value"]) == (source["type"], source["uid"])
        for panel in board["panels"]:
            for asked in (panel, *panel.get("targets", ())):
                assert asked.get("datasource", {}).get("uid") in (None, "${datasource}")


def test_rates_see_enough_scrapes() -> None:
    """Grafana takes the rate's window from the datasource's interval, which must be Prometheus's own."""
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert provisioned["datasources"][0]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_generating_writes_nothing_else(tmp_path: Path) -> None:
    generate.main(tmp_path / "new")
    assert {f.name: f.read_bytes() for f in (tmp_path / "new").iterdir()} == {
        f.name: f.read_bytes() for f in generate.FOLDER.iterdir()
    }
