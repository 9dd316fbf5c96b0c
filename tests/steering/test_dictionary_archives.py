"""Archives of arrays (.npz), and those that are not what they say."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from steersman.steering.errors import SteeringError
from steersman.steering.formats import uploads
from tests.steering.small_dictionary import MODEL, D, M, lens, tensors

NPZ = {"name": "gemma", "model": MODEL, "hook_name": "blocks.3.hook_resid_post"}


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **{**{name: tensor.numpy() for name, tensor in lens().items()}, **arrays})
    return out.getvalue()


def test_an_npz_is_gemma_scope() -> None:
    made = uploads.read(npz(), NPZ)
    assert torch.equal(made.tensors["encoder"], tensors()["encoder"])
    assert (made.meta.edited_layers, made.meta.kind) == ((3,), "dictionary")


def lying(shape: str) -> bytes:
    """An archive whose one array promises more than it has."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"\0" * 64
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("W_enc.npy", entry)
    return out.getvalue()


def headed(header: str) -> bytes:
    """An archive with one array whose header is this text."""
    padded = header.ljust(117) + "\n"
    entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + b"\0" * 64
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("W_enc.npy", entry)
    return out.getvalue()


def packed(compression: int) -> bytes:
    """A sound archive, packed as numpy never does: its blocks unpack whole, however large."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz())) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def twice() -> bytes:
    out = io.BytesIO(npz())
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("b_dec", archive.read("b_dec.npy"))
    return out.getvalue()


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", b"\0" * (64 << 20))
    return out.getvalue()


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
