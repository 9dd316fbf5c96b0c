"""Archives of arrays (.npz), and those that are not what they say."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

from steersman.steering.errors import SteeringError
from steersman.steering.formats import uploads
from tests.steering.archives import NPZ, bomb, headed, lying, npz, packed, twice
from tests.steering.small_dictionary import D, M, tensors


def test_an_npz_is_gemma_scope() -> None:
    made = uploads.read(npz(), NPZ)
    assert torch.equal(made.tensors["encoder"], tensors()["encoder"])
    assert (made.meta.edited_layers, made.meta.kind) == ((3,), "dictionary")


@pytest.mark.parametrize(
    "data",
    [
        npz()[:-30],
        npz()[:100],
        b"PK\x03\x04",
        lying("(1000000000000,)"),
        lying("(2305843009213693952, 8)"),
        lying("(-1,)"),
        bomb(),
        packed(zipfile.ZIP_BZIP2),
        packed(zipfile.ZIP_LZMA),
        twice(),
        headed("((("),
        headed("{1: 2, 'a': 3}"),
        headed("{[]: 1}"),
        headed("-" * 9000 + "1"),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2)}"),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}"),
        npz(W_enc=np.array([{"a": 1}], dtype=object)),
        npz(W_enc=np.zeros((D, M), dtype=np.int32)),
        npz(w_enc=np.zeros((D, M), dtype=np.float32), other=np.zeros(3, dtype=np.float32)),
    ],
)
def test_bad_archives_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(SteeringError) as raised:
        uploads.read(data, {**NPZ, "format": "gemma_scope"})
    assert raised.value.status == 400
