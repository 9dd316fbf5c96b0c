"""``steersman neurons``: from a checkpoint to labels, and from labels or captures to assets that steer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file

from steersman.clients.sdk import Steersman
from steersman.server import cli
from steersman.server.commands import remote
from steersman.steering import spec
from steersman.steering.directions import Library
from steersman.steering.neurons_labels import NeuronLabels
from steersman.steering.resolve import Resolver
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.store import Store
from tests.models.tiny import _tokenizer
from tests.steering.checkpoints import D_FF, LAYERS, D, write
from tests.steering.checkpoints import tensors as small_tensors
from tests.steering.library import noise

V = 512
INFO = ModelInfo("org/Tiny", "Tiny", LAYERS, D, 2, 4, {Site.MLP_POST: dict.fromkeys(range(LAYERS), D_FF)})
ACTIONS = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named Tiny, of OpenVLA's layout: 256 action tokens, padding behind them, planted neurons."""
    tokenizer = _tokenizer()
    weights = small_tensors("language_model.model.", None)
    head = torch.nn.functional.normalize(noise(V + 64, D, seed=3))
    head[V:] = 100  # padding
    weights["language_model.model.embed_tokens.weight"] = noise(V + 64, D, seed=4)
    weights["language_model.lm_head.weight"] = head
    for (layer, index), token in {(0, 3): 300, (1, 5): tokenizer.convert_tokens_to_ids("%"), (2, 7): V - 1}.items():
        weights[f"language_model.model.layers.{layer}.mlp.down_proj.weight"][:, index] = 9 * head[token]
    config = {
        "model_type": "openvla",
        "text_config": {"model_type": "llama", "vocab_size": V + 64},
        "norm_stats": {"set": {"action": ACTIONS}},
    }
    folder = write(tmp_path_factory.mktemp("models") / "Tiny", weights, config, shards=2)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labels(checkpoint: Path) -> Path:
    out = checkpoint.parent / "labels.safetensors"
    assert cli.main(["neurons", "label", str(checkpoint), "--out", str(out), "--top-k", "4"]) == 0
    return out


@pytest.fixture
def neurons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["neurons", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def table(out: str) -> list[dict[str, str]]:
    head, *rows = [line.split("\t") for line in out.splitlines() if "\t" in line]
    return [dict(zip(head, row, strict=True)) for row in rows]


def steered(store: Path, name: str) -> list[tuple[int, list[int]]]:
    """What a request that names the asset edits: (layer, columns of mlp_post)."""
    given = spec.parse({"interventions": [{"op": "neurons", "neurons": name, "mode": "set", "value": 4.0}]})
    plan = Resolver(Library(Store(store), INFO)).resolve(given)
    out = []
    for place, (block,) in plan.blocks.items():
        assert place.site is Site.MLP_POST
        assert block.write.columns is not None
        out.append((place.layer, block.write.columns.tolist()))
    return sorted(out)


def test_labels_of_a_policy_name_its_actions_and_leave_padding_out(labels: Path) -> None:
    """Id 511 is the first bin, -0.996, and 256 the last, as the published table has them for 31999 and 31744."""
    found = NeuronLabels.read(labels)
    assert len(found.vocabulary) == V
    assert found.about["model"] == {"id": "Tiny", "n_layers": LAYERS, "d_model": D}
    assert found.words((2, 7))[0] == "[action: -0.996]"
    assert found.words((0, 3))[0] == f"[action: {(-1 + (V - 300 - 0.5) * 2 / 255):.3f}]"
    assert found.words((1, 5))[0] == "%"
    assert found.vocabulary[256] == "[action: 0.996]"
    assert not found.vocabulary[255].startswith("[action")


def test_without_the_policy_the_words_are_the_tokenizer_s(checkpoint: Path, neurons: Run, tmp_path: Path) -> None:
    out = tmp_path / "plain.safetensors"
    code, text, _ = neurons(
        "label", checkpoint, "--out", out, "--id", "org/Other", "--top-k", 2, "--layers", "0,2", "--policy", "none"
    )  # fmt: skip
    assert code == 0
    assert f"{2 * D_FF} neurons of 2 layers on {V} tokens" in text
    found = NeuronLabels.read(out)
    assert not any(word.startswith("[action") for word in found.vocabulary)
    assert [*found.widths] == [0, 2]
    assert found.about["model"]["id"] == "org/Other"
    assert load_file(out)["tokens"].shape == (2 * D_FF, 2)


def test_what_search_saves_steers(labels: Path, neurons: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, out, err = neurons(
        "search", labels, "%", "--limit", 3, "--save", "percent", "--controls", 2, "--store", store
    )
    assert code == 0
    found = table(out)
    assert (found[0]["layer"], found[0]["index"], found[0]["matched"]) == ("1", "5", "%")
    chosen = sorted((int(row["layer"]), int(row["index"])) for row in found)
    assert f"{len(chosen)} of" in err
    asset = Store(store).get("percent")
    assert sorted(asset.meta.neurons) == chosen  # type: ignore[union-attr]
    how = asset.meta.provenance
    assert (how["words"], how["match"], how["labels"]["unembedding"]) == (
        ["%"],
        "token",
        "language_model.lm_head.weight",
    )
    assert sorted((layer, i) for layer, columns in steered(store, "percent") for i in columns) == chosen
    for i in range(2):
        control = [(layer, j) for layer, columns in steered(store, f"percent-control-{i}") for j in columns]
        assert sorted(layer for layer, _ in control) == sorted(layer for layer, _ in chosen)
        assert not set(control) & set(chosen)


def test_nothing_found_is_not_saved(labels: Path, neurons: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing was found"):
        neurons("search", labels, "xyzzy", "--part", "--save", "none", "--store", tmp_path)


def test_clusters_cover_the_neurons_and_the_picked_one_is_saved(
    labels: Path, checkpoint: Path, neurons: Run, tmp_path: Path
) -> None:
    cluster = ("cluster", labels, checkpoint, "--clusters", 4, "--dimensions", 64, "--layers", "1-2")
    _, out, _ = neurons(*cluster)
    found = table(out)
    assert sum(int(row["neurons"]) for row in found) == 2 * D_FF
    assert neurons(*cluster, "--pick", 2, "--save", "two", "--store", tmp_path)[1].startswith(out)  # the same again
    chosen = Store(tmp_path).get("two").meta.neurons  # type: ignore[union-attr]
    assert len(chosen) == int(found[2]["neurons"])
    assert sorted((layer, i) for layer, columns in steered(tmp_path, "two") for i in columns) == sorted(chosen)
    with pytest.raises(SystemExit, match="--save and --pick go together"):
        neurons(*cluster, "--save", "two", "--store", tmp_path)


def test_labels_of_another_model_do_not_go_with_a_checkpoint(labels: Path, neurons: Run, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {k: v for k, v in small_tensors().items() if "layers.2." not in k})
    code, _, err = neurons("cluster", labels, other, "--clusters", 2)
    assert code == 1
    assert "of other sizes than other's" in err


def test_released_clusters_are_imported(labels: Path, neurons: Run, tmp_path: Path) -> None:
    file = tmp_path / "dictionaries.yaml"
    file.write_text("blank: {}\nup:\n  3: ['up']\n  27: ['Up']\n  59: ['UP']\n")
    code, out, _ = neurons("import", file, "up", "--labels", labels, "--store", tmp_path / "a")
    assert code == 0
    assert table(out)[0]["tokens"].startswith("[action: 0.659]")
    about = {"model": {"id": "Tiny", "n_layers": LAYERS, "d_model": D}, "d_ff": D_FF}
    assert neurons("import", file, "up", "--metadata", json.dumps(about), "--store", tmp_path / "b")[0] == 0
    for store in (tmp_path / "a", tmp_path / "b"):
        assert steered(store, "up") == [(0, [3]), (1, [7]), (2, [19])]
    for wrong, complaint in (("down", "no cluster 'down'; it has blank, up"), ("blank", "at least 1 item")):
        code, _, err = neurons("import", file, wrong, "--labels", labels, "--store", tmp_path / "a")
        assert code == 1
        assert complaint in err
    assert neurons("import", file, "up", "--metadata", '{"d_ff": 20}', "--store", tmp_path / "a")[0] == 1


def test_what_cannot_end_well_is_said_before_the_work(checkpoint: Path, neurons: Run, tmp_path: Path) -> None:
    for arguments, complaint in (
        (("--out", tmp_path / "missing/x"), "there is no folder"),
        (("--device", "nowhere"), "cannot be used"),
        (("--top-k", V + 1), f"1 to {V}"),
    ):
        code, out, err = neurons("label", checkpoint, "--out", tmp_path / "x", *arguments)
        assert (code, out) == (1, "")
        assert complaint in err
        assert err.count("\n") == 1
    for arguments in (("--top-k", 0), ("--memory-mb", -1)):
        with pytest.raises(SystemExit) as caught:
            neurons("label", checkpoint, *arguments)
        assert caught.value.code == 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", ["x", "3-1", "1,,2", "-1"])
def test_layers_that_are_none(labels: Path, neurons: Run, text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        neurons("search", labels, "the", f"--layers={text}")
    assert caught.value.code == 2


# -- contrast ---------------------------------------------------------------------------------------


class Capturing:
    """A server whose neurons (0, 4) and (2, 11) answer to the word "lift", the second with the other sign."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/steering/model":
            return httpx.Response(
                200, json={"model": "org/Tiny", "n_layers": LAYERS, "d_model": D, "fingerprint": None}
            )
        asked = json.loads(request.content)
        self.asked.append(asked)
        return httpx.Response(200, content=captured(asked["prompts"], asked["layers"]))


def captured(prompts: list[str], layers: Any = "all", tokens: int | None = None) -> bytes:
    """A capture as the server writes one: reduced, or of `tokens` tokens of each prompt."""
    chosen = [*range(LAYERS)] if layers == "all" else layers
    arrays = {}
    for layer in chosen:
        rows = []
        for prompt in prompts:
            row = noise(D_FF, seed=sum(prompt.encode()) + layer)
            row[4] += 9 * ("lift" in prompt) * (layer == 0)
            row[11] -= 8 * ("lift" in prompt) * (layer == 2)
            rows.append(row.numpy())
        if tokens is None:
            arrays[f"mlp_post.{layer}"] = np.stack(rows)
            continue
        for i, row in enumerate(rows):  # tokens that differ, with the same mean
            arrays[f"{i}.mlp_post.{layer}"] = row + np.linspace(-5, 5, tokens + i, dtype=np.float32)[:, None]
    about = {
        "model": "org/Tiny", "sites": {"mlp_post": chosen}, "reduce": "none" if tokens else "mean", "plan": None,
        "prompts": [{"token_ids": [1], "positions": [0]}] * len(prompts),
    }  # fmt: skip
    return save_arrays(arrays, {"capture": json.dumps(about)})


SETS = {
    "lifting": [f"lift the cup number {i}" for i in range(20)],
    "pushing": [f"push the cup number {i}" for i in range(18)],
}


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    for name, prompts in SETS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
    return [tmp_path / f"{name}.json" for name in SETS]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Capturing:
    found = Capturing()
    monkeypatch.setattr(remote, "Steersman", partial(Steersman, transport=httpx.MockTransport(found)))
    return found


def test_contrast_finds_the_neurons_that_differ(
    server: Capturing, sets: list[Path], labels: Path, neurons: Run, tmp_path: Path
) -> None:
    code, out, err = neurons(
        "contrast", *sets, "--side", "both", "--top", 2, "--labels", labels, "--tokens", '{"last": 1}',
        "--save", "lift", "--controls", 1, "--store", tmp_path / "store",
    )  # fmt: skip
    assert code == 0
    found = table(out)
    assert [(row["layer"], row["index"], float(row["d'"]) > 0) for row in found] == [
        ("0", "4", True),
        ("2", "11", False),
    ]
    assert found[0]["tokens"]
    assert err.startswith(f"2 of {LAYERS * D_FF} neurons")
    assert sum(len(asked["prompts"]) for asked in server.asked) == 38
    assert all(len(asked["prompts"]) <= 16 for asked in server.asked)
    assert all(
        (asked["sites"], asked["reduce"], asked["tokens"]) == (["mlp_post"], "mean", {"last": 1})
        for asked in server.asked
    )
    assert steered(tmp_path / "store", "lift") == [(0, [4]), (2, [11])]
    how = Store(tmp_path / "store").get("lift").meta.provenance
    assert how["positive"] == {"file": "lifting.json", "examples": 20}
    assert how["effects"][0] > how["chance"] > 0
    assert [layer for layer, _ in steered(tmp_path / "store", "lift-control-0")] == [0, 2]


def test_one_side_and_some_layers(server: Capturing, sets: list[Path], neurons: Run) -> None:
    _, out, _ = neurons("contrast", *sets, "--top", 1)
    assert [(row["layer"], row["index"]) for row in table(out)] == [("0", "4")]
    _, out, _ = neurons("contrast", *sets, "--top", 1, "--side", "negative", "--layers", "1-2")
    assert [(row["layer"], row["index"]) for row in table(out)] == [("2", "11")]
    assert server.asked[-1]["layers"] == [1, 2]


@pytest.mark.parametrize("tokens", [None, 3])
def test_files_of_captures_stand_for_prompts(
    server: Capturing, labels: Path, neurons: Run, tmp_path: Path, tokens: int | None
) -> None:
    for name, prompts in SETS.items():
        (tmp_path / f"{name}.safetensors").write_bytes(captured(prompts, tokens=tokens))
    files = [tmp_path / f"{name}.safetensors" for name in SETS]
    _, out, _ = neurons("contrast", *files, "--side", "both", "--top", 2)
    assert [(row["layer"], row["index"]) for row in table(out)] == [("0", "4"), ("2", "11")]
    assert not server.asked
    with pytest.raises(SystemExit, match="say --labels"):
        neurons("contrast", *files, "--save", "x", "--store", tmp_path / "s")
    assert neurons("contrast", *files, "--top", 1, "--save", "x", "--labels", labels, "--store", tmp_path / "s")[0] == 0
    assert steered(tmp_path / "s", "x") == [(0, [4])]


def test_sides_that_are_no_sets(server: Capturing, sets: list[Path], neurons: Run, tmp_path: Path) -> None:
    for content, complaint in (("{", "not JSON"), ('{"a": 1}', "a list of prompts"), ("[]", "a list of prompts")):
        (tmp_path / "bad.json").write_text(content)
        code, _, err = neurons("contrast", sets[0], tmp_path / "bad.json")
        assert code == 1
        assert complaint in err
        assert "(negative)" in err
    (tmp_path / "one.json").write_text('["only one"]')
    code, _, err = neurons("contrast", sets[0], tmp_path / "one.json")
    assert (code, "at least two examples" in err) == (1, True)
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    assert "no file of captured activations" in neurons("contrast", tmp_path / "bad.safetensors", sets[1])[2]


def test_a_server_s_refusal_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, sets: list[Path], neurons: Run
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(501, json={"error": {"message": "no captures here", "code": "x", "param": None}})

    monkeypatch.setattr(remote, "Steersman", partial(Steersman, transport=httpx.MockTransport(refuse)))
    with pytest.raises(SystemExit, match="steersman neurons contrast: no captures here"):
        neurons("contrast", *sets)
