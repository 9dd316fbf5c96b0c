"""KV that is reused was computed under the same edits, and KV that may be reused is.

Every prompt is 170 tokens of its own, five whole blocks and a part; ``cached`` is what vLLM says of a request.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.e2e import captured
from tests.e2e.server import Server, serve
from tests.e2e.steered import INJECT, WIDE, Answer, agree, ask, distance, matters, random_assets
from tests.models.tiny import tiny_model
from tests.oracle.hf import Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BLOCK = 32
LENGTH, WHOLE = 170, 160  # tokens of a prompt, and those in whole blocks
SAME = 1e-5  # other shapes, other rounding
ADD = {"op": "add", "vector": "resid_post", "scale": 1.5, "layers": [1, 2]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    options = [*WIDE, "--block-size", str(BLOCK), "--enable-prompt-tokens-details"]
    with serve(path, tmp_path_factory.mktemp("cache"), options, forked=True) as server:
        oracle = Oracle(path, {})
        random_assets(oracle, server)
        yield server, oracle


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> list[int]:
    """Tokens that no other test has asked about."""
    chance = random.Random(request.node.nodeid)
    return [chance.randrange(8, 512) for _ in range(LENGTH)]


def plan(tokens: Any = "all", **fields: Any) -> dict[str, Any]:
    return {"interventions": [{**ADD, "tokens": tokens, **fields}]}


class Asker:
    """Asks and checks that the answer is the oracle's whatever came from the cache."""

    def __init__(self, served: tuple[Server, Oracle]) -> None:
        self.server, self.oracle = served

    def __call__(self, prompt: list[int], steering: Any, cached: int | None, label: str, new: int = 4) -> Answer:
        answer = ask(self.server, prompt, steering, new, whole=False)
        assert cached is None or answer.cached == cached, f"{label}: {answer.cached} cached tokens, not {cached}"
        agree(answer, self.oracle, steering, label)
        return answer


@pytest.fixture
def asker(served: tuple[Server, Oracle]) -> Asker:
    return Asker(served)


def test_the_same_plan_reuses_and_another_does_not(asker: Asker, prompt: list[int]) -> None:
    first = asker(prompt, plan(), 0, "first")
    again = asker(prompt, plan(), WHOLE, "again")
    assert again.new == first.new
    assert distance(again.logprobs, first.logprobs) < SAME, "the cached answer differs from the first"
    assert (first.edited, first.edited_in_cache) == ([LENGTH + 3], [0]), "report of the first"
    assert (again.edited, again.edited_in_cache) == ([LENGTH + 3], [WHOLE]), "report of the cached"
    asker(prompt, plan(scale=1.6), 0, "another scale")
    asker(prompt, plan(layers=[1]), 0, "another layer")
    asker(prompt, None, 0, "unsteered")
    asker(prompt, None, WHOLE, "unsteered again")
    asker(prompt, plan(), WHOLE, "the first plan again")
    matters(asker.oracle, first, plan(), "the edit")


@pytest.mark.parametrize("tokens", ["generated", "last_prompt", {"generated": True, "last": 1}], ids=str)
@pytest.mark.parametrize("unsteered_first", [True, False], ids=["unsteered first", "steered first"])
def test_an_unedited_prompt_is_everybodys(
    asker: Asker, prompt: list[int], tokens: Any, unsteered_first: bool
) -> None:  # fmt: skip
    order = [None, plan(tokens)] if unsteered_first else [plan(tokens), None]
    asker(prompt, order[0], 0, "first")
    answer = asker(prompt, order[1], WHOLE, "second")
    if unsteered_first:
        edited = {"generated": 3, "last_prompt": 1}.get(str(tokens), 4)
        assert (answer.edited, answer.edited_in_cache) == ([edited], [0])
        matters(asker.oracle, answer, plan(tokens), "the edit")


@pytest.mark.parametrize("first", [0, 31, 32, 80, 127, 159, 169])
def test_blocks_before_the_first_edit_are_shared(asker: Asker, prompt: list[int], first: int) -> None:
    shared = first // BLOCK * BLOCK
    one, few = plan({"positions": [first]}), plan({"ranges": [[first, first + 3]]})
    asker(prompt, None, 0, "unsteered")
    answer = asker(prompt, one, shared, f"position {first} after unsteered")
    assert (answer.edited, answer.edited_in_cache) == ([1], [0])
    asker(prompt, few, shared, f"a range from {first} after unsteered and another plan")
    again = asker(prompt, one, WHOLE, f"position {first} again")
    assert (again.edited, again.edited_in_cache) == ([1], [int(first < WHOLE)])
    asker(prompt, None, WHOLE, "unsteered again")


def test_steered_blocks_before_the_first_edit_are_shared(asker: Asker, prompt: list[int]) -> None:
    asker(prompt, plan({"positions": [80]}), 0, "position 80")
    asker(prompt, plan({"positions": [-40]}), 64, "position 130, as 80 was first")
    asker(prompt, plan({"positions": [-40, 80]}), 64, "both")
    asker(prompt, None, 128, "unsteered, after position 130")
    asker(prompt, plan("generated"), WHOLE, "generated, after unsteered")


def test_generated_tokens_become_a_prompt(asker: Asker, prompt: list[int]) -> None:
    """From 60 tokens, 80 are generated, of which the last is not fed in."""
    start, edits = prompt[:60], {"generated": plan("generated"), "all": plan(), "none": None}
    cached = {"generated": 32, "all": 128, "none": 128}
    for name, steering in edits.items():
        own = [9 + len(name), *start[1:]]
        first = asker(own, steering, 0, f"{name}, first", new=80)
        answer = asker([*first.ids, 11, 12], steering, cached[name], f"{name}, its continuation")
        if steering:
            tokens = {"generated": 3, "all": 142 + 3}[name]
            assert (answer.edited, answer.edited_in_cache) == ([tokens], [cached[name] if name == "all" else 0]), name
        other, shared = (None, 128 if name == "generated" else 0) if steering else (plan(), 0)
        asker([*first.ids, 11, 12], other, shared, f"{name}, continued otherwise")


def test_generated_tokens_of_a_gated_request(asker: Asker, prompt: list[int]) -> None:
    """Where a gate decides once, what it decided is part of what the blocks depend on."""
    for above, label in ((-50.0, "open"), (50.0, "closed")):
        when = {"vector": "resid_post", "layer": 0, "measure": "projection", "above": above, "over": "last_prompt"}
        steering = plan(when=when)
        first = asker([7 + len(label), *prompt[1:60]], steering, 0, f"{label}, first", new=80)
        again = asker(first.prompt, steering, 32, f"{label}, again", new=80)
        assert again.new == first.new, label
        asker([*first.ids, 11, 12], steering, 0, f"{label}, its continuation")


@pytest.mark.parametrize("over", ["prompt_mean", "hold", "token", "last_prompt"])
def test_gates_on_a_cached_prompt(asker: Asker, prompt: list[int], over: str) -> None:
    """A gate that reads the whole prompt computes all of it; the others may leave out what is cached."""
    stream = asker.oracle.capture(prompt, [(0, "resid_post")], prompt_len=LENGTH)[0, "resid_post"]
    direction = asker.oracle.assets["resid_post"].layers[0]
    seen = stream @ (direction / direction.norm())
    middle = {"prompt_mean": seen.mean(), "last_prompt": seen[-1], "hold": seen.max(), "token": seen.median()}[over]
    once = over in ("prompt_mean", "last_prompt")
    cached = 0 if over in ("prompt_mean", "hold") else WHOLE
    asker(prompt, None, 0, "unsteered")
    for step, opens in ((-0.05, True), (0.05, False)):  # of the prompt alone: a held gate may open later on
        when = {"vector": "resid_post", "layer": 0, "measure": "projection", "above": float(middle) + step}
        when |= {"hold": True} if over == "hold" else {"over": over}
        steering = plan("generated", when=when)
        first = asker(prompt, steering, cached, f"{over}: on a prompt that is in the cache", new=8)
        again = asker(prompt, steering, cached, f"{over}: again", new=8)
        assert distance(first.logprobs, again.logprobs) < SAME, f"{over}: another answer the second time"
        reports = [a.body["steering"]["interventions"][0] for a in (first, again)]
        for report in reports:
            report.pop("mean_relative_norm")  # of passes that are chosen by the engine's count of passes
        assert reports[0] == reports[1], f"{over}: another report the second time"
        assert reports[0]["gate"]["open"] == ([opens] if once else None), f"{over}: decision"
        if once or (over == "hold" and opens):
            assert first.edited == [7 if opens else 0], f"{over}: edited tokens"
        asker(prompt, None, WHOLE, f"{over}: unsteered again")


def test_an_edited_prompt_under_a_whole_prompt_gate(asker: Asker, prompt: list[int]) -> None:
    """Such a request reads nothing from the cache, and what it writes is its own."""
    when = {"vector": "resid_post", "layer": 0, "measure": "projection", "above": 0.3, "hold": True}
    for label in ("first", "again"):
        asker(prompt, plan(when=when), 0, label)
    asker(prompt, None, 0, "unsteered")
    asker(prompt, plan(), 0, "the same edit without a gate")


def test_an_injection_on_a_cached_prompt(asker: Asker, prompt: list[int]) -> None:
    """By default the whole blocks before the prompt's last token are everybody's; the others are the plan's own."""
    default, everywhere = {"interventions": [INJECT]}, {"interventions": [{**INJECT, "tokens": "all"}]}
    asker(prompt, None, 0, "unsteered")
    answer = asker(prompt, default, WHOLE, "after unsteered")
    assert (answer.edited, answer.edited_in_cache) == ([4], [0])
    matters(asker.oracle, answer, default, "the injection")
    first = asker(prompt, everywhere, 0, "of every token")
    again = asker(prompt, everywhere, WHOLE, "of every token, again")
    assert (again.edited, again.edited_in_cache) == ([LENGTH + 3], [WHOLE])
    assert distance(again.logprobs, first.logprobs) < SAME
    asker(prompt, {"interventions": [{**INJECT, "tokens": "all", "scale": 0.9}]}, 0, "of another strength")
    asker(prompt, default, WHOLE, "by default, again")


def test_probes_do_not_split_the_cache(asker: Asker, prompt: list[int]) -> None:
    probes = [{"vector": "resid_post"}, {"vector": "mlp_post", "layers": [3]}]
    asker(prompt, {"probes": probes}, 0, "probes alone")
    asker(prompt, None, WHOLE, "unsteered")
    first = asker(prompt, {**plan(), "probes": probes}, 0, "an edit and probes")
    asker(prompt, plan(), WHOLE, "the edit")
    again = asker(prompt, {**plan(), "probes": probes[:1]}, WHOLE, "the edit and one of the probes")
    seen = [a.body["steering"]["probes"][0]["layers"]["3"]["tokens"] for a in (first, again)]
    assert seen == [LENGTH + 3, LENGTH - WHOLE + 3], "tokens that the probe has read"


def test_captures_compute_what_is_cached(asker: Asker, prompt: list[int]) -> None:
    """And what they have computed is reused as if a completion had: by everybody, or by those with the same plan."""
    asker(prompt, None, 0, "unsteered")
    first = captured.capture(asker.server, [prompt])
    captured.check(asker.oracle, first, label="of a cached prompt")
    again = captured.capture(asker.server, [prompt])
    assert all(np.array_equal(again.arrays[name], rows) for name, rows in first.arrays.items())
    asker(prompt, None, WHOLE, "unsteered again")
    for label in ("steered", "steered again"):
        captured.check(asker.oracle, captured.capture(asker.server, [prompt], steering=plan()), plan(), label)
    asker(prompt, plan(), WHOLE, "the plan of a capture")
    own = [9, *prompt[1:]]
    captured.check(asker.oracle, captured.capture(asker.server, [own], steering=plan(scale=1.3)), plan(scale=1.3))
    asker(own, None, 0, "unsteered, after a steered capture")


def test_sequences_of_one_request(asker: Asker, prompt: list[int]) -> None:
    server = asker.server
    body = {"n": 3, "temperature": 1.0, "seed": 5}
    first = ask(server, prompt, plan("generated"), 6, whole=False, **body)
    again = ask(server, prompt, plan("generated"), 6, whole=False, **body)
    assert [c["token_ids"] for c in again.body["choices"]] == [c["token_ids"] for c in first.body["choices"]]
    assert again.cached == WHOLE
    assert again.edited == [3 * 5]
    one = ask(server, prompt, plan(), 6, whole=False, **body)
    two = ask(server, prompt, plan(), 6, whole=False, **body)
    assert one.edited == two.edited == [3 * (LENGTH + 5)]
    assert two.edited_in_cache == [3 * WHOLE]
