"""Compiles ``cuda/edit.cu`` for the GPU at hand by NVRTC, once per machine, and launches its kernels.

No CUDA toolkit is needed: NVRTC and the driver are reached through ``cuda-bindings``, which torch's own CUDA builds
bring along with NVRTC. The compiled kernels lie in the :mod:`steersman.kernels.cache`, named by the hash of their
sources, the options, the GPU's architecture and NVRTC's version; a file that is damaged is compiled anew.

:func:`prepare` must have been called before the first launch is captured in a CUDA graph: loading is no part of one.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from steersman.kernels import cache as files

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("cuda")
MAIN, HEADER = FOLDER / "edit.cu", FOLDER / "parts.cuh"
OPTIONS = ("--std=c++17",)
DTYPES = ("float32", "bfloat16", "float16")
KERNELS = tuple(f"{k}_{t}{w}" for k in ("edit", "edit_and_norm") for t in DTYPES for w in ("", "_wide"))
DIGEST = 32  # bytes, of SHA-256: a file is the digest of what follows it


class CudaError(RuntimeError):
    """The compiler or the driver refused; says which call, and why."""


class Compiler(Protocol):
    version: str

    def compile(self, arch: str) -> bytes:
        """The kernels for an architecture (``sm_90``) as a cubin. Raises CudaError."""


class Nvrtc:
    """The compiler that torch's CUDA builds carry."""

    def __init__(self) -> None:
        self._nvrtc = _bindings("nvrtc")
        self.version = ".".join(map(str, self._check("nvrtcVersion")))

    def compile(self, arch: str) -> bytes:
        headers, names = [HEADER.read_bytes()], [HEADER.name.encode()]
        source, name = MAIN.read_bytes(), MAIN.name.encode()
        (program,) = self._check("nvrtcCreateProgram", source, name, len(headers), headers, names)
        try:
            options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture={arch}")]
            (error,) = self._nvrtc.nvrtcCompileProgram(program, len(options), options)
            if int(error):
                log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise CudaError(
                    f"NVRTC {self.version} cannot compile {MAIN.name} for {arch}: {error.name}\n{log[:2000]}"
                )
            return self._read(program, "CUBIN")
        finally:
            self._check("nvrtcDestroyProgram", program)

    def _read(self, program: Any, what: str) -> bytes:
        (size,) = self._check(f"nvrtcGet{what}Size", program)
        data = bytes(size)
        self._check(f"nvrtcGet{what}", program, data)
        return data

    def _check(self, call: str, *args: Any) -> tuple[Any, ...]:
        error, *out = getattr(self._nvrtc, call)(*args)
        if int(error):
            raise CudaError(f"{call}: {error.name}")
        return tuple(out)


class Library:
    """The kernels on one GPU. Made and used in the device's primary context, which is torch's."""

    def __init__(self, device: torch.device, compiler: Compiler | None = None) -> None:
        if device.type != "cuda":
            raise CudaError(f"the CUDA kernel runs on an NVIDIA GPU, not on {device}")
        if torch.cuda.is_current_stream_capturing():
            raise CudaError("the kernels must be loaded before a graph is captured: call prepare() first")
        self._driver = _bindings("driver")
        self._device = device
        found = torch.cuda.get_device_properties(device)
        self.processors = int(found.multi_processor_count)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the context, if nothing has yet
            image = cubin(f"sm_{found.major}{found.minor}", compiler or Nvrtc())
            (module,) = self._check("cuModuleLoadData", image)
            self._functions = {name: self._function(module, name) for name in KERNELS}
        self._module = module

    def launch(self, name: str, grid: int, threads: int, shared: int, arguments: bytes) -> None:
        """Queues a kernel on the current stream: ``grid`` blocks of ``threads``, ``shared`` bytes of shared memory.

        ``arguments``: the kernel's one parameter, a struct, as it lies in memory; the driver copies it.
        """
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self.launch(name, grid, threads, shared, arguments)
        struct = ctypes.create_string_buffer(arguments, len(arguments))
        pointers = ctypes.c_void_p(ctypes.addressof(struct))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        (error,) = self._driver.cuLaunchKernel(
            *(self._functions[name], grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0)
        )
        if int(error):
            raise CudaError(f"cuLaunchKernel of {name}: {self._named(error)}")
        return None

    def _function(self, module: Any, name: str) -> Any:
        """A kernel, loaded, and allowed all the shared memory that a block can have."""
        (function,) = self._check("cuModuleGetFunction", module, name.encode())
        self._check("cuFuncLoad", function)  # else the first launch might do it, in the middle of a capture
        attribute = self._driver.CUfunction_attribute
        (fixed,) = self._check("cuFuncGetAttribute", attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        limit = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        (most,) = self._check("cuDeviceGetAttribute", limit, self._check("cuDeviceGet", self._device.index)[0])
        self.max_shared = int(most) - int(fixed)  # the same for every kernel
        self._check(
            "cuFuncSetAttribute", function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.max_shared
        )
        return function

    def _check(self, call: str, *args: Any) -> tuple[Any, ...]:
        error, *out = getattr(self._driver, call)(*args)
        if int(error):
            raise CudaError(f"{call}: {self._named(error)}")
        return tuple(out)

    def _named(self, error: Any) -> str:
        _, text = self._driver.cuGetErrorString(error)
        return f"{error.name}: {text.decode() if text else 'unknown'}"


@cache
def library(device: torch.device) -> Library:
    """The kernels on ``device``, compiled and loaded at the first call. Raises CudaError."""
    return Library(device)


def cubin(arch: str, compiler: Compiler) -> bytes:
    """The kernels for an architecture, out of the cache where they lie in it undamaged."""
    parts = (MAIN.read_text(), HEADER.read_text(), *OPTIONS, arch, compiler.version)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:DIGEST]
    path = files.folder() / f"{name}.cubin"
    if path.exists():
        digest, image = (data := path.read_bytes())[:DIGEST], data[DIGEST:]
        if hashlib.sha256(image).digest() == digest:
            return image
        logger.warning("%s is damaged; compiling it anew", path)
    image = compiler.compile(arch)
    try:
        with files.written(path) as beside:
            beside.write_bytes(hashlib.sha256(image).digest() + image)
    except OSError as error:
        logger.warning("the compiled kernels could not be kept: %s", error)
    return image


def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise CudaError(f"cuda-bindings is needed, which torch's CUDA builds bring along: {error}") from error
