"""A Prometheus that scrapes a troubled server, shared by the tests that need its answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.exporter import exporting
from tests.deploy.prometheus import Prometheus, run_prometheus

DEAD = "127.0.0.1:1"
"""Nobody listens there: a server that is down."""


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with exporting() as target, run_prometheus([target, DEAD], folder, {"sentiment": 2.0}) as running:
        yield running
