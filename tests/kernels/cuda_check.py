"""Compiles the CUDA kernels with nvcc and says what each takes: ``python -m tests.kernels.cuda_check``.

Fails where a kernel is missing, does not compile or spills registers to memory. Needs no GPU; without nvcc it says so
and ends well.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from tempfile import TemporaryDirectory

from steersman.kernels.cuda_library import KERNELS, MAIN, OPTIONS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REPORT = re.compile(
    r"entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers.*?(?P<shared>\d+) bytes smem",
    re.DOTALL,
)


def main() -> int:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check: there is no nvcc on the PATH; nothing is checked")
        return 0
    print(f"{'':8}{'kernel':32}{'registers':>10}{'shared':>8}{'spilled':>9}")
    return 1 if sum(check(nvcc, arch) for arch in ARCHITECTURES) else 0


def check(nvcc: str, arch: str) -> int:
    """Prints a line for each kernel; how many are missing or spill."""
    with TemporaryDirectory() as folder:
        command = [nvcc, *OPTIONS, f"-arch={arch}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
        command += ["-o", f"{folder}/edit.cubin", str(MAIN)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout[:4000])
        return len(KERNELS)
    found = {m["name"]: m for m in REPORT.finditer(done.stdout)}
    bad = 0
    for name in KERNELS:
        if (m := found.get(name)) is None:
            print(f"{arch:8}{name:32} is missing")
            bad += 1
            continue
        spilled = int(m["stores"]) + int(m["loads"])
        print(f"{arch:8}{name:32}{m['registers']:>10}{m['shared']:>8}{spilled:>9}")
        bad += spilled > 0
    return bad


if __name__ == "__main__":
    sys.exit(main())
