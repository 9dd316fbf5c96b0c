"""Archives of arrays (.npz), sound ones and others."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import numpy as np

from tests.steering.small_dictionary import MODEL, lens

NPZ = {"name": "gemma", "model": MODEL, "hook_name": "blocks.3.hook_resid_post"}


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **{**{name: tensor.numpy() for name, tensor in lens().items()}, **arrays})
    return out.getvalue()


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
