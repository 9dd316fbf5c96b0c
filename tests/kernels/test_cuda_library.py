"""The cache of compiled kernels and, on a GPU, compiling and loading them."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from steersman.kernels import cache, cuda_library
from steersman.kernels.cuda_library import CudaError, Library, Nvrtc, cubin, library

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


class Fake:
    """A compiler whose every answer is another one."""

    def __init__(self, version: str = "13.0") -> None:
        self.version = version
        self.compiled: list[str] = []

    def compile(self, arch: str) -> bytes:
        self.compiled.append(arch)
        return f"{arch} {self.version} {len(self.compiled)}".encode() * 100


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache.folder()


def test_compiled_once_for_each_source_architecture_and_version(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    first = cubin("sm_90", fake)
    assert cubin("sm_90", fake) == first
    assert cubin("sm_80", fake) != first
    assert fake.compiled == ["sm_90", "sm_80"]
    newer = Fake("13.1")
    assert cubin("sm_90", newer) != first
    for name in ("MAIN", "HEADER"):
        changed = tmp_path / name
        changed.write_text(getattr(cuda_library, name).read_text() + "\n")
        with monkeypatch.context() as patch:
            patch.setattr(cuda_library, name, changed)
            cubin("sm_90", newer)
    assert len(newer.compiled) == 3
    assert cubin("sm_90", fake) == first
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_file_is_compiled_anew(damage: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake()
    first = cubin("sm_90", fake)
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"cut": data[:-5], "flip": data, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        second = cubin("sm_90", fake)
    assert second != first
    assert len(fake.compiled) == 2
    assert "damaged" in caplog.text
    assert cubin("sm_90", fake) == second


def test_a_full_disk_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        raise OSError("no space left")
        yield path

    monkeypatch.setattr(cache, "written", full)
    fake = Fake()
    assert cubin("sm_90", fake) != cubin("sm_90", fake)
    assert not list(folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_no_other(folder: Path) -> None:
    path = folder / "kernel.cubin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with cache.written(path) as beside:
            beside.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [f.name for f in folder.iterdir()] == ["kernel.cubin"]
    assert path.read_bytes() == b"old"


def test_without_bindings_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CudaError, match="cuda-bindings"):
        Nvrtc()


def test_nvrtc_compiles_where_it_is_installed() -> None:
    """No GPU is needed for that."""
    pytest.importorskip("cuda.bindings")
    compiler = Nvrtc()
    assert compiler.compile("sm_90")[:4] == b"\x7fELF"
    with pytest.raises(CudaError, match="sm_12"):
        compiler.compile("sm_12")


@pytest.mark.gpu
@needs_gpu
def test_loading_compiles_once() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    compiler = Nvrtc()
    Library(device, compiler)

    class Never(Fake):
        def compile(self, arch: str) -> bytes:
            raise AssertionError

    Library(device, Never(compiler.version))


@pytest.mark.gpu
@needs_gpu
def test_a_launch_that_the_driver_refuses_is_an_error() -> None:
    found = library(torch.device("cuda", torch.cuda.current_device()))
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        found.launch("edit_float32", 1, 4096, 0, bytes(144))


@pytest.mark.gpu
@needs_gpu
def test_nothing_is_loaded_while_a_graph_is_captured() -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(CudaError, match="prepare"):
        Library(torch.device("cuda", torch.cuda.current_device()))
