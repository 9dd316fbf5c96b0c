"""The commands of the README and of docs/extraction.md and calibration.md, as they stand there, against one server.

What extraction makes is compared with Hugging Face's hidden states; what calibration recommends must have an effect.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.clients.directions import data
from steersman.clients.jobs import follow
from steersman.clients.scores import french_share
from steersman.clients.sdk import Steersman
from steersman.clients.smollm2 import fetch
from steersman.clients.vector_assets import decode
from steersman.steering.extraction import collect_hf, difference_of_means
from tests.e2e.server import Server, serve

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(README)
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
    said = "".join(_run(kind, block, server, tmp_path) for kind, block in BLOCKS)
    assert '"mean_relative_norm"' in said, "the curl request's answer has no report"
    assert "'mean_relative_norm'" in said, "the openai client's answer has no report"
    assert re.search(r"add french@[0-9a-f]{12}: \d+ tokens edited", said), "steersman chat shows no edit"
    assert '"prompt_positions"' in said, "steersman resolve shows no tokens"


@pytest.fixture(scope="module")
def made(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The direction that the command of docs/extraction.md makes: its name and version."""
    folder = tmp_path_factory.mktemp("extraction")
    ref = _run(*_block("extraction.md"), server, folder).splitlines()[-1]
    told = json.loads((folder / "french-by-server.json").read_text())
    assert list(told["norms"]) == told["assets"] == [ref]
    assert max(told["held_out"]["accuracy"]) > 0.9
    assert (folder / "french-by-server.png").read_bytes()[:4] == b"\x89PNG"
    assert ref in (folder / "french-by-server.html").read_text()
    return ref


def test_calibration(server: Server, made: str, tmp_path: Path) -> None:
    """The command of docs/calibration.md finds a layer and a scale that beat random directions by far."""
    chosen = _run(*_block("calibration.md"), server, tmp_path).splitlines()[-1]
    found = json.loads((tmp_path / "french.json").read_text())
    best = found["cells"][found["recommended"]]
    assert best["random"]["beaten_by"] is None or best["random"]["beaten_by"] >= 5
    assert best["effect"] > 0.5 > found["unsteered"] + 0.4
    assert best["damage"] <= 1
    assert (tmp_path / "french.png").read_bytes()[:4] == b"\x89PNG"
    whole, part = (server.http.get(f"/v1/steering/assets/{ref}").json() for ref in (made, chosen))
    assert len(whole["layers"]) == whole["model"]["n_layers"]
    assert (part["layers"], part["recommended"]["scale"]) == ([best["layer"]], best["scale"])
    assert part["provenance"]["calibration"]["of"] == made
    turn = {"role": "user", "content": "Tell me about the sea."}
    steering = {"interventions": [{"op": "add", "vector": "french-by-server"}]}  # as recommended
    asked = {"model": "smollm2", "messages": [turn], "max_tokens": 24, "temperature": 0, "repetition_penalty": 1.15}
    answer = server.post("/v1/chat/completions", {**asked, "steering": steering}).json()
    assert answer["steering"]["interventions"][0]["layers"] == [best["layer"]]
    assert french_share(answer["choices"][0]["message"]["content"]) > 0.5


def test_extraction_equals_the_offline_one(server: Server, made: str) -> None:
    """Hugging Face in float32 beside the server in bfloat16, at every layer; with a chat's question before, too."""
    tokenizer = AutoTokenizer.from_pretrained(fetch())
    model: Any = AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32).eval()

    def offline(pairs: Any, token: Any, prompts: Any = None) -> torch.Tensor:
        layers, sides = range(model.config.num_hidden_layers), ([p[s] for p in pairs] for s in ("positive", "negative"))
        return difference_of_means(*(collect_hf(model, tokenizer, side, layers, token, prompts) for side in sides))

    pairs = data("french")["pairs"]
    cosines = torch.cosine_similarity(_rows(server, made), offline(pairs, "mean"), dim=1)
    assert cosines.min() >= 0.999, cosines
    few = pairs[:12]
    asks = [[{"role": "user", "content": pair["prompt"]}] for pair in few]
    job: dict[str, Any] = {"kind": "extract", "name": "asked", "token": "last"}
    job["pairs"] = [{**pair, "prompt": ask} for pair, ask in zip(few, asks, strict=True)]
    with Steersman(server.url) as client:
        (ref,) = follow(client, job, every=0.1)["assets"]
    prompts = [tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True) for ask in asks]
    cosines = torch.cosine_similarity(_rows(server, ref), offline(few, "last", prompts), dim=1)
    assert cosines.min() >= 0.999, cosines


def _rows(server: Server, ref: str) -> torch.Tensor:
    """[L, d], a stored vector's."""
    with Steersman(server.url) as client:
        return torch.from_numpy(decode(json.loads(client.download(ref, "json"))["tensors"]["vectors"]).copy())


def _block(page: str) -> tuple[str, str]:
    (block,) = FENCED.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return block


def _run(kind: str, block: str, server: Server, tmp: Path) -> str:
    """What a block prints. It must succeed."""
    env = {**os.environ, "STEERSMAN_STORE": str(server.store), "STEERSMAN_SERVER": server.url, "COLUMNS": "120"}
    text = _here(block, server, tmp)
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _here(block: str, server: Server, tmp: Path) -> str:
    """The block for this server and this interpreter, with nothing written outside of the test's folder."""
    bin_folder = str(Path(sys.executable).parent)
    text = block.replace("/tmp", str(tmp)).replace("http://localhost:8000", server.url)
    return text.replace(".venv/bin", bin_folder)
