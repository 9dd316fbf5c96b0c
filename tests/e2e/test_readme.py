"""The README's commands, as they stand there, against a server started as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steersman.clients.smollm2 import fetch
from tests.e2e.server import Server, serve

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SERVE = re.search(r"^\.venv/bin/steersman serve (\S+) (.*)$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert SERVE
    options = SERVE[2].split()
    name = options[options.index("--served-model-name") + 1]
    model = Path(SERVE[1]).expanduser()
    assert model == fetch(), "the README names another folder than the model's"
    with serve(model, tmp_path_factory.mktemp("readme"), name=name) as server:
        yield server


def test_there_are_blocks_of_both_kinds() -> None:
    assert [kind for kind, _ in BLOCKS].count("python") == 1
    assert len(BLOCKS) >= 4


def test_the_commands_work_in_order(server: Server, tmp_path: Path) -> None:
    env = {**os.environ, "STEERSMAN_STORE": str(server.store), "STEERSMAN_SERVER": server.url, "COLUMNS": "120"}
    said = ""
    for kind, block in BLOCKS:
        text = _here(block, server, tmp_path)
        command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    assert '"mean_relative_norm"' in said, "the curl request's answer has no report"
    assert "'mean_relative_norm'" in said, "the openai client's answer has no report"
    assert re.search(r"add french@[0-9a-f]{12}: \d+ tokens edited", said), "steersman chat shows no edit"
    assert '"prompt_positions"' in said, "steersman resolve shows no tokens"


def _here(block: str, server: Server, tmp: Path) -> str:
    """The block for this server and this interpreter, with nothing written outside of the test's folder."""
    bin_folder = str(Path(sys.executable).parent)
    text = block.replace("/tmp", str(tmp)).replace("http://localhost:8000", server.url)
    return text.replace(".venv/bin", bin_folder)
