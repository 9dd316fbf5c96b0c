"""Replays of answers without their images, around an engine that stands in for vLLM's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from steersman.server.engine.frontend import Answer, Generated
from steersman.server.engine.intake import FIELD
from steersman.server.metrics import Metrics
from steersman.steering.conflict import conflict
from steersman.steering.signals import summary
from tests.server.fakes import raw_report, reporting
from tests.server.routes.stand_in import ADD, CHUNK, DONE, FINAL, Server, events
from tests.server.test_detection import detector

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
WORDS = {"type": "text", "text": "A cat?"}
PLAIN = [3, 4, 5, 6, 7]  # the prompt without the image
WITH_IMAGE = {40: -0.1, 41: -0.2, 42: -0.3}
WITHOUT = {40: -1.5, 41: -0.2, 42: -4.0}
WANTED = conflict([*WITH_IMAGE.values()], [*WITHOUT.values()])


class Engine:
    """Replays answers of the tokens above; the prompt's own likelihoods are others."""

    def __init__(self, server: Server, policy: str = "fcfs", mode: str = "raw_logprobs") -> None:
        self.server = server
        cache = SimpleNamespace(kv_sharing_fast_prefill=False)
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(policy=policy), cache_config=cache)
        self.model_config = SimpleNamespace(logprobs_mode=mode)
        self.seen: list[dict[str, Any]] = []
        self.tickets: list[Any] = []
        self.running, self.most = 0, 0
        self.fail: Exception | None = None

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        self.seen.append({"prompt": prompt, "params": params, **options})
        self.tickets.append(self.server.frontend.tickets[params.extra_args[FIELD]])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            if self.fail is not None:
                raise self.fail
            rows: list[Any] = [None, *({i: SimpleNamespace(logprob=-9.0)} for i in PLAIN[1:])]
            answer = prompt["prompt_token_ids"][len(PLAIN) :]
            rows += [{99: SimpleNamespace(logprob=0.0), i: SimpleNamespace(logprob=WITHOUT[i])} for i in answer]
            yield SimpleNamespace(prompt_logprobs=rows)
        finally:
            self.running -= 1


class Chat(Server):
    """Chats with an image; each of ``n`` answers are all the tokens that the engine knows."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = 1, **settings: Any) -> None:
        super().__init__(folder, monkeypatch, **settings)
        self.engine = Engine(self)
        self.n, self.ids = n, [*WITH_IMAGE]
        self.rendered: list[Any] = []
        self.state = self.http.app.state.steersman  # type: ignore[attr-defined]
        self.state.engine = self.engine
        self.http.app.state.openai_serving_chat = self  # type: ignore[attr-defined]
        self.tell()

    def tell(self, **changes: Any) -> None:
        """What the workers say of every ticket's sequences; ``error``: of replays alone."""
        error = changes.pop("error", None)

        def reports(key: str) -> list[dict[str, Any]]:
            ticket = self.frontend.tickets[key]  # type: ignore[index]
            if ticket.prompt_tokens is not None:
                return [raw_report(ticket.plan, error=error)]
            return [raw_report(ticket.plan, request=f"r-{i}", **changes) | {"signals": {}} for i in range(self.n)]

        self.workers.reports = reports

    async def render_chat_request(self, request: Any) -> Any:
        self.rendered.append(request.messages)
        return [], [{"type": "token", "prompt_token_ids": [*PLAIN]}]

    async def handle(self, request: Any, raw: Any) -> Any:
        answer = await super().handle(request, raw)
        if (ticket := self.ticket(request)) is not None:
            for i in range(self.n):
                said = Answer(self.ids, [WITH_IMAGE[k] for k in self.ids])
                ticket.sequences[f"r-{i}"] = Generated("p", i, lambda: 6, lambda said=said: said, "lora", 7)  # type: ignore[misc]
        return answer

    def ask(self, steering: Any, *parts: Any, **body: Any) -> Any:
        messages = [{"role": "user", "content": [*(parts or (PICTURE, WORDS))]}]
        return self.post(steering, "/v1/chat/completions", messages=messages, **body)

    def told(self, steering: Any, *parts: Any) -> Any:
        answer = self.ask(steering, *parts)
        assert answer.status_code == 200, answer.text
        assert self.idle()
        return answer.json()["steering"]

    def replays(self) -> tuple[float, float]:
        """Done, failed."""
        metrics: Metrics = self.state.metrics
        done, failed = (metrics.replays.labels(outcome)._value.get() for outcome in ("done", "failed"))
        return done, failed


NOTHING: dict[str, Any] = {"positions": [], "columns": [], "values": []}
WHOLE = {"probes": NOTHING, "edits": NOTHING}  # of a report of every token
ASKED = {**ADD, "signals": ["conflict"]}


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    return Chat(tmp_path, monkeypatch)


def test_an_answer_is_replayed_without_its_images(chat: Chat) -> None:
    chat.tell(tokens=[WHOLE])
    found = chat.told({**ASKED, "report": "tokens"})
    (told,) = found["signals"]
    positions = {"positions": [3, 4, 5], "values": pytest.approx(WANTED)}  # the prompt has four tokens
    assert told == {"choice": 0, "signals": {"conflict": {**summary(WANTED), **positions}}}
    assert "warnings" not in found
    assert chat.rendered == [[{"role": "user", "content": [WORDS]}]]
    (seen,), (ticket,) = chat.engine.seen, chat.engine.tickets
    assert seen["prompt"] == {"type": "token", "prompt_token_ids": [*PLAIN, *WITH_IMAGE]}
    assert (seen["params"].prompt_logprobs, seen["params"].max_tokens) == (0, 1)
    assert seen["params"].skip_reading_prefix_cache
    assert (seen["lora_request"], seen["priority"]) == ("lora", 0)
    assert (ticket.plan.id, ticket.prompt_tokens) == (found["plan"], len(PLAIN))
    assert chat.replays() == (1, 0)
    assert chat.told(ASKED)["signals"] == [{"choice": 0, "signals": {"conflict": summary(WANTED)}}]


def test_its_tokens_are_in_the_histogram(chat: Chat) -> None:
    chat.told(ASKED)
    (family,) = chat.state.metrics.conflict.collect()
    counts = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    edges = sorted((float(edge), count) for edge, count in counts.items())
    assert edges == [(edge, sum(v <= edge for v in WANTED)) for edge, _ in edges]
    assert edges[-1] == (math.inf, 3)


def test_where_the_engine_has_priorities_replays_go_behind(chat: Chat) -> None:
    chat.engine.vllm_config.scheduler_config.policy = "priority"
    chat.told(ASKED)
    assert [seen["priority"] for seen in chat.engine.seen] == [8]


@pytest.mark.parametrize("most", [1, 2])
def test_few_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    chat = Chat(tmp_path, monkeypatch, n=4, max_replays=most)
    found = chat.told(ASKED)
    assert [s["signals"] for s in found["signals"]] == [{"conflict": summary(WANTED)}] * 4
    assert (chat.engine.most, len(chat.engine.seen)) == (most, 4)


def broken(chat: Chat, how: str) -> None:
    if how == "engine":
        chat.engine.fail = RuntimeError("out of blocks")
    elif how == "unsteered":
        chat.tell(error="the plan was not resident")
    elif how == "mode":
        chat.engine.model_config.logprobs_mode = "processed_logprobs"
    elif how == "prefill":
        chat.engine.vllm_config.cache_config.kv_sharing_fast_prefill = True
    elif how == "empty":
        chat.ids = []
    else:

        async def refuse(request: Any) -> Any:
            return SimpleNamespace(error=SimpleNamespace(message="an empty chat"))

        chat.render_chat_request = refuse  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("engine", "the replay without images failed: out of blocks"),
        ("unsteered", "the replay without images failed: the plan was not resident"),
        ("mode", "this server's --logprobs-mode is processed_logprobs, not raw_logprobs"),
        ("prefill", "with --kv-sharing-fast-prefill nobody knows how likely a prompt's tokens are"),
        ("empty", "nothing was generated"),
        ("template", "the messages without images are not taken: an empty chat"),
    ],
)
def test_an_answer_whose_replay_fails_is_served_and_says_so(chat: Chat, how: str, says: str) -> None:
    broken(chat, how)
    found = chat.told(ASKED)
    (warning,) = found["warnings"]
    assert warning.startswith("signal conflict is not known of choice 0: ")
    assert warning.endswith(says)
    assert "signals" not in found
    assert found["interventions"][0]["tokens"] == 3
    assert chat.replays() == (0, 1)
    assert chat.count("steered") == 1


def test_a_replay_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = len(PLAIN) + len(WITH_IMAGE)
    for i, most in enumerate((limit, limit - 1)):
        (tmp_path / str(i)).mkdir()
        chat = Chat(tmp_path / str(i), monkeypatch, max_replay_tokens=most)
        found = chat.told(ASKED)
        assert ("signals" in found) == (most == limit)
        assert len(chat.engine.seen) == (most == limit)
    (warning,) = found["warnings"]
    assert warning.endswith(f"its replay has {limit} tokens; at most {limit - 1} (--steering-max-replay-tokens)")


def test_it_needs_an_image(chat: Chat) -> None:
    for answer in (chat.ask(ASKED, WORDS), chat.post(ASKED), chat.post(ASKED, "/v1/responses")):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering.signals[0]")
    assert not chat.seen
    dry = {"steering": ASKED, "messages": [{"role": "user", "content": "A cat?"}]}
    answer = chat.http.post("/v1/steering/resolve", json=dry)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering.signals[0]")
    assert chat.idle()


def test_nobody_asked(chat: Chat) -> None:
    assert "signals" not in chat.told(ADD)
    assert not chat.engine.seen
    assert chat.replays() == (0, 0)


def test_a_stream_has_it_in_its_last_event(chat: Chat) -> None:
    chat.streams(CHUNK, FINAL, DONE)
    found = events(chat.ask(ASKED, stream=True).text)
    assert [e.get("steering", {}).get("signals") for e in found] == [
        None,
        [{"choice": 0, "signals": {"conflict": summary(WANTED)}}],
    ]
    assert chat.idle()


def test_a_detector_scores_by_it(chat: Chat) -> None:
    chat.frontend.use_detector(chat.frontend.store.add(detector("conflict.mean")))
    away = (sum(WANTED) / 3 - 1) / 2  # its center and spread
    (score,) = chat.told(ADD)["detector"]["answers"]
    assert score["score"] == pytest.approx(0.5 * math.log(2 * math.pi) + 0.5 * away**2)
    reporting(chat.workers, chat.frontend)
    found = chat.told(ADD, WORDS)
    assert found["detector"]["answers"] == [{"choice": 0, "score": None, "unusual": None, "missing": ["conflict.mean"]}]
    assert "warnings" not in found  # a detector is the server's: an answer about no image lacks nothing
    assert len(chat.engine.seen) == 1


def test_what_a_failing_handler_answers_is_not_replayed(chat: Chat) -> None:
    chat.answer = lambda request: JSONResponse({"error": {"message": "full"}}, 503)
    assert chat.ask(ASKED).status_code == 503
    assert not chat.engine.seen
    assert chat.idle()
