"""What is shipped: the wheel and the source archive hold every folder, under one name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("server", "steering", "kernels", "clients")
LEFT_OUT = {".pyc", ".md"}
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


def sources() -> set[str]:
    """Every file of the four folders, as the package names it: data of a new kind must be shipped too."""
    found = (f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix not in LEFT_OUT)
    return {f"steersman/{f.relative_to(ROOT).as_posix()}" for f in found if f.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source archive, built from a copy: leftovers in ./build would be shipped too."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    (copy / "src").mkdir()
    shutil.copytree(ROOT / "src/steersman", copy / "src/steersman", symlinks=True)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    for what in ("build_sdist", "build_wheel"):
        subprocess.run([sys.executable, "-c", BUILD, what, out], cwd=copy, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def test_wheel_holds_every_file_of_every_folder(wheel: zipfile.ZipFile) -> None:
    wanted = sources()
    assert {PurePosixPath(f).parts[1] for f in wanted} == set(FOLDERS)
    assert wanted <= set(wheel.namelist())


def test_source_archive_holds_them_too(built: Path) -> None:
    """As files: a link would point out of the archive."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {m.name.partition("/src/")[2] for m in archive if m.isfile()}
        assert not [m.name for m in archive if m.issym() or m.islnk()]
    assert sources() <= files


def test_wheel_has_one_top_level_module(wheel: zipfile.ZipFile) -> None:
    """`kernels` and `server` are other people's names."""
    tops = {PurePosixPath(f).parts[0] for f in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"steersman"}


def test_wheel_says_that_it_is_typed_and_small(wheel: zipfile.ZipFile) -> None:
    assert "steersman/py.typed" in wheel.namelist()
    assert not [f for f in wheel.namelist() if "__pycache__" in f or "/tests/" in f]
    assert sum(f.compress_size for f in wheel.infolist()) < 4 * 2**20


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(next(f for f in wheel.namelist() if f.endswith("entry_points.txt"))).decode()
    for group in ("[console_scripts]", "[vllm.general_plugins]", "[vllm.endpoint_plugins]"):
        assert f"{group}\nsteersman = steersman.server." in text


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_linked_into_the_package(folder: str) -> None:
    link = ROOT / "src/steersman" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_no_top_level_package(folder: str) -> None:
    """An `__init__.py` would make `import kernels` find ours from the root of the repository."""
    assert not (ROOT / folder / "__init__.py").exists()
