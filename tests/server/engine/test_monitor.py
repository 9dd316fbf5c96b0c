"""A rank's statistics against numpy, from the streams that the toy model's layers entered and left."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.kernels.statistics import (
    COSINE_BOUNDS,
    ENTROPY_BOUNDS,
    NORM_BOUNDS,
    PROBE_BOUNDS,
    PROBE_COSINE_BOUNDS,
    RELATIVE_BOUNDS,
)
from steersman.server.engine import monitor as module
from steersman.server.engine.monitor import GROUPS, OTHER, Monitor
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.steering.plan import Place, Plan
from tests.server.engine.plans import KINDS, OPENS, SHUT, add, gate, plan, sideways
from tests.server.engine.toy import POST, PRE, Piece, Toy
from tests.steering.formulas import rotate
from tests.steering.library import LAYERS, D, asset, inline, noise, plan_of, resolve, vector

PROMPT = [SHUT, 5, OPENS, 4, 1, 12, 2, 20]
P = len(PROMPT)
IDS = [*PROMPT, 6, 5, OPENS, 1]


class Watched(Toy):
    """A toy that writes down every stream that a place is left with, before and after its edits."""

    def __init__(self, every: int = 1, counts: bool = True, **toy: Any) -> None:
        super().__init__(Runtime(), **toy)
        self.monitor = self.runtime.monitor = Monitor(LAYERS, every, counts)
        self.passes: list[tuple[Sequence[Piece], dict[Place, tuple[Tensor, Tensor]]]] = []
        self._seen: dict[Place, tuple[Tensor, Tensor]] = {}

    def enter(self, name: str, its_plan: Plan | None, prompt: Sequence[int] = PROMPT) -> None:
        self.monitor.enter(name, len(prompt))
        self.add(name, its_plan, prompt)

    def run(self, *pieces: Piece) -> dict[str, Tensor]:
        self._seen = {}
        out = super().run(*pieces)
        self.passes.append((pieces, self._seen))
        return out

    def _touch(self, place: Place, stream: Tensor) -> Tensor:
        out = super()._touch(place, stream)
        self._seen[place] = stream.clone(), out.clone()
        return out

    def rows(self, pieces: Sequence[Piece], state: dict[str, tuple[int, bool]]) -> Iterator[tuple[str, str]]:
        """(tokens, steered) of each row of a pass."""
        for piece in pieces:
            prompt, steered = state[piece.request_id]
            for i in range(len(piece.ids)):
                yield "prompt" if piece.start + i < prompt else "generated", "yes" if steered else "no"


def histogram(values: Sequence[float], bounds: Sequence[float]) -> list[int]:
    counts = [0] * (len(bounds) + 1)
    for v in values:
        counts[int(np.searchsorted(bounds, v))] += 1
    return counts


def around_zero(counts: Sequence[int], bounds: Sequence[float] = PROBE_BOUNDS) -> list[int]:
    """Of a probe, the two buckets at 0 as one: what an ablation has left is 0 but for a rounding of either sign."""
    i = bounds.index(0.0)
    return [*counts[:i], counts[i] + counts[i + 1], *counts[i + 2 :]]


def numbers(rows: Sequence[Sequence[Any]], keys: int) -> dict[tuple[Any, ...], Any]:
    return {tuple(row[:keys]): row[keys:] for row in rows}


def lengths(x: Tensor) -> np.ndarray:
    return np.sqrt((x.double().numpy() ** 2).sum(-1))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_cosines_of_a_mixed_batch(dtype: torch.dtype, split: bool) -> None:
    toy = Watched(dtype=dtype, split=split)
    kinds = {"add": True, "norm": True, "plain": False, "probe": False, "late": False}
    for name in kinds:
        toy.enter(name, plan(name) if name in KINDS else None)
    toy.enter("probe", plan_of(probes=[{"vector": sideways(1), "layers": 2}]))
    steps = [
        [("add", 0, 3), ("plain", 0, P), ("norm", 0, P)],
        [("add", 3, P), ("plain", P, P + 1), ("probe", 0, P), ("norm", P, P + 1)],
        [("add", P, P + 1), ("plain", P + 1, P + 2), ("late", 6, P + 2)],  # a prompt's end and a draft in one piece
    ]
    for step in steps:
        toy.run(*(Piece(name, a, IDS[a:b]) for name, a, b in step))
    told = toy.monitor.drain("http", {})
    assert told["passes"] == 3
    assert told["errors"] == 0
    state = {name: (P, steered) for name, steered in kinds.items()}
    found = numbers(told["activation_norm"], 2)
    cosines = numbers(told["layer_cosine"], 1)
    for layer in range(LAYERS):
        wanted: dict[tuple[str, str], list[float]] = {}
        all_cosines: list[float] = []
        for pieces, seen in toy.passes:
            before, after = (seen[Place(layer, site)][1] for site in (PRE, POST))
            for group, value in zip(toy.rows(pieces, state), lengths(after), strict=True):
                wanted.setdefault(group, []).append(float(value))
            dots = (before.double() * after.double()).sum(-1).numpy()
            all_cosines += (dots / lengths(before) / lengths(after)).tolist()
        rough = 0.01 if split and dtype is torch.bfloat16 else 1e-6  # there the stream is only known rounded
        for i, group in enumerate(GROUPS):
            counts, total, largest = found[layer, i]
            values = wanted[group]
            assert sum(counts) == len(values)
            assert (total, largest) == pytest.approx((sum(values), max(values)), rel=rough), (layer, group)
            if rough == 1e-6:
                assert counts == histogram(values, NORM_BOUNDS)
        counts, total = cosines[(layer,)]
        assert total == pytest.approx(sum(all_cosines), rel=rough)
        if rough == 1e-6:
            assert counts == histogram(np.float32(all_cosines).tolist(), COSINE_BOUNDS)
    assert len(found) == LAYERS * len(GROUPS)


def test_edits_and_probes_by_asset_and_layer() -> None:
    assets = [vector(name, noise(2, D, seed=i), [1, 2]) for i, name in enumerate("ab")]
    edits = [
        {"op": "add", "vector": "a", "scale": 2.0},
        {"op": "rotate", "vector": "a", "toward": "b", "degrees": 40, "layers": 2},
        {"op": "ablate", "vector": "b", "when": gate(), "tokens": "prompt"},
        {"op": "add", "vector": inline(noise(D, seed=5)), "layers": 2, "relative": "norm", "scale": 0.125},
    ]
    probes = [{"vector": "b"}, {"vector": inline(noise(D, seed=6)), "layers": [3]}]
    steered = resolve({"interventions": edits, "probes": probes}, *assets)
    other = resolve({"interventions": edits[:1]}, *assets)
    toy = Watched()
    for name, its_plan in (("r", steered), ("plain", None), ("other", other)):
        toy.enter(name, its_plan)
    toy.run(Piece("r", 0, PROMPT), Piece("plain", 0, PROMPT), Piece("other", 0, PROMPT))
    toy.run(Piece("other", P, [5]), Piece("r", P, [OPENS]), Piece("plain", P, [1]))
    told = toy.monitor.drain("http", {})
    assert told["errors"] == 0
    found = numbers(told["relative_edit_norm"], 2)
    a, b = (x.tensors["vectors"] for x in assets)
    unit = b / b.norm(dim=-1, keepdim=True)
    wanted: dict[tuple[str, int], list[float]] = {}
    read: dict[tuple[str, int], list[float]] = {}
    away: dict[tuple[str, int], list[Any]] = {}  # norms of what is read
    at = (slice(0, P), slice(2 * P, 3 * P)), (slice(1, 2), slice(0, 1))  # rows of r and other
    for (mine, others), (pieces, seen) in zip(at, toy.passes, strict=True):
        ids = torch.tensor([i for p in pieces for i in p.ids])[mine]
        for row, layer in enumerate((1, 2)):
            whole, after = seen[Place(layer, POST)]
            x = whole[mine].double()
            sizes = lambda change, x=x: (change.norm(dim=-1) / x.norm(dim=-1)).tolist()  # noqa: E731
            plain_add = [(2 * a[row].double()).norm() / r.norm() for r in (*x, *whole[others].double())]
            wanted.setdefault(("a", layer), []).extend(float(v) for v in plain_add)
            stream = x + 2 * a[row].double()
            if layer == 2:
                turned = rotate(stream, {"vector": a[row], "toward": b[row], "degrees": 40})
                for name in "ab":
                    wanted.setdefault((name, 2), []).extend(sizes(turned - stream))
                stream = turned
            v = unit[row].double()
            removed = (stream @ v)[:, None] * v
            opened = torch.tensor([bool(i > 6) for i in ids]) & (len(ids) > 1)
            wanted.setdefault(("b", layer), []).extend(np.array(sizes(removed))[opened.numpy()].tolist())
            if layer == 2:
                stream = stream - removed * opened[:, None]
                wanted.setdefault(("inline", 2), []).extend((0.125 * stream.norm(dim=-1) / x.norm(dim=-1)).tolist())
            read.setdefault(("b", layer), []).extend((after[mine].double() @ v).tolist())
            away.setdefault(("b", layer), []).append(after[mine].double().norm(dim=-1).numpy())
        w = noise(D, seed=6).double()
        last = seen[Place(3, POST)][1][mine].double()
        read.setdefault(("inline", 3), []).extend((last @ (w / w.norm())).tolist())
        away.setdefault(("inline", 3), []).append(last.norm(dim=-1).numpy())
    assert set(found) == set(wanted)
    for key, values in wanted.items():
        counts, total = found[key]
        assert total == pytest.approx(sum(values), rel=1e-4), key
        assert counts == histogram(values, RELATIVE_BOUNDS), key
    values_read = numbers(told["probe_value"], 2)
    assert set(values_read) == set(read)
    for key, values in read.items():
        counts, total = values_read[key]
        assert total == pytest.approx(sum(values), abs=1e-4), key
        assert around_zero(counts) == around_zero(histogram(values, PROBE_BOUNDS)), key
    told_cosines = numbers(told["probe_cosine"], 2)
    assert set(told_cosines) == set(read)
    for key, values in read.items():
        cosines = np.array(values) / np.concatenate(away[key])
        counts, total = told_cosines[key]
        assert total == pytest.approx(cosines.sum(), abs=1e-5), key
        assert around_zero(counts, PROBE_COSINE_BOUNDS) == around_zero(
            histogram(cosines.tolist(), PROBE_COSINE_BOUNDS), PROBE_COSINE_BOUNDS
        ), key


def test_probes_of_all_requests() -> None:
    toy = Watched()
    v, w = noise(2, D, seed=1), noise(D, seed=2)
    probes = [
        {"vector": "v"},
        {"vector": inline(w), "layers": 2, "site": "resid_mid"},
        {"vector": inline(w), "layers": 3},
    ]
    toy.monitor.watch_probes(resolve({"probes": probes}, vector("v", v, [1, 2], site="resid_pre")))
    for name in ("steered", "plain"):
        toy.enter(name, plan("add") if name == "steered" else None)
    toy.run(Piece("steered", 0, PROMPT), Piece("plain", 0, PROMPT))
    told = toy.monitor.drain("http", {})
    found, aligned = numbers(told["probe_value"], 2), numbers(told["probe_cosine"], 2)
    assert set(found) == {("v", 1), ("v", 2), ("inline", 3)}  # the toy has no resid_mid
    seen = toy.passes[0][1]
    for (name, layer), direction in zip([("v", 1), ("v", 2), ("inline", 3)], [*v, w], strict=True):
        x = seen[Place(layer, PRE if name == "v" else POST)][1].double()
        values = (x @ (direction / direction.norm()).double()).tolist()
        assert found[name, layer] == [histogram(values, PROBE_BOUNDS), pytest.approx(sum(values), abs=1e-4)]
        cosines = (np.array(values) / x.norm(dim=-1).numpy()).tolist()
        counts = histogram(cosines, PROBE_COSINE_BOUNDS)
        assert aligned[name, layer] == [counts, pytest.approx(sum(cosines), abs=1e-5)]
    toy.monitor.watch_probes(plan_of())
    toy.run(Piece("plain", P, [1]))
    assert toy.monitor.drain("http", {toy.monitor.worker: 1})["probe_value"] == []


def test_a_feature_has_values_and_no_cosine() -> None:
    tensors = {name: noise(9, D, seed=i) for i, name in enumerate(("encoder", "decoder"))}
    tensors |= {"b_dec": noise(D, seed=3), "b_enc": noise(9, seed=4)}
    sae = asset("sae", "dictionary", tensors, layer=2, architecture="standard")
    toy = Watched()
    probes = [{"dictionary": "sae", "index": 4}, {"vector": inline(noise(D, seed=6)), "layers": [2]}]
    toy.enter("r", resolve({"probes": probes}, sae))
    toy.run(Piece("r", 0, PROMPT))
    told = toy.monitor.drain("http", {})
    assert {(name, layer) for name, layer, *_ in told["probe_value"]} == {("sae#4", 2), ("inline", 2)}
    assert {(name, layer) for name, layer, *_ in told["probe_cosine"]} == {("inline", 2)}


def test_gates_count_tokens_or_requests() -> None:
    toy = Watched(every=10**6)  # not a matter of samples
    toy.enter("token", plan_of(add(0, [1, 3], when=gate(), tokens={"exclude": {"positions": [5]}})))
    toy.enter("held", plan_of(add(0, 3, when=gate(hold=True))))
    for name, above in (("opens", 6.0), ("stays", 60.0)):
        toy.enter(name, plan_of(add(0, 3, when=gate("prompt_mean", above=above))))
    told: list[dict[str, list[int]]] = []
    for name in ("token", "held", "opens", "stays"):
        for a, b in pairwise((0, 3, P, P + 1, P + 2)):
            toy.run(Piece(name, a, IDS[a:b]))
        answer = toy.monitor.drain("http", {} if not told else {toy.monitor.worker: len(told)})
        told.append({asset: both for asset, *both in answer["gates"]})
    n, opened = P + 2, [i for i in IDS[: P + 2] if i > 6]
    assert told == [
        {"inline": [n - 1, len(opened) - 1]},
        {"inline": [n, n - PROMPT.index(OPENS)]},
        {"inline": [1, 1]},
        {"inline": [1, 0]},
    ]
    toy.run(Piece("stays", 0, PROMPT))  # preempted: it has been decided and counted
    assert toy.monitor.drain("http", {toy.monitor.worker: 4})["gates"] == [["inline", 0, 0]]


def test_which_passes_are_looked_at() -> None:
    toy = Watched(every=3)
    toy.enter("r", plan("add"))
    toy.enter("plain", None)
    for p in range(10):
        due = toy.monitor.due
        assert due == (p % 3 == 2)
        toy.run(Piece("r", p, [1]), Piece("plain", p, [2, 3]))
    told = toy.monitor.drain("http", {})
    assert told["passes"] == 3
    assert {sum(sum(counts) for layer, _, counts, *_ in told["activation_norm"] if layer == i) for i in range(4)} == {9}
    toy.runtime.begin([], lambda *_: np.zeros(0, np.int64))
    assert not toy.runtime.live


def test_looking_changes_no_bit() -> None:
    outs = []
    for every in (1, 10**6):
        toy = Watched(every=every, dtype=torch.bfloat16, split=True)
        for name in KINDS:
            toy.enter(name, plan(name))
        out = toy.run(*(Piece(name, 0, PROMPT) for name in KINDS))
        outs.append(torch.cat([*out.values(), *toy.run(*(Piece(name, P, [OPENS]) for name in KINDS)).values()]))
    assert torch.equal(*outs)


def test_a_rank_that_does_not_count_wants_nothing_and_measures_as_the_others_do() -> None:
    leads, follows = Watched(), Watched(counts=False)
    for toy in (leads, follows):
        toy.enter("r", plan("add"))
        toy.enter("plain", None)
        toy.run(Piece("r", 0, PROMPT), Piece("plain", 0, PROMPT))
        toy.runtime.begin([Scheduled("plain", P, 0, 1)], lambda *_: np.zeros(1, np.int64))
        assert toy.runtime.live == (toy is leads)
        toy.runtime.begin([Scheduled("r", P, 0, 1)], lambda *_: np.zeros(1, np.int64))
        assert toy.runtime._measure
        toy.runtime.end()
    told = follows.monitor.drain("http", {})
    assert not any(told[k] for k in told if k not in ("worker", "number"))
    assert leads.monitor.drain("http", {})["activation_norm"]


def test_padding_belongs_to_nobody() -> None:
    monitor = Monitor(3, 1)
    monitor.enter("r", 1)
    x = torch.arange(1.0, 6.0)[:, None].repeat(1, 4)
    assert monitor.begin([Scheduled("r", 0, 1, 2)], {})  # rows 1 and 2 of 5
    for place in (Place(1, PRE), Place(1, POST), Place(0, PRE), Place(2, POST)):  # the last has another's input
        monitor.see(place, x, None)
    monitor.end([])
    told = monitor.drain("http", {})
    assert [(layer, group, sum(counts), total) for layer, group, counts, total, _ in told["activation_norm"]] == [
        (1, 0, 1, 4.0),
        (1, 2, 1, 6.0),
        (2, 0, 1, 4.0),
        (2, 2, 1, 6.0),
    ]
    assert [(layer, sum(counts)) for layer, counts, _ in told["layer_cosine"]] == [(1, 2)]


def test_a_stream_that_a_layer_hands_on_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And read anew where the next layer is given another one, or edits it first."""
    reads: list[int] = []
    plain = module.stream_of
    monkeypatch.setattr(module, "stream_of", lambda *a: (reads.append(1), plain(*a))[1])
    told = []
    for edited, copied in ((True, False), (False, False), (False, True)):
        monitor = Monitor(2, 1)
        monitor.enter("r", 0)
        monitor.begin([Scheduled("r", 0, 0, 3)], {})
        x, residual = noise(3, 8, seed=1), noise(3, 8, seed=2)
        monitor.see(Place(0, PRE), x, residual)
        x, residual = noise(3, 8, seed=3), noise(3, 8, seed=4)
        monitor.see(Place(0, POST), x, residual)
        monitor.see(Place(1, PRE), x.clone() if copied else x, residual, edited)
        monitor.see(Place(1, POST), noise(3, 8, seed=5), residual, False)
        monitor.end([])
        told.append({**monitor.drain("http", {}), "worker": ""})
    assert told[0] == told[1] == told[2]
    assert len(told[0]["layer_cosine"]) == 2
    assert len(reads) == 4 + 3 + 4


def test_outliers_are_told_by_what_came_before() -> None:
    monitor, generator = Monitor(2, 1), np.random.default_rng(0)
    monitor.enter("r", 0)
    logs = generator.normal(3.0, 0.1, size=(30, 2, 100))
    logs[29, 1, 7] = logs[:29, 1].mean() + 7 * logs[:29, 1].std()
    logs[29, 1, 8] = logs[:29, 1].mean() + 5 * logs[:29, 1].std()
    logs[29, 0, 3] = logs[:29, 0].mean() - 7 * logs[:29, 0].std()
    logs[29, 0, 4] = 80.0
    for step in logs:
        monitor.begin([Scheduled("r", 0, 0, 100)], {})
        for layer in range(2):
            monitor.see(Place(layer, POST), torch.from_numpy(np.exp(step[layer]))[:, None].float(), None)
        monitor.end([])
    assert monitor.drain("http", {})["norm_outliers"] == [[0, 2], [1, 1]]
    seen = monitor.norms_seen()
    assert (seen["worker"], seen["count"]) == (monitor.worker, [3000.0, 3000.0])
    assert seen["mean"] == pytest.approx(logs.mean((0, 2)).tolist(), rel=1e-5)
    deviations = ((logs - logs.mean((0, 2))[:, None]) ** 2).sum((0, 2))
    assert seen["square"] == pytest.approx(deviations.tolist(), rel=1e-3)


def test_outliers_by_a_stored_baseline() -> None:
    """From the first token on, each layer by its own numbers, whatever the traffic makes usual."""
    monitor = Monitor(2, 1)
    monitor.enter("r", 0)
    monitor.use_baseline([1.0, 3.0], [0.1, 0.2])
    logs = np.array([[1.0, 1.59, 1.61, 0.39, 0.41], [3.0, 4.19, 4.21, 1.79, 1.81]])
    for _ in range(2):
        monitor.begin([Scheduled("r", 0, 0, 5)], {})
        for layer in range(2):
            monitor.see(Place(layer, POST), torch.from_numpy(np.exp(logs[layer]))[:, None].float(), None)
        monitor.end([])
    assert monitor.drain("http", {})["norm_outliers"] == [[0, 4], [1, 4]]
    assert monitor.norms_seen()["mean"] == pytest.approx(logs.mean(1).tolist(), rel=1e-5)  # goes on learning


# -- logits ---------------------------------------------------------------------------------------------


def test_entropy_of_the_tokens_that_are_sampled() -> None:
    monitor, logits = Monitor(1, 2), 3 * noise(3, 50)
    for name in "abc":
        monitor.enter(name, 4)
    batch = [Scheduled("a", 0, 0, 4), Scheduled("b", 0, 4, 3), Scheduled("c", 9, 7, 1)]  # b's prompt is not done
    for _ in range(2):
        monitor.begin(batch, {})
        monitor.end([])
        monitor.see_logits(logits)
        monitor.see_logits(logits)  # of a prompt, or of a dummy run: not what is sampled
    p = logits[[0, 2]].double().softmax(-1)
    want = (-(p * p.log()).sum(-1)).tolist()
    ((counts, total),) = monitor.drain("http", {})["answer_entropy"]
    assert counts == histogram(want, ENTROPY_BOUNDS)
    assert total == pytest.approx(sum(want), rel=1e-5)


# -- giving away ----------------------------------------------------------------------------------------


def test_nothing_is_lost_or_doubled_while_passes_run() -> None:
    """Two processes drain, some of whose answers get lost, while a third thread runs passes."""
    toy = Watched()
    toy.enter("r", plan("add"))
    passes, done = 150, []

    def run() -> None:
        for i in range(passes):
            toy.run(Piece("r", i, [1, 2]))
        done.append(True)

    got: dict[tuple[str, int], dict[str, Any]] = {}

    def drain(holder: str, seed: int) -> None:
        random, received = np.random.default_rng(seed), dict[str, int]()
        finished = False
        while True:
            last, finished = finished, bool(done)
            answer = toy.monitor.drain(holder, received)
            if last or random.random() < 0.5:  # else the answer got lost
                received[answer["worker"]] = answer["number"]
                assert got.setdefault((holder, answer["number"]), answer) == answer
            if last and not answer["passes"]:
                return

    threads = [Thread(target=run), *(Thread(target=drain, args=(h, i)) for i, h in enumerate(("one", "two")))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert sum(a["passes"] for a in got.values()) == passes
    rows = [row for a in got.values() for row in a["activation_norm"]]
    assert sum(sum(row[2]) for row in rows) == passes * 2 * LAYERS
    total = sum(float(lengths(seen[Place(layer, POST)][1]).sum()) for _, seen in toy.passes for layer in range(LAYERS))
    assert sum(row[3] for row in rows) == pytest.approx(total, rel=1e-5)
    assert len({a["number"] for a in got.values()}) == len(got)  # no answer went to both


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pdl"), st.sampled_from("xy")), max_size=30))
def test_what_has_not_arrived_comes_again(events: list[tuple[str, str]]) -> None:
    """Passes, drains that arrive and drains that get lost, in any order."""
    monitor = Monitor(1, 1)
    monitor.enter("r", 0)
    received: dict[str, dict[str, int]] = {"x": {}, "y": {}}
    passes = arrived = 0
    for event, holder in [*events, *[("d", h) for h in "xxyy"]]:
        if event == "p":
            monitor.begin([Scheduled("r", passes, 0, 1)], {})
            monitor.end([])
            passes += 1
            continue
        answer = monitor.drain(holder, received[holder])
        if event == "d":
            received[holder][answer["worker"]] = answer["number"]
            arrived += answer["passes"]
    assert arrived == passes


def test_assets_beyond_what_is_kept_apart_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 4)
    toy = Watched()
    for i in range(6):
        steered = resolve(
            {"interventions": [{"op": "add", "vector": f"v{i}", "when": gate()}], "probes": [{"vector": f"v{i}"}]},
            vector(f"v{i}", noise(1, D, seed=i), [1]),
        )
        toy.enter(f"r{i}", steered)
    toy.run(*(Piece(f"r{i}", 0, [OPENS]) for i in range(6)))
    told = toy.monitor.drain("http", {})
    for name in ("relative_edit_norm", "probe_value", "probe_cosine"):
        assert sorted((asset, layer) for asset, layer, *_ in told[name]) == [
            (OTHER, -1), *((f"v{i}", 1) for i in range(4)),
        ]  # fmt: skip
        assert [sum(counts) for asset, _, counts, _ in told[name] if asset == OTHER] == [2]
    assert {asset: both for asset, *both in told["gates"]} == {OTHER: [2, 2], **{f"v{i}": [1, 1] for i in range(4)}}


def test_an_error_costs_statistics_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Watched()
    toy.enter("r", plan("add"))
    monkeypatch.setattr(module, "norms", lambda x: 1 / 0)
    steered = toy.run(Piece("r", 0, PROMPT))["r"]
    monkeypatch.undo()
    plain = Toy(Runtime())
    plain.add("r", plan("add"), PROMPT)
    assert torch.equal(steered, plain.run(Piece("r", 0, PROMPT))["r"])
    assert toy.runtime.requests["r"].error is None
    toy.run(Piece("r", P, [1]))
    told = toy.monitor.drain("http", {})
    assert (told["errors"], told["passes"]) == (1, 1)
    toy.run(Piece("a stranger", 0, [1]))
    assert toy.monitor.drain("http", {toy.monitor.worker: 1})["errors"] == 1


def test_holders_that_have_gone_are_forgotten() -> None:
    monitor = Monitor(1, 1)
    for i in range(module.HOLDERS + 5):
        monitor.drain(f"h{i}", {})
    assert len(monitor._sent) == module.HOLDERS
