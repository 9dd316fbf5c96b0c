"""Runs kernels/cuda on the processor, by the C++ compiler that is there."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels" / "cuda"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-psabi"),
    *("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"),  # as a GPU faults
    *(f"-I{HERE}", f"-I{KERNELS}"),
)


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


class Emulator:
    """Stands in for :class:`steersman.kernels.cuda_library.Library`; its rows lie in the processor's memory."""

    processors = 1
    max_shared = 2**18

    def __init__(self) -> None:
        self._launch = _loaded().launch
        self._launch.restype = ctypes.c_char_p
        self.launches = 0

    def launch(self, name: str, grid: int, threads: int, shared: int, arguments: bytes) -> None:
        """Blocks of any grid take all rows in turn, so at most three do: each then has several."""
        self.launches += 1
        wrong = self._launch(name.encode(), min(grid, 3), threads, shared, arguments, self.launches)
        assert wrong == b"", wrong


@cache
def _loaded() -> ctypes.CDLL:
    out = Path(mkdtemp()) / "emulation.so"
    found = compiler()
    assert found is not None
    subprocess.run([found, *FLAGS, str(HERE / "cuda_emulation.cpp"), "-o", str(out)], check=True, timeout=300)
    return ctypes.CDLL(str(out))
