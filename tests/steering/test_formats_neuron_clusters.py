"""Clusters as released with arXiv 2509.00328: files of its two forms, and what its ids mean."""

from __future__ import annotations

from typing import Any

import pytest

from steersman.steering.errors import InvalidRequest
from steersman.steering.formats.neuron_clusters import pairs, read

WITH_TOKENS = """
blank: {}

up_10:
  237682: ['up', 'Up', '[action: -0.227]']
  302720: ['raised', "it's"]
"""
BARE = "high_cluster:\n  - 256459\n  - 260217\n  - 40857\n"


def test_both_forms() -> None:
    assert read(WITH_TOKENS) == {"blank": [], "up_10": [237682, 302720]}
    assert read(BARE.encode()) == {"high_cluster": [256459, 260217, 40857]}
    assert read('{"a": {"7": ["x"]}, "b": [1, 2]}') == {"a": [7], "b": [1, 2]}


def test_ids_count_through_the_layers() -> None:
    """OpenVLA's 32 layers of 11008, π0-FAST's 18 of 16384."""
    assert pairs([237682, 302720], 32, 11008) == [(21, 6514), (27, 5504)]
    assert pairs([256459, 260217, 40857], 18, 16384) == [(15, 10699), (15, 14457), (2, 8089)]
    assert pairs([0, 11007, 11008, 32 * 11008 - 1], 32, 11008) == [(0, 0), (0, 11007), (1, 0), (31, 11007)]
    with pytest.raises(InvalidRequest, match="beyond 18 layers of 16384"):
        pairs([302720], 18, 16384)


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("", "clusters"),
        ("- 1\n- 2", "clusters"),
        ("a: 3", "clusters.a"),
        ("a: [1, x]", "clusters.a"),
        ("a: [-1]", "clusters.a"),
        ("a: [1.5]", "clusters.a"),
        ("a: [true]", "clusters.a"),
        ("a: [4, 4]", "clusters.a"),
        ("a: [1", "clusters"),
        ("a: !!python/object/apply:os.system [ls]", "clusters"),
        (b"\xff\xfe\x00", "clusters"),
    ],
)
def test_files_that_are_no_clusters(text: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(text)
    assert raised.value.param == param
