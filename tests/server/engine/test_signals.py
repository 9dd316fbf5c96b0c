"""Signals of requests in a mixed batch, against the toy's own streams and numpy."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steersman.server.engine.runtime import Runtime
from steersman.server.engine.signals import Signals, watch_logits
from steersman.steering.plan import Place, Plan
from steersman.steering.sites import Site
from tests.server.engine.toy import Piece, Toy, args, report
from tests.steering.library import LAYERS, D, inline, noise, plan_of, resolve, vector

PROMPT = [1, 5, 9, 4, 1]
P = len(PROMPT)
IDS = [*PROMPT, 6, 5, 12, 1]
VOCABULARY = 50
NORM = f"norm:{LAYERS - 1}"  # of the stream that the toy returns
HEDGES = [3, 17, 40]
TOKENS = {"logprob:7": 7, "logprob:49": 49}
ALL: dict[str, Any] = {"answer_entropy": None, "evidence_entropy": HEDGES, **TOKENS, NORM: LAYERS - 1, "probe:v:2": 0}


def steered() -> Plan:
    edit = {"op": "add", "vector": inline(noise(D, seed=5)), "layers": 1, "scale": 2.0}
    return resolve({"interventions": [edit], "probes": [{"vector": "v"}]}, vector("v", noise(1, D), [2]))


def enter(toy: Toy, name: str, signals: Mapping[str, Any], plan: Plan | None = None, prompt: int = P) -> None:
    plan = plan or plan_of()
    toy.runtime.plans.add(plan.to_bytes(), "http")
    toy.runtime.add_request(name, json.loads(json.dumps({**args(plan, IDS[:prompt], name), "signals": dict(signals)})))


def entropy(p: np.ndarray) -> float:
    return float(-np.sum(p * np.log(np.maximum(p, 1e-300))))


def by_hand(logits: Tensor) -> dict[str, float]:
    p = logits.double().softmax(-1).numpy()
    mass = p[HEDGES].sum()
    logprobs = {name: float(np.log(p[token])) for name, token in TOKENS.items()}
    return {"answer_entropy": entropy(p), "evidence_entropy": entropy(np.array([mass, 1 - mass])), **logprobs}


def check(told: Mapping[str, Any], name: str, values: Sequence[float]) -> None:
    one = {"tokens": len(values), "first": values[0], "last": values[-1], "mean": np.mean(values), "max": max(values)}
    assert told[name] == pytest.approx(one, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("split", [False, True])
def test_every_signal_of_a_request_among_others(split: bool) -> None:
    toy = Toy(Runtime(), split=split)
    enter(toy, "all", ALL, steered())
    enter(toy, "some", {"answer_entropy": None}, prompt=2)
    toy.add("none", steered(), PROMPT)
    steps = [
        [("none", 0, P), ("all", 0, 3)],  # the prompt's end is not there yet
        [("all", 3, P), ("none", P, P + 1), ("some", 0, 2)],
        [("some", 2, 3), ("all", P, P + 1)],
        [("all", P + 1, P + 2)],
    ]
    wanted: dict[str, dict[str, list[float]]] = {"all": {}, "some": {}}
    for i, step in enumerate(steps):
        out = toy.run(*(Piece(name, a, IDS[a:b]) for name, a, b in step))
        logits = 3 * noise(len(step), VOCABULARY, seed=i)
        toy.runtime.see_logits(logits)
        toy.runtime.see_logits(noise(len(step), VOCABULARY, seed=99))  # of a prompt's logprobs: not what is sampled
        for row, (name, _, b) in enumerate(step):
            if name in wanted and b >= (P if name == "all" else 2):
                found = {**by_hand(logits[row]), NORM: float(out[name][-1].double().norm())}
                for signal, value in found.items():
                    wanted[name].setdefault(signal, []).append(value)
    told = report(toy.runtime, "all")
    assert told["error"] is None
    assert set(told["signals"]) == set(ALL)
    for signal, values in wanted["all"].items():
        check(told["signals"], signal, values)
    ((_, _, count, _, _, _, last),) = told["probes"]
    assert count == P + 2
    assert told["signals"]["probe:v:2"]["tokens"] == 3
    assert told["signals"]["probe:v:2"]["last"] == last
    some = report(toy.runtime, "some")["signals"]
    assert set(some) == {"answer_entropy"}
    check(some, "answer_entropy", wanted["some"]["answer_entropy"])
    assert report(toy.runtime, "none")["signals"] == {}


def test_looking_changes_no_bit() -> None:
    outs = []
    for signals in ({}, ALL):
        toy = Toy(Runtime(), dtype=torch.bfloat16, split=True)
        enter(toy, "r", signals, steered())
        outs.append(toy.complete("r", IDS, P, chunks=[2]))
    assert torch.equal(*outs)


def test_what_is_computed_again_counts_once_and_what_the_response_does_not_need_not_at_all() -> None:
    toy = Toy(Runtime())
    enter(toy, "r", {"answer_entropy": None, NORM: LAYERS - 1})
    first = noise(4, VOCABULARY, seed=1)
    for i, b in enumerate((P, P + 1, P + 2, P + 3)):
        toy.run(Piece("r", 0 if i == 0 else b - 1, IDS[(0 if i == 0 else b - 1) : b]))
        toy.runtime.see_logits(first[i][None])
    parts = []
    for a, b in ((0, P + 1), (P + 1, P + 2)):  # preempted and resumed in two chunks
        parts.append(toy.run(Piece("r", a, IDS[a:b]))["r"])
        toy.runtime.see_logits(noise(1, VOCABULARY, seed=2))  # in truth the same
    out = torch.cat(parts)
    state = toy.runtime.requests["r"]
    assert state.signals is not None
    told = state.signals.told(P + 2, whole=True)
    entropies = [by_hand(x)["answer_entropy"] for x in first]
    assert told["answer_entropy"]["positions"] == [P - 1, P, P + 1]
    assert told["answer_entropy"]["values"] == pytest.approx(entropies[:3], rel=1e-5)
    assert told[NORM]["values"] == pytest.approx(out[P - 1 :].double().norm(dim=-1).tolist(), rel=1e-5)
    assert state.signals.told(P, whole=True)["answer_entropy"]["values"] == pytest.approx(entropies[:1], rel=1e-5)


def test_logits_of_nobody_knows_whom_are_left_alone() -> None:
    toy = Toy(Runtime())
    enter(toy, "r", ALL, steered())
    toy.run(Piece("r", 0, PROMPT))
    toy.runtime.see_logits(noise(3, VOCABULARY))  # drafts are checked: three rows for one request
    toy.run(Piece("r", P, [6]))
    toy.runtime.see_logits(noise(1, VOCABULARY))
    told = report(toy.runtime, "r")
    assert told["error"] is None
    assert set(told["signals"]) == {NORM, "probe:v:2"}  # an entropy of some tokens is none of the answer
    assert told["signals"][NORM]["tokens"] == 2


def test_an_error_fails_those_who_asked_and_nobody_else() -> None:
    toy = Toy(Runtime())
    enter(toy, "asks", {"evidence_entropy": [VOCABULARY + 7]})
    enter(toy, "norm", {NORM: LAYERS - 1})
    toy.run(Piece("asks", 0, PROMPT), Piece("norm", 0, PROMPT))
    toy.runtime.see_logits(noise(2, VOCABULARY))
    assert "reading the logits failed" in report(toy.runtime, "asks")["error"]
    assert report(toy.runtime, "norm")["error"] is None


def test_a_rank_that_keeps_nothing_reads_nothing() -> None:
    toy = Toy(Runtime())
    toy.runtime.keeps = False
    enter(toy, "r", {NORM: LAYERS - 1, "answer_entropy": None})
    toy.run(Piece("r", 0, PROMPT))
    toy.runtime.see_logits(noise(1, VOCABULARY))
    assert report(toy.runtime, "r")["signals"] == {}


def test_norms_need_the_host_and_entropies_do_not() -> None:
    toy = Toy(Runtime())
    enter(toy, "norm", {NORM: LAYERS - 1})
    enter(toy, "entropy", {"answer_entropy": None})
    assert toy.runtime.requests["norm"].needs_layers
    assert not toy.runtime.requests["entropy"].needs_layers
    assert Signals({NORM: LAYERS - 1}, P).norms == {Place(LAYERS - 1, Site.RESID_POST): NORM}


def test_the_models_logits_are_handed_on() -> None:
    class Model:
        def compute_logits(self, hidden: Tensor | None) -> Tensor | None:
            return hidden

    model, seen = Model(), []
    watch_logits(model, seen.append)
    logits = noise(2, 3)
    assert model.compute_logits(logits) is logits
    assert model.compute_logits(None) is None  # a rank that has none
    assert seen == [logits]
