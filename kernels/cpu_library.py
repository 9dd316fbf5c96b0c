"""Compiles ``cpu_edit.cpp`` with the system's C++ compiler, once per machine, and loads it.

The library lies in the :mod:`steersman.kernels.cache`, named by the hash of its source, its flags and the
processor. ``STEERSMAN_CPU_KERNEL`` chooses: ``auto`` (compiled where it can be),
``cpp`` (an error where it cannot), ``torch``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from steersman.kernels import cache

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_edit.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"),
    *("-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wno-psabi", "-fPIC", "-shared", "-fvisibility=hidden"),
)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_P, _I = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = {
    # table; x, rows, stride; residual, stride; gates, stride; norms, stride; squares
    "edit": (_P, _P, _I, _I, _P, _I, _P, _I, _P, _I, _P),
    # x, rows, stride, width; chosen rows, count; carried; gates, stride; norms, stride; squares
    "inject": (_P, _I, _I, _I, _P, _I, _P, _P, _I, _P, _I, _P),
}

Edit = Callable[..., int]
Functions = Mapping[torch.dtype, Edit]


@dataclass(frozen=True)
class Library:
    brief: Functions  # for calls of a few microseconds: they keep the interpreter's lock
    long: Functions  # for longer ones: other Python threads run meanwhile
    inject_brief: Functions
    inject_long: Functions
    parallel: int  # address of the process's own GOMP_parallel, 0 where there is none


def backend() -> str:
    """What the environment asks for: ``auto``, ``cpp`` or ``torch``."""
    asked = os.environ.get("STEERSMAN_CPU_KERNEL", "auto")
    if asked not in ("auto", "cpp", "torch"):
        raise ValueError(f"STEERSMAN_CPU_KERNEL is {asked!r}, not auto, cpp or torch")
    return asked


def library(asked: str) -> Library | None:
    """The compiled kernel, or None where torch is to do the work."""
    if asked == "torch":
        return None
    found = _library()
    if found is None and asked == "cpp":
        raise RuntimeError("STEERSMAN_CPU_KERNEL is cpp, and the kernel could not be compiled")
    return found


@functools.cache
def _library() -> Library | None:
    try:
        path = _compiled()
        locked, free = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("CPU edits run in plain torch, which is slower: %s", error)
        return None
    edits, injections = ((_functions(locked, kind), _functions(free, kind)) for kind in ARGUMENTS)
    return Library(edits[0], edits[1], injections[0], injections[1], _parallel())


def _compiled() -> Path:
    """Where the library lies, compiled when it does not lie there yet."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    parts = (SOURCE.read_text(), compiler, *FLAGS, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = cache.folder() / f"{name}.so"
    if path.exists():
        return path
    with cache.written(path) as beside:
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(beside)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[:2000]}")
    return path


def _processor() -> str:
    """What ``native`` means here: one processor's model and instruction sets."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        first = [f"model name: {platform.processor()}"]
    kept = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([platform.machine(), *(line for line in first if line.startswith(kept))])


def _functions(loaded: ctypes.CDLL, kind: str) -> Functions:
    out = {}
    for dtype, name in NAMES.items():
        function = getattr(loaded, f"{kind}_{name}")
        function.restype = ctypes.c_int
        function.argtypes = ARGUMENTS[kind]
        out[dtype] = function
    return out


def _parallel() -> int:
    """The OpenMP runtime that torch already runs on, so that no second pool of threads competes with its own."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0
