"""Histograms filled by the bucket look as if each value had been observed, in both of prometheus_client's modes."""

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from steersman.server.histograms import PreBucketed

BOUNDS = (0.0, 1.0, 2.5)
VALUES = (-1.0, 0.5, 1.0, 2.0, 2.0, 9.0)
COUNTS = (1, 2, 2, 1)


def exposed(kind: type[Histogram]) -> str:
    registry = CollectorRegistry()
    made = kind("h", "help", ["layer"], buckets=BOUNDS, registry=registry)
    if isinstance(made, PreBucketed):
        made.labels("3").add(COUNTS, sum(VALUES))
        made.labels("3").add((0, 0, 0, 1), 8.5)
    else:
        for v in (*VALUES, 8.5):
            made.labels("3").observe(v)
    return "\n".join(s for s in generate_latest(registry).decode().splitlines() if "_created" not in s)


def test_it_shows_what_observed_values_would() -> None:
    ours, theirs = exposed(PreBucketed), exposed(Histogram)
    assert ours == theirs
    assert 'h_bucket{layer="3",le="1.0"} 3.0' in ours
    assert 'h_count{layer="3"} 7.0' in ours


def test_a_wrong_number_of_buckets_and_missing_labels() -> None:
    made = PreBucketed("h", "help", ["layer"], buckets=BOUNDS, registry=CollectorRegistry())
    with pytest.raises(ValueError, match="3 counts for 4 buckets"):
        made.labels("1").add((1, 2, 3), 0.0)
    with pytest.raises(ValueError, match="label values"):
        made.add(COUNTS, 0.0)


WRITER = """
import sys
from prometheus_client import CollectorRegistry
from steersman.server.histograms import PreBucketed
h = PreBucketed("h", "help", ["layer"], buckets=(0.0, 1.0, 2.5), registry=CollectorRegistry())
h.labels("3").add((1, 2, 2, 1), float(sys.argv[1]))
"""
READER = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_processes_add_up(tmp_path: Path) -> None:
    """As vLLM has it where several processes serve HTTP: whichever is scraped tells of all."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": ""}
    for total in ("5.0", "7.0"):
        subprocess.run([sys.executable, "-c", WRITER, total], check=True, env=env)
    run = subprocess.run([sys.executable, "-c", READER], check=True, env=env, capture_output=True, text=True)
    for line in ('h_bucket{layer="3",le="1.0"} 6.0', 'h_count{layer="3"} 12.0', 'h_sum{layer="3"} 12.0'):
        assert line in run.stdout
