"""The extraction job against the offline extraction on the same tiny model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steersman.server import extraction
from steersman.server.extraction_spec import ExtractSpec
from steersman.server.jobs import Progress
from steersman.server.routes.jobs import parse
from steersman.server.state import SteeringState
from steersman.steering.assets import Asset
from steersman.steering.errors import (
    InvalidRequest,
    LayerOutOfRange,
    PayloadTooLarge,
    SiteUnsupported,
    SteeringError,
    UnknownField,
)
from steersman.steering.extraction import collect_hf, difference_of_means
from steersman.steering.extraction_directions import linear_probe, pca_of_differences, scaled_to_gap
from tests.server.contrast import READ, Captures, Letters, model
from tests.server.fakes import frontend, state_of
from tests.steering.library import D_HEAD, HEADS, LAYERS, D

POSITIVE = ["calm sea", "still waters run", "hush", "a quiet morning", "slow", "soft"]
NEGATIVE = ["storm", "waves break on rocks", "crash!", "thunder all night", "fast", "hard"]
PAIRS = [{"positive": p, "negative": n} for p, n in zip(POSITIVE, NEGATIVE, strict=True)]
SETS = {"positive": POSITIVE, "negative": NEGATIVE}
BASE = {"kind": "extract", "name": "serene", "layers": list(READ)}


@pytest.fixture
def state(tmp_path: Path) -> SteeringState:
    return state_of(frontend(tmp_path, tokenizer=Letters()))


def spec(**fields: Any) -> ExtractSpec:
    found = parse(json.dumps({**BASE, **fields}).encode())
    assert isinstance(found, ExtractSpec)
    return found


def result(state: SteeringState, captures: Captures | None = None, **fields: Any) -> dict[str, Any]:
    progress = Progress()
    found = asyncio.run(extraction.run(spec(**fields), state, captures or Captures(), progress))
    assert progress.done == progress.total > 0
    return found


def extract(state: SteeringState, captures: Captures | None = None, **fields: Any) -> list[Asset]:
    return [state.frontend.store.get(ref) for ref in result(state, captures, **fields)["assets"]]


def offline(texts: list[str], token: Any = "mean", prompts: list[str] | None = None) -> torch.Tensor:
    return collect_hf(model(), Letters(), texts, READ, token, prompts)


# -- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["mean", "last"])
@pytest.mark.parametrize("data", [{"pairs": PAIRS}, SETS], ids=["pairs", "sets"])
def test_the_same_direction_as_offline(state: SteeringState, token: str, data: dict[str, Any]) -> None:
    (made,) = extract(state, token=token, **data)
    expected = difference_of_means(offline(POSITIVE, token), offline(NEGATIVE, token))
    torch.testing.assert_close(made.tensors["vectors"], expected, rtol=1e-4, atol=1e-6)
    assert made.meta.edited_layers == READ
    assert made.meta.provenance["examples"] == {"positive": 6, "negative": 6}


def test_a_prompt_is_fed_before_and_not_read(state: SteeringState) -> None:
    ask = [{"role": "user", "content": "How is it?"}]
    (made,) = extract(state, pairs=[{**pair, "prompt": ask} for pair in PAIRS])
    asked = ["<uHow is it?><a"] * len(PAIRS)
    expected = difference_of_means(offline(POSITIVE, prompts=asked), offline(NEGATIVE, prompts=asked))
    torch.testing.assert_close(made.tensors["vectors"], expected, rtol=1e-4, atol=1e-6)


def test_chats_are_left_open_after_the_assistant_or_made_ready_for_it(state: SteeringState) -> None:
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    captures = Captures()
    extract(state, captures, positive=[[user]], negative=[[user, said]], token="last")
    letters = Letters()
    texts = ["<uHi><a", "<uHi><aYo"]
    assert [ids for ids, _ in captures.asked] == [letters.encode(text, add_special_tokens=False) for text in texts]


def test_single_positions_count_from_either_end(state: SteeringState) -> None:
    captures = Captures()
    extract(state, captures, positive=["abc"], negative=["wxyz"], token=-2)
    assert [tokens.positions for _, tokens in captures.asked] == [[-2], [-2]]
    with pytest.raises(InvalidRequest, match="position 7 is not one of 4 tokens") as caught:
        extract(state, positive=["a long text"], negative=["abc"], token=7)
    assert caught.value.param == "negative[0]"


def test_a_lone_token_is_its_own_mean(state: SteeringState) -> None:
    captures = Captures()
    extract(state, captures, positive=["a"], negative=["b"])
    assert [tokens.ranges for _, tokens in captures.asked] == [[(1, 2)], [(1, 2)]]  # BOS comes before
    assert extraction.positions("mean", 1, 0).ranges == [(0, 1)]


# -- methods --------------------------------------------------------------------------------------


def test_other_methods_are_the_offline_ones(state: SteeringState) -> None:
    positive, negative = offline(POSITIVE), offline(NEGATIVE)
    (unit,) = extract(state, pairs=PAIRS, method="pca", length="unit")
    pca = pca_of_differences(positive, negative)
    assert (torch.cosine_similarity(unit.tensors["vectors"], pca) > 1 - 1e-4).all()
    torch.testing.assert_close(unit.tensors["vectors"].norm(dim=1), torch.ones(len(READ)))
    (probe,) = extract(state, method="linear_probe", **SETS)
    expected = scaled_to_gap(linear_probe(positive, negative), positive, negative)
    torch.testing.assert_close(probe.tensors["vectors"], expected, rtol=1e-3, atol=1e-5)


def test_held_out_examples_are_told_apart_where_there_are_enough(state: SteeringState) -> None:
    assert "held_out" not in extract(state, pairs=PAIRS)[0].meta.provenance
    (made,) = extract(state, pairs=PAIRS * 2)
    told = made.meta.provenance["held_out"]
    for name in ("accuracy", "auc"):
        assert len(told[name]) == len(READ)
        assert all(0 <= score <= 1 for score in told[name])


def test_the_result_tells_of_every_layer(state: SteeringState) -> None:
    found = result(state, pairs=PAIRS * 2)
    (ref,) = found["assets"]
    made = state.frontend.store.get(ref)
    assert found["held_out"] == made.meta.provenance["held_out"]
    assert found["norms"] == {ref: pytest.approx(made.tensors["vectors"].norm(dim=1).tolist())}
    read = torch.cat([offline(POSITIVE), offline(NEGATIVE)]).norm(dim=-1).mean(0)
    assert found["read_norms"] == pytest.approx(read.tolist(), rel=1e-4)
    assert found["examples"] == {"positive": 2 * len(PAIRS), "negative": 2 * len(PAIRS)}
    assert (found["method"], found["site"], found["token"]) == ("mean_difference", "resid_post", "mean")
    assert result(state, pairs=PAIRS)["held_out"] is None
    heads = result(state, pairs=PAIRS, method="heads", heads={"k": 2}, layers="all")
    assert (heads["norms"], heads["held_out"]) == ({}, None)
    json.dumps([found, heads], allow_nan=False)


def test_shift_makes_a_direction_for_each_group(state: SteeringState) -> None:
    groups = ["x", "y", "x", "y", "x", "y"]
    made = extract(state, pairs=[{**p, "group": g} for p, g in zip(PAIRS, groups, strict=True)], method="shift")
    assert [asset.name for asset in made] == ["serene-x", "serene-y"]
    expected = difference_of_means(offline(POSITIVE[1::2]), offline(NEGATIVE[1::2]))
    torch.testing.assert_close(made[1].tensors["vectors"], expected, rtol=1e-4, atol=1e-6)


def test_heads_make_a_vector_and_a_profile(state: SteeringState) -> None:
    vector, profile = extract(state, pairs=PAIRS, method="heads", heads={"k": 2, "alpha": 5}, layers="all")
    assert vector.meta.provenance["data_sha256"]
    assert vector.tensors["vectors"].shape[1] == HEADS * D_HEAD
    assert profile.meta.steering["interventions"][0]["scale"] == 5  # type: ignore[union-attr]
    assert len(profile.meta.steering["interventions"][0]["heads"]) == 2  # type: ignore[union-attr]
    state.frontend.resolve({"profile": "serene"})


def test_sides_that_do_not_differ_have_no_direction(state: SteeringState) -> None:
    with pytest.raises(InvalidRequest, match="do not differ") as caught:
        extract(state, positive=["same"], negative=["same"])
    assert caught.value.param == "method"


# -- how it runs ----------------------------------------------------------------------------------


def test_a_few_examples_at_a_time(state: SteeringState) -> None:
    captures = Captures()
    captures.together = extraction.CONCURRENT
    extract(state, captures, pairs=PAIRS * 4)
    assert captures.most == extraction.CONCURRENT
    assert len(captures.asked) == 48


def test_a_failed_example_is_named_and_ends_the_others(state: SteeringState) -> None:
    bad = [{"role": "robot", "content": "x"}]
    pairs = [*PAIRS, {"positive": "x", "negative": bad}]
    with pytest.raises(InvalidRequest, match="template does not take these messages: no such role") as caught:
        extract(state, pairs=pairs)
    assert caught.value.param == "pairs[6].negative"
    assert not [info for info in state.frontend.store.list() if info.name == "serene"]


def test_cancelling_ends_the_captures(state: SteeringState) -> None:
    captures = Captures()

    async def test() -> None:
        captures.hold = asyncio.Event()
        task = asyncio.create_task(extraction.run(spec(pairs=PAIRS), state, captures, Progress()))
        while captures._running < 6:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert captures._running == 0

    asyncio.run(test())


# -- what may be asked ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "kind"),
    [
        ({"layers": [LAYERS]}, "layers", LayerOutOfRange),
        ({"site": "resid_post", "layers": "2-9"}, "layers", LayerOutOfRange),
        ({"method": "heads", "heads": {"k": 99}, "layers": [0]}, "heads.k", InvalidRequest),
    ],
)
def test_what_the_model_does_not_have(
    state: SteeringState, fields: dict[str, Any], param: str, kind: type[SteeringError]
) -> None:
    with pytest.raises(kind) as caught:
        extraction.checked_layers(spec(pairs=PAIRS, **fields), state)
    assert caught.value.param == param


def test_sites_that_the_model_does_not_have(state: SteeringState) -> None:
    model = state.frontend.model
    state.frontend.model = replace(model, sites={s: widths for s, widths in model.sites.items() if s != "mlp_post"})
    with pytest.raises(SiteUnsupported):
        extraction.checked_layers(spec(pairs=PAIRS, site="mlp_post", layers="all"), state)


def test_activations_have_a_limit_that_is_told(tmp_path: Path) -> None:
    state = state_of(frontend(tmp_path, tokenizer=Letters(), max_job_mb=1))
    examples = (2 << 20) // (D * 4 * len(READ)) // 2 + 1
    with pytest.raises(PayloadTooLarge, match=r"take 3 MiB; at most 1 \(--steering-max-job-mb\)"):
        extraction.checked_layers(spec(positive=["a"] * 20_000, negative=["b"] * examples), state)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        extraction.checked_layers(spec(pairs=PAIRS), state_of(frontend(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, None, "either pairs, or positive and negative"),
        ({"pairs": PAIRS, "positive": ["x"]}, None, "either pairs, or positive and negative"),
        ({"positive": ["x"]}, None, "either pairs, or positive and negative"),
        ({**SETS, "method": "pca"}, None, "method pca needs pairs"),
        ({**SETS, "method": "shift"}, None, "method shift needs pairs"),
        ({"pairs": PAIRS, "method": "magic"}, "method", "should be"),
        ({"pairs": PAIRS, "method": "heads", "site": "resid_post"}, None, "reads attn_z"),
        ({"pairs": PAIRS, "heads": {"k": 3}}, None, "heads goes with method heads"),
        ({"pairs": PAIRS, "method": "shift", "length": "gap"}, None, "length is not for method shift"),
        ({"pairs": [{**PAIRS[0], "group": "g"}]}, None, "groups go with method shift"),
        ({"pairs": [{**PAIRS[0], "group": "g"}, PAIRS[1]], "method": "shift"}, None, "every pair a group"),
        ({"pairs": [{"positive": "x"}]}, "pairs[0].negative", "required"),
        ({"pairs": [{"positive": "", "negative": "x"}]}, "pairs[0].positive", "at least 1"),
        ({"pairs": []}, "pairs", "at least 1"),
        ({"positive": [3], "negative": ["x"]}, "positive[0]", "should be"),
        ({"positive": [[{"role": "user"}]], "negative": ["x"]}, "positive[0][0].content", "required"),
        ({"pairs": [{"prompt": "x", "positive": [{"role": "user", "content": "x"}], "negative": "y"}]}, None, "texts"),
        ({"pairs": PAIRS, "token": "first"}, "token", "should be"),
        ({"pairs": PAIRS, "layers": "4"}, "layers", "integer"),
        ({"pairs": PAIRS, "name": "../x"}, "name", "must name an asset"),
        ({"pairs": PAIRS, "name": "server-default.x"}, "name", "must name an asset"),
        ({"pairs": PAIRS, "site": "nowhere"}, "site", "should be"),
    ],
)
def test_bad_specs_name_the_field(fields: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        spec(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"colour": 1}, "colour"),
        ({"pairs": [{**PAIRS[0], "colour": 1}]}, "pairs[0].colour"),
        ({"method": "heads", "heads": {"n": 1}}, "heads.n"),
    ],
)
def test_unknown_fields_are_errors(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnknownField) as caught:
        spec(**{"pairs": PAIRS, **fields})
    assert caught.value.param == param
