"""Calibration against a served model that is a formula."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest
import torch

from steersman.clients.calibration import calibrate, neutral_texts, save
from steersman.clients.calibration_rules import CalibrationError
from steersman.clients.calibration_spec import Calibration, CalibrationSpec
from steersman.clients.vector_assets import VectorAsset, decode, encode
from tests.clients.served import REF, D, Served, kl

FRENCH = {"by": "lexicon", "name": "french"}
PROMPTS = ["one", "two!", "three", "four", "five", "seven"]


class Steps:
    def __init__(self) -> None:
        self.total = self.done = 0

    def expect(self, total: int, unit: str) -> None:
        assert total >= self.done
        self.total = total

    def advance(self, count: int = 1) -> None:
        self.done += count
        assert self.done <= self.total


def spec(**fields: Any) -> CalibrationSpec:
    return CalibrationSpec.model_validate(
        {"vector": "french", "prompts": PROMPTS, "scorer": FRENCH, "max_damage": 2.0, **fields}
    )


def run(served: Served, asked: CalibrationSpec) -> tuple[Calibration, Steps]:
    steps = Steps()

    async def work() -> Calibration:
        async with served.client() as http:
            return await calibrate(http, asked, steps)

    found = asyncio.run(work())
    return found, steps


def test_the_sweep_measures_effect_and_damage() -> None:
    found, steps = run(Served(), spec(scales=[0.1, 0.2, 0.5]))
    assert (found.vector, found.model, len(found.cells)) == (REF, "m", 6)
    assert found.unsteered == pytest.approx(np.mean([0.1 * (len(p) % 3) for p in PROMPTS]))
    by_place = {(cell.layer, cell.scale): cell for cell in found.cells}
    assert by_place[1, 0.2].effect == pytest.approx(found.unsteered + 0.4)
    assert by_place[3, 0.2].effect == pytest.approx(found.unsteered + 0.1)
    for (_, scale), cell in by_place.items():
        assert cell.damage == pytest.approx(kl(2 * scale), rel=1e-4)
    assert by_place[1, 0.5].example == " ".join(["bonjour"] * 10)
    assert steps.done == steps.total == 1 + 6 + 3 * 5


def test_it_recommends_the_greatest_effect_within_the_damage() -> None:
    asked = spec(scales=[0.1, 0.2, 0.3], max_damage=(kl(0.4) + kl(0.6)) / 2)
    found, _ = run(Served(), asked)
    assert found.best is not None
    assert (found.best.layer, found.best.scale) == (1, 0.2)
    assert found.best.random is not None
    assert len(found.best.random.by_seed) == 5
    assert found.best.random.beaten_by is not None
    assert found.best.random.beaten_by > 3
    assert all(cell.random is None for cell in found.cells if cell.layer == 3), "controls where they are needed alone"


def test_a_score_that_is_to_fall() -> None:
    found, _ = run(Served(), spec(scales=[-0.2, 0.2], goal="decrease", prompts=["ab", "abcde", "xx", "vwxyz"]))
    assert found.best is not None
    assert found.best.scale == -0.2
    assert found.best.effect < found.unsteered


def test_scales_for_divergences_are_found() -> None:
    targets = [0.05, 0.25, 0.5]
    found, steps = run(Served(), spec(target_kl=targets))
    assert [cell.target_kl for cell in found.cells] == targets * 2
    for cell in found.cells:
        assert cell.damage == pytest.approx(cell.target_kl, rel=0.02)
        assert kl(2 * cell.scale) == pytest.approx(cell.target_kl, rel=0.03)
    assert steps.done == steps.total


def test_without_scales_the_targets_are_the_papers() -> None:
    assert spec().targets == [0.25, 0.5, 3.0]
    assert spec(scales=[1.0]).targets == []
    assert spec(scales=[1.0], target_kl=[0.5]).targets == [0.5]


def test_a_vector_that_does_nothing_cannot_reach_them() -> None:
    served = Served()
    served.odds = 0.0
    with pytest.raises(CalibrationError, match=r"layer 1: no scale up to 4096 reaches 0.25 nats"):
        run(served, spec())


def test_where_random_directions_do_as_well_nothing_is_recommended() -> None:
    served = Served()
    served.asset["tensors"]["vectors"] = encode(np.random.default_rng(9).standard_normal((2, D)).astype(np.float32))
    found, steps = run(served, spec(scales=[0.02, 0.05], min_standard_errors=5.0))
    assert found.best is None
    assert "5 standard errors beyond random directions" in found.refusal
    assert all(cell.random is not None for cell in found.cells if cell.effect > found.unsteered)
    assert steps.done == steps.total


def test_random_directions_have_the_vectors_norm_at_its_site() -> None:
    served = Served(site="mlp_out")
    run(served, spec(scales=[0.5], layers=[3], seeds=3))
    inline = [e for body in served.asked for e in body["steering"]["interventions"] if e["vector"] != REF]
    rows = {edit["vector"]["inline"]["data"]: decode(edit["vector"]["inline"]) for edit in inline}
    assert len(rows) == 3
    for row in rows.values():
        assert np.linalg.norm(row) == pytest.approx(2.0, rel=1e-5)
    assert all(e["site"] == "mlp_out" and e["layers"] == e["vector"]["inline"]["layers"] == [3] for e in inline)


def test_first_tokens_and_instructions() -> None:
    asked = spec(scales=[0.4], scorer={"by": "tokens", "tokens": ["Oui", " Oui"]}, instruction="In French, please.")
    served = Served()
    found, _ = run(served, asked)
    assert found.best is not None
    assert found.best.effect > 0.5 > found.unsteered
    assert found.prompted is not None
    assert found.prompted > found.unsteered
    chats = [body for body in served.asked if "messages" in body]
    assert all(body["max_tokens"] == 1 and body["top_logprobs"] == 20 for body in chats)
    assert sum(body["messages"][0]["content"].endswith("\n\nIn French, please.") for body in chats) == len(PROMPTS)


def test_damage_as_perplexity_of_the_models_own_answers() -> None:
    found, _ = run(Served(), spec(scales=[0.2], damage="perplexity", max_tokens=2))
    expected = np.log(0.5) - np.log(0.5 / (1 + 0.4**2))
    assert [cell.damage for cell in found.cells] == pytest.approx([expected] * 2)


def test_what_is_recommended_becomes_a_new_version() -> None:
    served = Served()
    found, _ = run(served, spec(scales=[0.1, 0.3]))

    async def store() -> str:
        async with served.client() as http:
            return await save(http, found)

    assert asyncio.run(store()) == "french@fedcba987654"
    (made,) = served.stored
    assert (made["name"], made["layers"], made["recommended"]["scale"]) == ("french", [1], 0.3)
    assert decode(made["tensors"]["vectors"]).tolist() == [[2.0] + [0.0] * (D - 1)]
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found
    evidence = made["provenance"]["calibration"]
    assert made["provenance"]["method"] == "mean_difference"
    assert evidence["of"] == REF
    assert len(evidence["cells"]) == 4
    assert {"example", "scores"}.isdisjoint(evidence["cells"][0])
    assert evidence["prompts"] == len(PROMPTS)
    assert len(evidence["settings"]["prompts_sha256"]) == 64
    assert "seven" not in str(found.to_json())


@pytest.mark.parametrize(
    ("served", "fields", "message"),
    [
        (Served(), {"layers": [1, 2]}, r"has nothing for layers \[2\]; it has \[1, 3\]"),
        (Served(), {"layers": [1, 1]}, "named twice"),
        (Served(kind="profile"), {}, "of kind profile; wanted: vector"),
    ],
)
def test_what_cannot_be_calibrated(served: Served, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(served, spec(scales=[1.0], **fields))


def test_a_subspace_is_refused() -> None:
    array = np.zeros((1, 2, 4), np.float32)
    with pytest.raises(CalibrationError, match="a subspace of 2 directions"):
        VectorAsset.of("v@1", {"kind": "vector", "layers": [0], "tensors": {"vectors": encode(array)}})


def test_texts_must_predict_something() -> None:
    served = Served()
    served.predicted = 0
    with pytest.raises(CalibrationError, match="a single token predicts nothing") as caught:
        run(served, spec(scales=[1.0], neutral=["Word"]))
    assert caught.value.param == "neutral[0]"
    with pytest.raises(CalibrationError, match="answers none of them"):
        run(Served(), spec(scales=[1.0], damage="perplexity", prompts=["say nothing", "nothing"]))


def test_an_edit_that_edits_nothing_is_an_error() -> None:
    served = Served()
    served.edited = 0
    with pytest.raises(CalibrationError, match="edited no token"):
        run(served, spec(scales=[1.0]))


def test_tensors_of_every_dtype_are_read() -> None:
    values = torch.randn(2, 3)
    for dtype in ("float32", "float16", "bfloat16"):
        raw = values.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes()
        found = decode({"dtype": dtype, "shape": [2, 3], "data": base64.b64encode(raw).decode()})
        np.testing.assert_array_equal(found, values.to(getattr(torch, dtype)).float().numpy())


def test_the_neutral_texts_are_there() -> None:
    texts = neutral_texts()
    assert len(texts) >= 8
    assert all(len(text.split()) > 10 for text in texts)
