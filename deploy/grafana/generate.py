"""Writes the dashboards as JSON, in the form that Grafana's provisioning reads.

python -m deploy.grafana.generate [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.assets import assets
from deploy.grafana.layers import layers
from deploy.grafana.overview import overview
from deploy.grafana.robots import robots

FOLDER = Path(__file__).parent / "dashboards"


INTERVALS_ONLY = ("auto", "auto_count", "auto_min")
"""Fields that the SDK writes for every variable, and that Grafana knows for those of the type ``interval``."""


def files() -> dict[str, str]:
    """Each dashboard's file name and text."""
    boards = {"overview": overview(), "layers": layers(), "assets": assets(), "robots": robots()}
    return {f"{name}.json": _text(board) for name, board in boards.items()}


def _text(board: Dashboard) -> str:
    plain = json.loads(json.dumps(board, cls=JSONEncoder))
    for variable in plain["templating"]["list"]:
        for field in INTERVALS_ONLY:
            del variable[field]
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
