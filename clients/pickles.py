"""Opens what `torch.save` wrote. A pickle may do anything when it is opened, so this is the only place that opens one.

It belongs to the converter that a user runs on a file of theirs; nothing of the server imports it. Three fences:

1. The file is a zip archive of bounded size whose members together are no larger: nothing unpacks to more than it is.
2. The pickle's instructions are read, not run, and may name nothing but `_NAMES`.
3. `torch.load(weights_only=True)` runs them, and where it would call something foreign (numpy, a project's class), it
   calls a stand-in of this module, which only keeps numbers.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from steersman.steering.errors import PayloadTooLarge, UploadMalformed

MAX_BYTES: Final = 4 * 2**30  # of the file
MAX_PICKLE: Final = 2**20  # bytes of instructions; numbers lie beside them, but for a numpy array's
MAX_MEMBERS: Final = 65536
_PACKED: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # bzip2 and LZMA unpack a block whole, whatever its size
_FLOATS: Final = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}


class SteeringVectorFile:
    """In place of `steering_vectors.SteeringVector`."""

    layer_activations: Any
    layer_type: Any

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or set(state) != {"layer_activations", "layer_type"}:
            raise ValueError("not a steering vector's fields")
        self.__dict__.update(state)


class _DType:
    """In place of `numpy.dtype`: a little-endian float."""

    def __init__(self, code: str, *_flags: bool) -> None:
        if code not in _FLOATS:
            raise ValueError(f"an array of {str(code)[:16]!r}; wanted: floats")
        self.torch = _FLOATS[code]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[1] != "<":
            raise ValueError("an array that is not little-endian")


class _Array:
    """In place of `numpy.ndarray`."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _DType) or not isinstance(raw, bytes) or fortran:
            raise ValueError("not a plain array of floats")
        if not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) * dtype.torch.itemsize != len(raw):
            raise ValueError("an array whose bytes do not fit its shape")
        self.tensor = torch.frombuffer(bytearray(raw), dtype=dtype.torch).reshape(shape)


def _array(*_arguments: Any) -> _Array:
    """In place of numpy's `_reconstruct`, which makes an empty array for its state to fill."""
    return _Array()


_STAND_INS: Final[list[Any]] = [
    (SteeringVectorFile, "steering_vectors.steering_vector.SteeringVector"),
    (_DType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_array, "numpy.core.multiarray._reconstruct"),  # numpy 1
    (_array, "numpy._core.multiarray._reconstruct"),  # numpy 2
]
_NAMES: Final = {
    "_codecs.encode",  # how pickles of this age spell bytes
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    *(f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Int", "Long")),
    *(name for _, name in _STAND_INS),
}


def is_torch_file(path: Path) -> bool:
    """Whether the file begins as `torch.save` begins one: as a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read(path: Path) -> Any:
    """What was saved: a tensor, a `SteeringVectorFile`, or a dict of tensors and numbers; arrays become tensors.

    Raises `UploadMalformed` where the file is no such file or names anything else, `PayloadTooLarge` beyond MAX_BYTES.
    """
    if path.stat().st_size > MAX_BYTES:
        raise PayloadTooLarge(f"larger than {MAX_BYTES >> 30} GiB", "file")
    try:
        _check(path)
        with torch.serialization.safe_globals(_STAND_INS):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        return _plain(saved)
    except UploadMalformed:
        raise
    except Exception as error:  # neither zipfile, pickletools nor torch documents a list of what they raise
        raise UploadMalformed(f"not a readable torch file: {error}", "file") from error


def _check(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > path.stat().st_size:
            raise UploadMalformed("not a torch file: its members claim more than it holds", "file")
        if any(member.compress_type not in _PACKED for member in members):
            raise UploadMalformed("not a torch file: it is packed in a way that torch does not write", "file")
        # torch finds a member whatever its letters' case
        pickles = [member for member in members if member.filename.lower().endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise UploadMalformed("not a torch file of a vector: wanted is one pickle of at most 1 MiB", "file")
        instructions = archive.read(pickles[0])
    for opcode, argument, _at in pickletools.genops(instructions):
        if opcode.name == "PROTO" and argument != 2:
            raise UploadMalformed(f"not a torch file: its pickle is of protocol {argument}", "file")
        if opcode.name == "GLOBAL":
            named = str(argument).replace(" ", ".")
            if named not in _NAMES:
                raise UploadMalformed(f"it holds {named[:128]}, which no file of a direction needs", "file")


def _plain(value: Any) -> Any:
    """One level deep at most: what refers to itself, or to one thing a million times over, is no direction."""
    if isinstance(value, SteeringVectorFile):
        value.layer_activations = _flat(value.layer_activations)
        return value
    return _flat(value) if isinstance(value, dict) else _leaf(value)


def _flat(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UploadMalformed(f"it holds a {type(value).__name__} where a dict is wanted", "file")
    return {key: _leaf(item) for key, item in value.items()}


def _leaf(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.tensor
    if isinstance(value, Tensor):
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise UploadMalformed("a tensor is larger than its data", "file")
        return value.detach()
    if value is None or isinstance(value, str | int | float):
        return value
    raise UploadMalformed(f"it holds a {type(value).__name__}", "file")
