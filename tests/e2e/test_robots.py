"""A tiny image-text policy behind the real server, on every robot route, against Hugging Face with plain hooks."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from steersman.clients import arrays
from steersman.clients.jobs import follow
from steersman.clients.robot import HttpRobot, SocketRobot
from steersman.clients.sdk import Steersman, SteersmanError
from steersman.clients.simulators import study, watchdog
from steersman.clients.simulators.episode import Limits
from steersman.clients.simulators.simulator import Seen
from tests.clients.simulators.point import Point
from tests.e2e.server import Server, serve
from tests.e2e.steered import metric
from tests.models.tiny_llava import (
    BINS,
    CHUNK,
    FIRST,
    KEY,
    PATCHES,
    POLICY,
    SIZE,
    STATS,
    build_llava,
    greedy,
    without_torchvision,
)
from tests.models.tiny_llava import IMAGE as IMAGE_TOKEN
from tests.oracle.tracing import probabilities

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NEURONS = {1: [3, 77], 2: [5, 120, 9], 3: [40]}
VALUE = 6.0
DIMS = len(STATS["q01"])
TASKS = ["pick up the red block", "close the gripper", "move the arm up"]


def steering(tokens: Any, value: float = VALUE) -> dict[str, Any]:
    named = [[layer, index] for layer, columns in NEURONS.items() for index in columns]
    edit = {"op": "neurons", "neurons": {"inline": named}, "mode": "set", "value": value, "tokens": tokens}
    return {"interventions": [edit]}


def scene(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(picture: Any) -> str:
    """As a file in base64."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Oracle:
    """Hugging Face's model and processors on the same checkpoint."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, LlavaForConditionalGeneration
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        torch.manual_seed(0)
        self.model, loading = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not loading["missing_keys"], loading
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = CLIPImageProcessorPil.from_pretrained(folder)

    def prompt(self, task: str) -> list[int]:
        ids = self.tokenizer.encode(POLICY["prompt"].format(instruction=task))
        return [ids[0], *[IMAGE_TOKEN] * PATCHES, *ids[1:]]

    def tokens(self, task: str, picture: Any, when: str | list[int] | None = None, value: float = VALUE) -> list[int]:
        pixels = self.images(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        neurons = NEURONS if when else {}
        ids = torch.tensor([self.prompt(task)])
        return greedy(self.model, ids, pixels, CHUNK * DIMS, neurons, value, when or "all")


def decoded(tokens: list[int]) -> np.ndarray[Any, Any]:
    """The actions of tokens, by the description in the checkpoint."""
    low, high, mask = (np.array(STATS[name]) for name in ("q01", "q99", "mask"))
    bins = np.clip(np.array(tokens) - FIRST, 0, BINS - 1)
    x = ((2 * bins + 1) / BINS - 1).reshape(CHUNK, DIMS)
    return np.where(mask, (x + 1) / 2 * (high - low) + low, x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tmp = tmp_path_factory.mktemp("served")
    options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--api-key", "key"]
    with serve(folder, tmp, options, without_torchvision(tmp / "site")) as running:
        running.http.headers["authorization"] = "Bearer key"
        yield running


@pytest.fixture
def robot(server: Server) -> Iterator[HttpRobot]:
    with HttpRobot(server.url, api_key="key", timeout=120) as client:
        yield client


def socket(server: Server, **defaults: Any) -> SocketRobot:
    return SocketRobot(server.url.replace("http", "ws"), api_key="key", timeout=120, **defaults)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(SIZE, SIZE), (56, 40), (1, 1)])
def test_unsteered_actions_are_hugging_faces(
    robot: HttpRobot, oracle: Oracle, task: str, size: tuple[int, int]
) -> None:
    picture = scene(len(task), *size)
    found = robot.act({"front": picture}, task)
    wanted = oracle.tokens(task, picture)
    assert found.about["token_ids"] == wanted
    np.testing.assert_allclose(found.actions, decoded(wanted), atol=1e-12)
    assert "steering" not in found.about


def test_the_picture_matters(oracle: Oracle) -> None:
    assert oracle.tokens(TASKS[0], scene(1)) != oracle.tokens(TASKS[0], scene(2))


@pytest.mark.parametrize("when", ["all", "prompt", "generated"])
def test_neurons_set_in_the_policy_are_hugging_faces(robot: HttpRobot, oracle: Oracle, when: str) -> None:
    moved = 0
    for seed, task in enumerate(TASKS):
        picture = scene(seed)
        found = robot.act({"front": picture}, task, steering=steering(when))
        assert found.about["token_ids"] == oracle.tokens(task, picture, when)
        moved += found.about["token_ids"] != oracle.tokens(task, picture)
        prompt, generated = len(oracle.prompt(task)), CHUNK * DIMS - 1  # the last token is not fed in
        edited = {"all": prompt + generated, "prompt": prompt, "generated": generated}[when]
        assert found.about["steering"]["interventions"][0]["tokens"] == edited
    assert moved, "the edit moves no action, so this shows nothing"


@pytest.mark.parametrize(
    ("part", "edited"),
    [
        ({}, [0, 1, 2, 3]),
        ({"patches": [[1, 3]]}, [1, 2]),
        ({"box": [30, 0, 40, 10]}, [1]),  # the picture is cut to the columns from 7.2 to 47.4, halves meet at 27.3
        ({"box": [0, 0, 56, 12]}, [0, 1]),
        ({"box": [26, 19.5, 27.2, 20.5]}, [0, 2]),
        ({"box": [[30, 25, 40, 30], [8, 25, 9, 30]]}, [2, 3]),
        ({"box": [26, 21, 28, 22], "patches": [[0, 1]]}, [0, 2, 3]),
    ],
)
def test_image_tokens_and_parts_of_them(robot: HttpRobot, oracle: Oracle, part: Any, edited: list[int]) -> None:
    """The picture's tokens follow the prompt's first; the second time its processed pixels come from vLLM's cache."""
    picture, positions, moved = scene(11, 40, 56), [1 + token for token in edited], 0
    asked = {**steering({"image": 0, **part}), "report": "tokens"}
    for task in [*TASKS, TASKS[0]]:
        found = robot.act({"front": picture}, task, steering=asked)
        assert found.about["token_ids"] == oracle.tokens(task, picture, positions)
        moved += found.about["token_ids"] != oracle.tokens(task, picture)
        report = found.about["steering"]
        assert report["interventions"][0]["tokens"] == len(edited)
        (sequence,) = report["sequences"]
        for layer in sequence["interventions"]:
            sizes = zip(sequence["positions"], layer["relative_norms"], strict=True)
            assert [position for position, size in sizes if size is not None] == positions
    assert moved, "the edit moves no action, so this shows nothing"


@pytest.mark.parametrize(
    ("tokens", "param", "says"),
    [
        ({"image": 1}, "image", "has 1"),
        ({"image": [0, 2]}, "image[1]", "has 1"),
        ({"image": 0, "patches": [[0, 2], [3, 5]]}, "patches[1]", "has 4 tokens"),
        ({"image": 0, "box": [50, 0, 57, 9]}, "box", "56 × 40"),
        ({"image": 0, "box": [[0, 0, 56, 40], [0, 0, 1, 41]]}, "box[1]", "56 × 40"),
        ({"image": 0, "box": [0, 0, 7, 40]}, "box", "cuts off"),
        ({"exclude": {"image": 1}}, "exclude.image", "has 1"),
    ],
)
def test_parts_of_images_that_are_not_there(robot: HttpRobot, tokens: Any, param: str, says: str) -> None:
    with pytest.raises(SteersmanError) as refused:
        robot.act({"front": scene(11, 40, 56)}, TASKS[0], steering=steering(tokens))
    assert (refused.value.status, refused.value.param) == (400, f"steering.interventions[0].tokens.{param}")
    assert says in str(refused.value)


def test_a_batch_of_robots_is_as_each_alone(server: Server, robot: HttpRobot) -> None:
    cases = [(scene(i), TASKS[i % 3], steering("all", 3.0 + i) if i % 2 else None) for i in range(16)]
    alone = [robot.act({"front": p}, t, steering=s).about["token_ids"] for p, t, s in cases]

    def fly(case: Any) -> list[list[int]]:
        picture, task, asked = case
        with socket(server, steering=asked) as one:
            seen = {"observation/image": picture, "prompt": task}
            return [one.infer(seen).about["token_ids"] for _ in range(3)]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(fly, cases)) == [[ids] * 3 for ids in alone]


def test_every_route_gives_the_same_actions(server: Server, robot: HttpRobot) -> None:
    picture, asked = scene(3), steering("all")
    wanted = robot.act({"front": picture}, TASKS[1], steering=asked)
    payload = {"image": picture, "instruction": TASKS[1], "steering": asked}
    answer = server.http.post("/act", content=arrays.to_json(payload))
    np.testing.assert_array_equal(arrays.from_json(answer.content), wanted.actions)
    with socket(server, steering=asked) as one:
        assert (one.metadata["policy"], one.metadata["unnorm_keys"]) == ("bins", {KEY: DIMS})
        found = one.infer({"observation/image": picture, "prompt": TASKS[1]})
        np.testing.assert_array_equal(found.actions, wanted.actions)
        assert found.about["steering"]["plan"] == wanted.about["steering"]["plan"]
    assert server.http.get("/healthz").text == "OK\n"


@torch.no_grad()
def likelihoods(oracle: Oracle, prompt: list[int], ids: list[int], pixels: Any, when: str) -> torch.Tensor:
    """ln p of each of ``ids`` after ``prompt`` by Hugging Face's model with neurons set at tokens fed in ``when``."""
    n = len(prompt)
    rows = {"none": slice(0), "all": slice(None), "prompt": slice(n), "generated": slice(n, None)}[when]

    def setting(columns: list[int]) -> Any:
        def change(module: Any, inputs: tuple[torch.Tensor]) -> Any:
            x = inputs[0].clone()
            for column in columns:
                x[:, rows, column] = VALUE
            return (x, *inputs[1:])

        return change

    layers = oracle.model.model.language_model.layers
    hooks = [layers[i].mlp.down_proj.register_forward_pre_hook(setting(columns)) for i, columns in NEURONS.items()]
    try:
        given = {} if pixels is None else {"pixel_values": pixels}
        logits = oracle.model(input_ids=torch.tensor([[*prompt, *ids]]), **given).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return logits.double().log_softmax(-1)[n - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


WORDS = "what is in the picture"


def pictured(picture: Image.Image) -> list[dict[str, Any]]:
    """Messages with it."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": WORDS}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("when", ["none", "all", "prompt", "generated"])
def test_the_conflict_of_an_answer_with_what_the_words_alone_say(server: Server, oracle: Oracle, when: str) -> None:
    """Two sampled answers, one greedy one as a stream: each against Hugging Face's model, steered like the request."""
    picture = Image.fromarray(scene(4))
    asked = {"signals": ["conflict"], "report": "tokens"} | (steering(when) if when != "none" else {})
    body = {"model": server.model, "messages": pictured(picture), "max_tokens": 8, "ignore_eos": True}
    body |= {"return_token_ids": True, "steering": asked}
    before = metric(server, "steersman_conflict_count")
    sampled = server.post("/v1/chat/completions", {**body, "n": 2, "temperature": 1.0, "seed": 7}).json()
    lines = server.post("/v1/chat/completions", {**body, "temperature": 0, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert metric(server, "steersman_conflict_count") == before + 3 * 8
    assert ["steering" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    streamed = [i for c in chunks for choice in c["choices"] for i in choice.get("token_ids") or ()]
    answers = [(choice["token_ids"], sampled["steering"]["signals"][choice["index"]]) for choice in sampled["choices"]]
    answers.append((streamed, chunks[-1]["steering"]["signals"][0]))
    assert answers[0][0] != answers[1][0]

    prompt, pixels = sampled["prompt_token_ids"], oracle.images(picture, return_tensors="pt")["pixel_values"]
    messages = [{"role": "user", "content": WORDS}]
    text = oracle.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = oracle.tokenizer.encode(text, add_special_tokens=False)
    assert (prompt.count(IMAGE_TOKEN), plain.count(IMAGE_TOKEN)) == (PATCHES, 0)
    for ids, told in answers:
        found = told["signals"]["conflict"]
        seen, blind = (likelihoods(oracle, *pair, when) for pair in ((prompt, ids, pixels), (plain, ids, None)))
        wanted = (seen.exp() + 1e-9).log() - (blind.exp() + 1e-9).log()
        assert found["values"] == pytest.approx(wanted.tolist(), abs=2e-3)
        assert found["positions"] == [*range(len(prompt) - 1, len(prompt) + 7)]
        assert found["tokens"] == len(ids) == 8
        assert found["mean"] == pytest.approx(float(wanted.mean()), abs=2e-3)
        assert float(wanted.abs().max()) > 0.1, "the picture makes no difference, so this shows nothing"


def test_conflict_that_cannot_be_told(server: Server) -> None:
    asked = {"signals": ["norm:1", "conflict"]}
    words = {"model": server.model, "messages": [{"role": "user", "content": WORDS}], "max_tokens": 3}
    refused = server.post("/v1/chat/completions", {**words, "steering": asked})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steering.signals[1]")
    failed = metric(server, 'steersman_replays_total{outcome="failed"}')
    body = {**words, "messages": pictured(Image.fromarray(scene(4))), "ignore_eos": True}
    served = server.post("/v1/chat/completions", {**body, "steering": asked | steering({"image": 0})}).json()
    (told,), (warning,) = served["steering"]["signals"], served["steering"]["warnings"]
    assert set(told["signals"]) == {"norm:1"}
    assert warning.startswith("signal conflict is not known of choice 0: the replay without images failed")
    assert "has 0" in warning
    assert served["usage"]["completion_tokens"] == 3
    assert metric(server, 'steersman_replays_total{outcome="failed"}') == failed + 1


class OneEye(Point):
    """A point that sees itself: another place is another picture."""

    instruction = TASKS[0]

    def observe(self) -> Seen:
        return Seen({"front": scene(int(1e6 * np.abs(self.at).sum()))}, self.at)


def test_a_closed_loop_is_the_same_over_http_and_a_socket(server: Server, oracle: Oracle) -> None:
    asked, runs = study.conditions(steering("all")), []
    for url in (server.url, server.url.replace("http", "ws")):

        def connect(steering: study.Steering | None, url: str = url) -> watchdog.Link:
            return watchdog.link(url, steering=steering, api_key="key", timeout=120)

        runs.append(study.run_all(OneEye(), connect, asked, range(2), Limits(6), 120))
    edited = len(oracle.prompt(TASKS[0])) + CHUNK * DIMS - 1
    for name in asked:
        for one, other in zip(runs[0][name], runs[1][name], strict=True):
            np.testing.assert_array_equal(one.positions, other.positions)
            assert (one.answers, one.late) == (other.answers, other.late) == (6 // CHUNK, 0)
            assert one.edited == other.edited == (name == study.STEERED) * edited * one.answers
    unsteered, steered = (runs[0][name][0] for name in asked)
    assert (unsteered.positions != steered.positions).any()
    seen = scene(int(1e6 * np.abs(unsteered.positions[CHUNK]).sum()))  # at the second look
    moved = 0.01 * decoded(oracle.tokens(TASKS[0], seen))[:, :3]
    np.testing.assert_allclose(np.diff(unsteered.positions, axis=0)[CHUNK : 2 * CHUNK], moved, atol=1e-12)


def test_keys_limits_and_refusals(server: Server, robot: HttpRobot) -> None:
    with pytest.raises(SteersmanError) as refused:
        SocketRobot(server.url.replace("http", "ws"))
    assert refused.value.status == 401
    assert server.http.post("/act", content=b"{}", headers={"authorization": ""}).status_code == 401
    for status, param, given in (
        (400, "unnorm_key", {"unnorm_key": "gone"}),
        (400, "instruction", {"instruction": "<image>"}),
        (400, "instruction", {"instruction": "word " * 500}),
        (400, "steering.interventions[0].neurons", {"steering": steering("all") | {"interventions": [_far()]}}),
    ):
        about: dict[str, Any] = {"instruction": TASKS[0], **given}
        with pytest.raises(SteersmanError) as refused:
            robot.act({"front": scene(0)}, about.pop("instruction"), **about)
        assert refused.value.status == status
        assert refused.value.param == param, refused.value
    robot.act({"front": scene(0)}, TASKS[0])


def _far() -> dict[str, Any]:
    edit: dict[str, Any] = steering("all")["interventions"][0]
    return {**edit, "neurons": {"inline": [[0, 10_000]]}}


def test_a_robot_that_vanishes_and_the_metrics(server: Server, robot: HttpRobot) -> None:
    wanted = robot.act({"front": scene(4)}, TASKS[2], steering=steering("all")).about["token_ids"]
    for _ in range(5):
        gone = socket(server, steering=steering("all"))
        gone._socket.send(arrays.pack({"observation/image": scene(4), "prompt": TASKS[2]}))
        gone._socket.socket.close()
    assert robot.act({"front": scene(4)}, TASKS[2], steering=steering("all")).about["token_ids"] == wanted
    assert metric(server, "steersman_action_seconds_count") > 0
    text = server.rpc_stats()
    assert 'steersman_actions_total{outcome="ok",policy="bins"}' in text
    assert 'steersman_action_saturation_total{policy="bins"} 0.0' in text


def test_captures_of_observations(server: Server, oracle: Oracle) -> None:
    """The stream of the image's tokens and of the others is Hugging Face's, at every layer."""
    picture = scene(21)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    observation = {"images": [base64.b64encode(file.getvalue()).decode()], "instruction": TASKS[0]}
    with Steersman(server.url, api_key="key") as client:
        found = client.capture([{"observation": observation}], sites=["resid_pre"])
        patches = client.capture([{"observation": observation}], sites=["resid_pre"], tokens={"image": True})
    ids = oracle.prompt(TASKS[0])
    assert found.about["prompts"][0]["token_ids"] == ids
    assert patches.about["prompts"][0]["positions"] == [i for i, token in enumerate(ids) if token == IMAGE_TOKEN]
    pixels = oracle.images(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        out = oracle.model(input_ids=torch.tensor([ids]), pixel_values=pixels, output_hidden_states=True)
    for layer in found.about["sites"]["resid_pre"]:
        rows = torch.from_numpy(found.rows("resid_pre", layer, 0).copy())
        torch.testing.assert_close(rows, out.hidden_states[layer][0], rtol=1e-4, atol=1e-3)


TRACED = (  # a question, the name of its object, and a box that shows it, of a picture 28 × 28 with patches of 14
    ("what is the red block on the table", "red block", [15, 2, 27, 12], ([0], [1], [2, 3])),
    ("is there a gripper", "gripper", [1, 1, 9, 27], ([], [0, 2], [1, 3])),
)


@pytest.mark.parametrize(("text", "named", "box", "parts"), TRACED)
def test_recovery_rates_are_hugging_faces(
    server: Server, oracle: Oracle, text: str, named: str, box: list[int], parts: tuple[list[int], ...]
) -> None:
    """Every component, layer and group, with the noise of the picture made on the server."""
    picture, sigma, seed = scene(len(text)), 60.0, 3
    plain = oracle.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{text}"}], tokenize=False, add_generation_prompt=True
    )
    before, after = plain.split("<image>")
    first = oracle.tokenizer.encode(before, add_special_tokens=False)
    rest = oracle.tokenizer.encode(after, add_special_tokens=False)
    ids = [*first, *[IMAGE_TOKEN] * PATCHES, *rest]
    words = len(first) + PATCHES
    pieces = [oracle.tokenizer.decode(rest[: i + 1]) for i in range(len(rest))]
    start = after.index(named)
    inside = [
        words + i
        for i in range(len(rest))
        if len(pieces[i]) > start and (len(pieces[i - 1]) if i else 0) < start + len(named)
    ]
    groups = {
        **{f"{name}_visual": [len(first) + p for p in part]
           for name, part in zip(("early", "object", "late"), parts, strict=True)},
        "early_text": [*range(words, inside[0])], "object_text": inside,
        "late_text": [*range(inside[-1] + 1, len(ids) - 1)], "last": [len(ids) - 1],
    }  # fmt: skip
    groups = {name: positions for name, positions in groups.items() if positions}
    noise = np.random.default_rng([seed, zlib.crc32(picture.tobytes())]).normal(0, sigma, picture.shape)
    noisy = np.clip(np.round(picture + noise), 0, 255).astype(np.uint8)
    assert (noisy != picture).mean() > 0.9
    clean, bad = (oracle.images(Image.fromarray(p), return_tensors="pt")["pixel_values"] for p in (picture, noisy))
    with torch.no_grad():
        out = [
            oracle.model(input_ids=torch.tensor([ids]), pixel_values=p).logits[0, -1].softmax(-1) for p in (clean, bad)
        ]
    answer = int((out[0] - out[1]).argmax())
    wanted = probabilities(oracle.model, ids, clean, bad, answer, groups)
    asked = {"image": png(picture), "text": text, "object": named, "box": box, "answer": answer}
    with Steersman(server.url, api_key="key") as client:
        result = follow(client, {"kind": "trace", "questions": [asked], "sigma": sigma, "seed": seed}, every=0.1)
        assert client.kept_captures() == []
    (found,) = result["questions"]
    assert found["groups"] == {name: len(positions) for name, positions in groups.items()}
    assert (found["clean"], found["corrupted"]) == pytest.approx(wanted[:2], rel=1e-3)
    assert wanted[0] - wanted[1] > 0.05, "the picture says too little for the rates to show anything"
    for part, by_group in wanted[2].items():
        assert set(found["patched"][part]) == set(by_group)
        for group, row in by_group.items():
            assert found["patched"][part][group] == pytest.approx(row, rel=1e-3)
            moved = max(abs(p - wanted[1]) for p in row)
            assert moved > 0.01 * wanted[1], "putting this back moves nothing, so this shows nothing"
