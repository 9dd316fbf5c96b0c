"""The dashboards' pictures in the docs: a real server under load, a real Prometheus, and what it answers.

    python -m benchmarks.dashboards [--minutes 3] [--out docs/images]

Everything runs on this machine: a tiny robot policy with the traffic of the end-to-end tests, and the ``prometheus``
on the PATH (Debian's package), which scrapes it every second. No Grafana: :mod:`deploy.grafana.render` draws.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from deploy.grafana.render import render
from tests.deploy.prometheus import run_prometheus
from tests.e2e.traffic import THRESHOLDS, serving, traffic

LARGEST = 250_000
"""Bytes of a picture in the repository."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the dashboards of a real server under load.")
    parser.add_argument("--minutes", type=float, default=3, help="of traffic, all of which is drawn")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    if shutil.which("prometheus") is None:
        raise SystemExit("prometheus is not on the PATH (Debian: apt-get install prometheus)")
    seconds = 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as server, traffic(server):
        target = server.url.removeprefix("http://")
        with run_prometheus([target], Path(name) / "prometheus", THRESHOLDS) as prometheus:
            time.sleep(seconds)
            paths = render(prometheus.url, arguments.out, seconds, {})
    for path in paths:
        size = path.stat().st_size
        print(f"{path}: {size} bytes")
        if size > LARGEST:
            raise SystemExit(f"{path} is larger than {LARGEST} bytes: draw it with fewer dots per inch")


if __name__ == "__main__":
    main()
