"""Selection of a direction against a served model that is a formula."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest

from steersman.clients.calibration_rules import CalibrationError
from steersman.clients.selection import Selection, SelectionSpec, log_odds, save, select
from steersman.clients.vector_assets import decode, encode

N_LAYERS, D = 5, 8
CARRIES = {("a", 0): 0.1, ("a", 2): 0.9, ("a", 3): 0.7, ("b", 2): 0.6, ("b", 4): 1.0}
"""By vector and layer: the part of the behaviour that its direction carries."""
DAMAGES = {("a", 3): 2.0}  # log-odds of another token that ablating it moves
SHOWING, OTHERS = ["bad one", "bad two", "bad three!"], ["good one", "good two"]


class Served:
    """Answers begin with `No` where the behaviour shows: log-odds 3 on bad prompts and −3 on others, else `Yes`, or
    now and then `Well`."""

    def __init__(self) -> None:
        self.site = "resid_post"
        self.stored: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content) if request.content else {}
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if path == "/v1/steering/model":
            return httpx.Response(200, json={"n_layers": N_LAYERS})
        if request.method == "POST" and path == "/v1/steering/assets":
            self.stored.append(body)
            return httpx.Response(201, json={"ref": "b@new"})
        if path.startswith("/v1/steering/assets/"):
            name = path.rsplit("/", 1)[1].partition("@")[0]
            return httpx.Response(
                200, json=self.vector(name) if "format" in request.url.params else {"ref": f"{name}@1"}
            )
        self.asked.append(body)
        return httpx.Response(200, json=self.answer(body))

    def vector(self, name: str) -> dict[str, Any]:
        layers = [layer for known, layer in CARRIES if known == name]
        rows = np.arange(len(layers) * D, dtype=np.float32).reshape(-1, D) + 1
        about = {"name": name, "kind": "vector", "site": self.site, "layers": layers, "provenance": {"token": -1}}
        return {**about, "tensors": {"vectors": encode(rows)}}

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        assert body["max_tokens"] == 1
        assert body["steering"]["default"] is False
        bad = body["messages"][0]["content"].startswith("bad")
        odds, well, edits = 3.0 if bad else -3.0, -2.0, body["steering"]["interventions"]
        if len(edits) == 1:
            (edit,) = edits
            assert (edit["op"], len(edit["layers"])) == ("add", 1)
            odds += 10 * edit["scale"] * CARRIES[edit["vector"][0], edit["layers"][0]]
        elif edits:
            assert [(e["op"], e["site"], e["layers"]) for e in edits] == [
                ("ablate", "resid_pre", [0]), ("ablate", "attn_out", "all"), ("ablate", "mlp_out", "all")
            ]  # fmt: skip
            (what,) = {(e["vector"][0], e["from_layer"]) for e in edits}
            odds -= 6 * CARRIES[what] * bad
            well += DAMAGES.get(what, 0.0)
        no, other = 1 / (1 + math.exp(-odds)), 1 / (1 + math.exp(-well))
        p = {"No": no, "Well": (1 - no) * other, "Yes": (1 - no) * (1 - other)}
        tops = [{"token": token, "logprob": math.log(each)} for token, each in p.items()]
        choice = {"message": {"content": "No"}, "logprobs": {"content": [{"top_logprobs": tops}]}}
        return {"choices": [choice], "steering": {"interventions": [{"tokens": 4} for _ in edits]}}


class Steps:
    total = done = 0

    def expect(self, total: int, unit: str) -> None:
        self.total = total

    def advance(self, count: int = 1) -> None:
        self.done += count


def run(served: Served, store: bool = False, **fields: Any) -> Selection:
    given = {"vectors": ["a", "b"], "showing": SHOWING, "others": OTHERS, "tokens": ["No"], **fields}
    steps = Steps()

    async def work() -> Selection:
        transport = httpx.MockTransport(served)
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as http:
            found = await select(http, SelectionSpec.model_validate(given), steps)
            if store:
                assert await save(http, found) == "b@new"
            return found

    found = asyncio.run(work())
    assert steps.done == steps.total == 1 + len(CARRIES)
    return found


def test_each_layer_is_ablated_added_and_weighed() -> None:
    found = run(Served())
    assert (found.vectors, found.model, found.prompts) == (["a@1", "b@1"], "m", {"showing": 3, "others": 2})
    assert found.unsteered == {"showing": pytest.approx(3.0), "others": pytest.approx(-3.0)}
    tried = {("ab"[c.position], c.layer): c for c in found.candidates}
    assert set(tried) == set(CARRIES)
    for place, part in CARRIES.items():
        assert tried[place].bypass == pytest.approx(3 - 6 * part)
        assert tried[place].induce == pytest.approx(-3 + 10 * part)
        before, after = (1 / (1 + math.exp(2 - moved)) for moved in (0.0, DAMAGES.get(place, 0.0)))
        rest = 1 / (1 + math.exp(-3.0))  # of what does not begin with No
        kl = rest * (before * math.log(before / after) + (1 - before) * math.log((1 - before) / (1 - after)))
        assert tried[place].kl == pytest.approx(kl, abs=1e-6)
    assert tried["a", 3].kl > 0.1


def test_the_one_that_carries_most_is_selected_of_those_that_may_be() -> None:
    """b 4 is too late a layer, a 3 does damage; of the others a 2 carries most."""
    served = Served()
    found = run(served, store=True)
    assert found.best is not None
    assert (found.vectors[found.best.position], found.best.layer) == ("a@1", 2)
    (stored,) = served.stored
    assert (stored["layers"], stored["recommended"]["scale"]) == ([2], 1.0)
    assert np.array_equal(decode(stored["tensors"]["vectors"]), decode(served.vector("a")["tensors"]["vectors"])[1:2])
    evidence = stored["provenance"]["selection"]
    assert (evidence["of"], len(evidence["candidates"]), stored["provenance"]["token"]) == ("a@1", len(CARRIES), -1)
    assert "showing_sha256" in evidence["settings"]
    assert "bad one" not in json.dumps(stored)
    best = run(served, last_share=0.0).best
    assert best is not None
    assert (best.position, best.layer) == (1, 4)


def test_where_none_may_be_it_is_said_why() -> None:
    found = run(Served(), min_induce=7.5)
    assert found.best is None
    assert "1 too late a layer" in found.refusal
    assert "induce below 7.5" in found.refusal


def test_a_direction_of_another_site_is_refused() -> None:
    served = Served()
    served.site = "mlp_out"
    with pytest.raises(CalibrationError, match="wanted: resid_post") as caught:
        run(served)
    assert caught.value.param == "vectors[0]"


def test_log_odds_stay_finite() -> None:
    assert log_odds(0.5) == 0
    assert log_odds(0.0) == pytest.approx(-13.8, abs=0.1)
    assert log_odds(1.0) == pytest.approx(13.8, abs=0.1)
