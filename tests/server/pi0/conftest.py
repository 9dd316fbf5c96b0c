"""One tiny π0 for these tests, which take several seconds to make one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny_pi0 import build_pi0
from tests.server.pi0.served import Oracle, Station


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pi0(tmp_path_factory.mktemp("pi0"))


@pytest.fixture(scope="session")
def station(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Station:
    return Station(folder, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)
