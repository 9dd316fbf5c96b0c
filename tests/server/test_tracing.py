"""Tracing and ablation jobs around the toy model, in which a row depends on its own token alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from steersman.server import ablation, tracing
from steersman.server.jobs import Progress
from steersman.server.tracing_spec import AblateSpec, TraceSpec
from steersman.steering.errors import InvalidRequest, SteeringError
from steersman.steering.plan import Place
from steersman.steering.sites import Site
from steersman.steering.spec import checked
from tests.server.engine.toy import FACTORS, POSITIONS, SHIFTS, TABLE
from tests.server.toy_engine import HEAD, ToyEngine
from tests.steering.library import LAYERS, D

CLEAN, SWAPPED, ANSWER = [3, 9, 12, 4], [3, 9, 12, 60], 17
SWAP = {"prompt": CLEAN, "swap": SWAPPED, "answer": ANSWER}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyEngine:
    return ToyEngine(tmp_path, monkeypatch)


def traced(engine: ToyEngine, *questions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    spec = checked(TraceSpec, {"kind": "trace", "questions": list(questions), **fields}, "")
    tracing.check(spec, engine.state)
    progress = Progress()
    found = asyncio.run(tracing.trace(spec, engine.state, progress))
    assert progress.done == progress.total > 0
    assert engine.idle()
    assert engine.frontend.kept.list() == []
    return found


def ablated(engine: ToyEngine, *questions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    spec = checked(AblateSpec, {"kind": "ablate", "questions": list(questions), **fields}, "")
    progress = Progress()
    found = asyncio.run(ablation.ablate(spec, engine.state, progress))
    assert progress.done == progress.total > 0
    assert engine.idle()
    assert engine.frontend.kept.list() == []
    return found


def forward(ids: list[int], put: dict[Place, torch.Tensor] | None = None) -> dict[Place, torch.Tensor]:
    """The toy's arithmetic in double; ``put``: rows [n, d] in place of what a branch adds."""
    seen: dict[Place, torch.Tensor] = {}
    stream = (TABLE[ids] + POSITIONS[: len(ids)]).double()
    for layer in range(LAYERS):
        for site, factors in zip((Site.ATTN_OUT, Site.MLP_OUT), FACTORS[layer].double(), strict=True):
            place = Place(layer, site)
            seen[place] = stream * factors if put is None or place not in put else put[place]
            stream = stream + seen[place]
        stream = stream * 0.75 + SHIFTS[layer].double()
        stream[:, 0] /= 0.75
        seen[Place(layer, Site.RESID_POST)] = stream.clone()
    return seen


def distribution(ids: list[int], put: dict[Place, torch.Tensor] | None = None) -> torch.Tensor:
    row = forward(ids, put)[Place(LAYERS - 1, Site.RESID_POST)][-1]
    return (row @ HEAD.double().T).softmax(-1)


def probability(ids: list[int], put: dict[Place, torch.Tensor] | None = None) -> float:
    return float(distribution(ids, put)[ANSWER])


def test_what_a_swapped_token_costs_comes_back_where_it_is_put_back(engine: ToyEngine) -> None:
    found = traced(engine, SWAP)
    (told,) = found["questions"]
    clean, bad = probability(CLEAN), probability(SWAPPED)
    assert abs(clean - bad) > 1e-3
    assert (told["clean"], told["corrupted"]) == pytest.approx((clean, bad), rel=1e-4)
    assert (told["answer"], told["groups"]) == (ANSWER, {"last": 1})
    assert told["patched"]["hidden"]["last"] == pytest.approx([clean] * LAYERS, rel=1e-4)
    assert found["n_layers"] == LAYERS
    for part, site in (("attn", Site.ATTN_OUT), ("mlp", Site.MLP_OUT)):
        for layer in range(LAYERS):
            place = Place(layer, site)
            put = {place: torch.cat([forward(SWAPPED)[place][:-1], forward(CLEAN)[place][-1:]])}
            wanted = probability(SWAPPED, put)
            assert told["patched"][part]["last"][layer] == pytest.approx(wanted, rel=1e-4)
            assert wanted != pytest.approx(bad, rel=1e-3)


def test_layers_components_groups_and_windows_that_are_asked_for(engine: ToyEngine) -> None:
    found = traced(engine, SWAP, layers=[1, 3], components=["attn"], groups=["last"])
    (told,) = found["questions"]
    row = told["patched"]["attn"]["last"]
    assert [p is None for p in row] == [True, False, True, False]
    assert list(told["patched"]) == ["attn"]
    wide = traced(engine, SWAP, components=["attn"], window=2 * LAYERS)["questions"][0]["patched"]["attn"]["last"]
    assert wide[0] == pytest.approx(wide[-1])
    assert wide[0] != pytest.approx(row[1], rel=1e-4)


def test_a_small_room_for_captures_changes_nothing(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = traced(engine, SWAP, window=3)
    monkeypatch.setattr(tracing, "SHARE", 1 << 40)  # no room: one layer at a time
    assert traced(engine, SWAP, window=3) == wanted


def test_noise_on_the_embeddings_of_a_name(engine: ToyEngine) -> None:
    """The name's rows are of no use to the last one here, so nothing is lost: but the noise is put on them alone."""
    asked = {"prompt": "the sea is", "object": "sea", "answer": " "}
    (told,) = traced(engine, asked)["questions"]
    assert told["groups"] == {"early_text": 5, "object_text": 3, "late_text": 2, "last": 1}
    assert told["clean"] == told["corrupted"]
    capture, seen = tracing.corrupted, []

    async def noted(*args: Any) -> Any:
        seen.append(await capture(*args))
        return seen[-1]

    tracing.corrupted = noted  # type: ignore[assignment]
    try:
        traced(engine, asked, sigma=2.0, components=["mlp"], layers=[0])
    finally:
        tracing.corrupted = capture
    (posed,) = seen
    assert [edit["tokens"]["positions"] for edit in posed.edits] == [[5], [6], [7]]
    assert {(edit["op"], edit["site"], *edit["layers"]) for edit in posed.edits} == {("add", "resid_pre", 0)}


def test_a_capture_that_somebody_keeps_stays(engine: ToyEngine) -> None:
    body = {"prompts": [CLEAN], "sites": ["mlp_out"], "layers": [2], "tokens": {"positions": [3]}, "keep": True}
    kept = engine.http.post("/v1/steering/captures", json=body).json()["id"]
    spec = checked(TraceSpec, {"kind": "trace", "questions": [SWAP], "components": ["mlp"], "layers": [2]}, "")
    asyncio.run(tracing.trace(spec, engine.state, Progress()))
    assert [about["id"] for about in engine.frontend.kept.list()] == [kept]


def test_a_cancelled_job_leaves_nothing(engine: ToyEngine) -> None:
    async def scenario() -> None:
        spec = checked(TraceSpec, {"kind": "trace", "questions": [SWAP] * 50}, "")
        progress = Progress()
        task = asyncio.ensure_future(tracing.trace(spec, engine.state, progress))
        while progress.done < 20:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert engine.idle()
    assert engine.frontend.kept.list() == []


@pytest.mark.parametrize(
    ("question", "param", "says"),
    [
        ({**SWAP, "swap": [1, 2]}, "questions[0].swap", "has 2 tokens, the question 4"),
        ({"prompt": "the sea", "object": "sky", "answer": "a"}, "questions[0].object", "is not in the text"),
        ({"prompt": [1] * 64, "swap": [2] * 64, "answer": 1}, "questions[0].prompt", "room for 63"),
        ({"prompt": [1], "swap": [64], "answer": 1}, "questions[0]", "out of vocabulary"),
        ({"prompt": "a", "image": "?", "answer": 1}, "questions[0].image", "PNG or JPEG"),
    ],
)
def test_bad_questions_name_their_field(engine: ToyEngine, question: Any, param: str, says: str) -> None:
    with pytest.raises(SteeringError, match=says) as caught:
        traced(engine, question)
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_a_limit_on_edits_would_change_what_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(tmp_path, monkeypatch, max_relative_norm=0.5, dosage="cap")
    with pytest.raises(InvalidRequest, match="--steering-max-relative-norm"):
        traced(engine, SWAP)


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_layers_taken_out(engine: ToyEngine, value: str) -> None:
    other = {"prompt": [1, 7, 2], "answer": 5, "set": "b"}
    found = ablated(engine, {"prompt": CLEAN, "answer": ANSWER}, other, units="layers", value=value)
    assert found["units"] == [[part, layer][::-1] for part in ("attn", "mlp") for layer in range(LAYERS)]
    told = found["questions"][0]
    assert told["clean"] == pytest.approx(probability(CLEAN), rel=1e-4)
    questions = [CLEAN, [1, 7, 2]]
    for i, (layer, part) in enumerate(found["units"]):
        place = Place(layer, Site.ATTN_OUT if part == "attn" else Site.MLP_OUT)
        rows = [forward(ids)[place] for ids in questions]
        # a mean is over all tokens of both prompts but their first ones
        row = torch.cat([each[1:] for each in rows]).mean(0) if value == "mean" else torch.zeros(D).double()
        wanted = distribution(CLEAN, {place: row.expand(len(CLEAN), -1)})
        assert told["without"][i] == pytest.approx(float(wanted[ANSWER]), rel=1e-4)
        assert told["first_without"][i] == int(wanted.argmax())
    assert [q["set"] for q in found["questions"]] == ["", "b"]


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_heads_and_neurons_are_the_ops(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    row = [*range(20)]
    means = {
        Place(layer, site): torch.tensor(row[:width], dtype=torch.float32).numpy()
        for layer in range(LAYERS)
        for site, width in ((Site.ATTN_Z, 12), (Site.MLP_POST, 20))
    }
    known = means if value == "mean" else {}
    heads = ablation._head(ablation.Unit(2, 1), known)
    assert heads[0] == {"op": "heads", "heads": [[2, 1]], "factor": 0}
    assert len(heads) == (2 if known else 1)
    neuron = ablation._neuron(ablation.Unit(1, 13), known)
    assert (neuron["neurons"], neuron["mode"]) == ({"inline": [[1, 13]]}, "set")
    assert neuron["value"] == (13.0 if known else 0.0)
    engine.frontend.resolve({"interventions": [*heads, neuron]})


def test_probabilities_are_exact_however_small(engine: ToyEngine) -> None:
    least = int(distribution(CLEAN).argmin())
    (told,) = traced(engine, {**SWAP, "answer": least}, components=["mlp"], layers=[0])["questions"]
    assert told["clean"] == pytest.approx(float(distribution(CLEAN)[least]), rel=1e-4)
