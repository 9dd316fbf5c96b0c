"""The statistics in ``/metrics`` are those that numpy makes of the oracle's activations, on one rank and on two."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from steersman.kernels.statistics import NORM_BOUNDS, PROBE_COSINE_BOUNDS, RELATIVE_BOUNDS
from steersman.server import cli
from steersman.server.asked_signals import hedge_ids
from steersman.steering.assets import Asset, parse_metadata
from steersman.steering.baselines import seen_between
from steersman.steering.signals import HEDGES, features_of
from steersman.steering.store import Store
from tests.e2e.server import Server, serve
from tests.e2e.steered import DEVELOPER, WIDE, Answer, Asked, ask, events, random_assets, together
from tests.models.tiny import tiny_model
from tests.oracle.hf import Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
RANKS = {
    "one": ([], DEVELOPER),
    "two": (  # and two HTTP processes, which share what is counted
        ["--tensor-parallel-size", "2", "--api-server-count", "2"],
        {**DEVELOPER, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
}
OPTIONS = [
    *WIDE, "--no-enable-prefix-caching", "--steering-monitor-sample", "1", "--steering-monitor-interval", "0.2",
    "--steering-max-relative-norm", "0.75", "--steering-norm-baseline", "usual",
]  # fmt: skip
USUAL = [2.33, 2.66, 2.89, 3.07], [0.02, 0.02, 0.02, 0.02]
"""Mean and deviation of ln‖x‖ of a made-up baseline, of which some norms of every layer are outliers."""
PROMPT = [1, 40, 51, 62, 73, 84, 95, 106, 117, 128, 139, 31]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module", params=RANKS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Oracle]]:
    path = tiny_model("llama")
    more, env = RANKS[request.param]
    tmp = tmp_path_factory.mktemp("monitored")
    Store(tmp / "store").add(usual(path))
    with serve(path, tmp, [*OPTIONS, *more], env=env, forked=True) as server:
        oracle = Oracle(path, {})
        random_assets(oracle, server)
        yield server, oracle


def usual(path: Path) -> Asset:
    config = json.loads((path / "config.json").read_text())
    model = {"id": path.name, "n_layers": config["num_hidden_layers"], "d_model": config["hidden_size"]}
    about = {"name": "usual", "kind": "baseline", "model": model, "counts": [1000] * model["n_layers"]}
    return Asset(parse_metadata({**about, "mean": USUAL[0], "deviation": USUAL[1]}))


def samples(server: Server) -> Samples:
    started = time.monotonic()
    text = server.http.get("/metrics", timeout=10).text
    assert time.monotonic() - started < 3
    families = text_string_to_metric_families(text)
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in families for s in family.samples if s.name.startswith("steersman_")
    }  # fmt: skip


def value(found: Samples, name: str, **labels: Any) -> float:
    return found.get((f"steersman_{name}", frozenset((k, str(v)) for k, v in labels.items())), 0.0)


def after(server: Server, before: Samples, done: Callable[[Callable[..., float]], bool]) -> Callable[..., float]:
    """What each metric has grown by since ``before``, once ``done`` says so; and it does not grow further."""

    def grown() -> Callable[..., float]:
        now = samples(server)
        return lambda name, **labels: value(now, name, **labels) - value(before, name, **labels)

    deadline = time.monotonic() + 20
    while not done(grown()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.7)  # three more readings
    return grown()


def buckets(found: Callable[..., float], name: str, bounds: Sequence[float], **labels: Any) -> list[int]:
    """Cumulative, as Prometheus has it."""
    return [int(found(f"{name}_bucket", le=str(bound), **labels)) for bound in (*map(float, bounds), "+Inf")]


def cumulative(values: np.ndarray, bounds: Sequence[float]) -> list[int]:
    return [*((values <= bound).sum() for bound in bounds), len(values)]


def lengths(x: torch.Tensor) -> np.ndarray:
    return np.asarray(x.double().norm(dim=-1))


def test_a_mixed_batch(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    layers = range(oracle.config.num_hidden_layers)
    edits = [
        {"op": "add", "vector": "resid_post", "relative": "norm", "scale": 0.3, "layers": [1, 2], "tokens": "prompt"},
        {"op": "ablate", "vector": "resid_post-other", "layers": [2]},
        {"op": "add", "vector": "attn_z", "site": "attn_z", "scale": 0.5, "layers": [1]},
    ]
    gated = {"op": "add", "vector": "resid_pre", "site": "resid_pre", "layers": [3], "tokens": "generated", "when": {
        "vector": "resid_post-other", "layer": 1, "above": 0.0, "measure": "projection"}}  # fmt: skip
    one = {"interventions": edits, "probes": [{"vector": "resid_mid", "site": "resid_mid"}]}
    two = {"interventions": [gated]}
    three = {"probes": [{"vector": "mlp_post", "site": "mlp_post", "layers": [2]}]}
    asked = [Asked(PROMPT[: 6 + i], s, 4 + i, str(i)) for i, s in enumerate((one, None, two, three, one))]
    before, read = samples(server), server.http.get("/v1/steering/norms").json()["data"]
    answers = together(server, asked)
    fed = sum(len(a.ids) - 1 for a in answers)
    grown = after(
        server, before, lambda g: sum(g("activation_norm_count", layer=0, **group) for group in GROUPS) >= fed
    )
    seen = [captures(oracle, a, r.steering) for a, r in zip(answers, asked, strict=True)]
    check_layers(grown, layers, answers, asked, seen)
    check_norms(server, read, grown, seen)

    sizes: dict[tuple[str, int], list[np.ndarray]] = {}
    for answer, request in zip(answers, asked, strict=True):
        if request.steering is one:
            for key, found in by_formula(oracle, answer, one).items():
                sizes.setdefault(key, []).append(found)
    for (asset, layer), parts in sizes.items():
        values, about = np.concatenate(parts), {"asset": asset, "layer": layer}
        assert grown("relative_edit_norm_count", **about) == len(values), about
        assert grown("relative_edit_norm_sum", **about) == pytest.approx(values.sum(), rel=1e-3), about
        if asset != "resid_post":  # all of whose sizes are one number
            assert near(
                buckets(grown, "relative_edit_norm", RELATIVE_BOUNDS, **about), cumulative(values, RELATIVE_BOUNDS)
            )

    for i, (probe, site) in ((0, ("resid_mid", "resid_mid")), (3, ("mlp_post", "mlp_post"))):
        of = [k for k, r in enumerate(asked) if r.steering is asked[i].steering]
        for layer in oracle.assets[probe].layers if probe == "resid_mid" else [2]:
            v = oracle.assets[probe].layers[layer]
            read = np.concatenate([np.asarray(seen[k][layer, site] @ (v / v.norm())) for k in of])
            assert grown("probe_value_count", probe=probe, layer=layer) == len(read)
            assert grown("probe_value_bucket", probe=probe, layer=layer, le="0.0") == (read <= 0).sum()
            cosines = read / np.concatenate([lengths(seen[k][layer, site]) for k in of])
            found = buckets(grown, "probe_cosine", PROBE_COSINE_BOUNDS, probe=probe, layer=layer)
            assert near(found, cumulative(cosines, PROBE_COSINE_BOUNDS)), (probe, layer)

    v = oracle.assets["resid_post-other"].layers[1]
    edited = lengths(seen[2][1, "resid_post"])  # only so that the gate's own place is the one that is read
    read = np.asarray(seen[2][1, "resid_post"] @ (v / v.norm()))[len(answers[2].prompt) :]
    assert len(edited) == len(answers[2].ids) - 1
    assert grown("gate_decisions_total", asset="resid_pre") == len(read)
    assert grown("gate_open_total", asset="resid_pre") == (read > 0).sum()


def check_norms(server: Server, before: Any, grown: Callable[..., float], seen: Any) -> None:
    """What a baseline would be made of, and the outliers by the one that the server has."""
    n = len(USUAL[0])
    moments = seen_between(before, server.http.get("/v1/steering/norms").json()["data"], n)
    for layer, mean, deviation in zip(range(n), *USUAL, strict=True):
        logs = np.log(np.concatenate([lengths(found[layer, "resid_post"]) for found in seen]))
        assert moments.count[layer] == len(logs)
        assert moments.mean[layer] == pytest.approx(logs.mean(), rel=1e-5)
        assert moments.deviation[layer] == pytest.approx(logs.std(), rel=1e-3)
        far = np.abs(logs - mean) > 6 * deviation
        assert 0 < far.sum() < len(far), (layer, logs.mean(), logs.std())
        assert abs(grown("norm_outliers_total", layer=layer) - far.sum()) <= 1  # one may lie at the bound


GROUPS = [{"tokens": t, "steered": s} for t in ("prompt", "generated") for s in ("no", "yes")]


def captures(oracle: Oracle, answer: Answer, steering: Any) -> Mapping[tuple[int, str], torch.Tensor]:
    """Every site of every layer, after its edits, of the tokens that were fed in."""
    where = [(i, site) for i in range(oracle.config.num_hidden_layers) for site in oracle.sites(i)]
    return oracle.capture(answer.ids[:-1], where, steering, len(answer.prompt))


def check_layers(
    grown: Callable[..., float], layers: Sequence[int], answers: Sequence[Answer], asked: Sequence[Asked], seen: Any
) -> None:
    for layer in layers:
        for group in GROUPS:
            values = []
            for answer, request, found in zip(answers, asked, seen, strict=True):
                if (group["steered"] == "yes") == bool((request.steering or {}).get("interventions")):
                    n = len(answer.prompt)
                    part = slice(0, n) if group["tokens"] == "prompt" else slice(n, None)
                    values.append(lengths(found[layer, "resid_post"])[part])
            whole, about = np.concatenate(values), {"layer": layer, **group}
            assert grown("activation_norm_count", **about) == len(whole), about
            assert grown("activation_norm_sum", **about) == pytest.approx(whole.sum(), rel=1e-4), about
            assert near(buckets(grown, "activation_norm", NORM_BOUNDS, **about), cumulative(whole, NORM_BOUNDS))
        enter, leave = (torch.cat([found[layer, site] for found in seen]) for site in ("resid_pre", "resid_post"))
        cosines = torch.nn.functional.cosine_similarity(enter.double(), leave.double(), dim=-1)
        assert grown("layer_cosine_count", layer=layer) == len(cosines)
        assert grown("layer_cosine_sum", layer=layer) == pytest.approx(float(cosines.sum()), rel=1e-4)
    entropies = []
    for answer in answers:
        logs = answer.logprobs[len(answer.prompt) - 1 :].double()
        entropies += (-(logs.exp() * logs).sum(-1)).tolist()
    assert grown("answer_entropy_count") == len(entropies)
    assert grown("answer_entropy_sum") == pytest.approx(sum(entropies), rel=1e-3)


def near(found: list[int], wanted: list[int]) -> bool:
    """The same but for a value in a thousand that lies at a bound."""
    return all(abs(a - b) <= max(wanted[-1] // 1000, 1) for a, b in zip(found, wanted, strict=True))


def by_formula(oracle: Oracle, answer: Answer, steering: Any) -> dict[tuple[str, int], np.ndarray]:
    """‖Δx‖/‖x‖ of ``one``'s interventions, from the streams before each place's edits."""
    ids, n = answer.ids[:-1], len(answer.prompt)
    places = [(1, "resid_post"), (2, "resid_post"), (1, "attn_z")]
    x = oracle.capture(ids, places, steering, n, edited=False)
    out = {("resid_post", layer): np.full(n, 0.3) for layer in (1, 2)}
    v, other = (oracle.assets[name].layers[2] for name in ("resid_post", "resid_post-other"))
    stream = x[2, "resid_post"].clone()
    stream[:n] += 0.3 * stream[:n].norm(dim=-1, keepdim=True) * v / v.norm()
    out["resid_post-other", 2] = np.abs(np.asarray(stream @ (other / other.norm()))) / lengths(x[2, "resid_post"])
    z = oracle.assets["attn_z"].layers[1]
    out["attn_z", 1] = 0.5 * float(z.norm()) / lengths(x[1, "attn_z"])
    return out


def test_reports_of_every_token_and_probes_in_a_stream(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    edit = {"op": "add", "vector": "attn_z", "site": "attn_z", "scale": 0.5, "layers": [1, 2], "tokens": "prompt"}
    steering = {"interventions": [edit], "probes": [{"vector": "mlp_post", "site": "mlp_post", "layers": [0, 2]}]}
    answer = ask(server, PROMPT, {**steering, "report": "tokens"}, 5)
    (told,) = answer.body["steering"]["sequences"]
    ids, n = answer.ids[:-1], len(PROMPT)
    assert told["positions"] == [*range(len(ids))]
    after_edits = oracle.capture(ids, [(0, "mlp_post"), (2, "mlp_post")], steering, n)
    for probe, layer in zip(told["probes"], (0, 2), strict=True):
        v = oracle.assets["mlp_post"].layers[layer]
        assert (probe["index"], probe["layer"]) == (0, layer)
        assert probe["values"] == pytest.approx((after_edits[layer, "mlp_post"] @ (v / v.norm())).tolist(), abs=1e-3)
    before = oracle.capture(ids, [(1, "attn_z"), (2, "attn_z")], steering, n, edited=False)
    for done, layer in zip(told["interventions"], (1, 2), strict=True):
        sizes = 0.5 * float(oracle.assets["attn_z"].layers[layer].norm()) / lengths(before[layer, "attn_z"])
        assert (done["index"], done["layer"]) == (0, layer)
        assert done["relative_norms"][:n] == pytest.approx(sizes[:n].tolist(), rel=1e-3)
        assert done["relative_norms"][n:] == [None] * (len(ids) - n)

    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    asked = {**body, "stream": True, "steering": {**steering, "stream_probes": True}}
    with server.http.stream("POST", "/v1/completions", json=asked) as response:
        chunks = [c["steering"] for c in events(response.iter_lines()) if "steering" in c]
    parts = [s for chunk in chunks for s in chunk.get("sequences", ())]
    assert len(parts) > 1
    assert [p for part in parts for p in part["positions"]] == told["positions"]
    for i, probe in enumerate(told["probes"]):
        assert [v for part in parts for v in part["probes"][i]["values"]] == pytest.approx(probe["values"], abs=1e-5)
    assert "interventions" in chunks[-1]


def test_signals_of_the_generated_tokens(served: tuple[Server, Oracle]) -> None:
    server, oracle = served
    edit = {"op": "add", "vector": "resid_post", "relative": "norm", "scale": 0.3, "layers": [1]}
    names = ["answer_entropy", "evidence_entropy", "norm:0", "norm:3", "probe:mlp_post:2"]
    edited = {"interventions": [edit], "probes": [{"vector": "mlp_post", "site": "mlp_post"}]}
    other = {"signals": ["norm:2"], "default": False}
    asked = [Asked(PROMPT, {**edited, "signals": names, "report": "tokens"}, 6, "a"), Asked(PROMPT[:5], None, 8, "b")]
    answers = together(server, [*asked, Asked(PROMPT[:7], other, 4, "c")])
    hedges = hedge_ids(HEDGES, AutoTokenizer.from_pretrained(tiny_model("llama")))
    answer, ids, n = answers[0], answers[0].ids[:-1], len(PROMPT)
    (told,) = answer.body["steering"]["signals"]
    p = answer.logprobs[n - 1 :].double().exp()
    mass = p[:, hedges].sum(-1)
    assert 0.01 < float(mass.min()) < float(mass.max()) < 0.99
    seen = captures(oracle, answer, edited)
    v = oracle.assets["mlp_post"].layers[2]
    wanted = {
        "answer_entropy": -(p * p.log()).sum(-1),
        "evidence_entropy": -(mass * mass.log() + (1 - mass) * (1 - mass).log()),
        "norm:0": seen[0, "resid_post"].norm(dim=-1)[n - 1 :],
        "norm:3": seen[3, "resid_post"].norm(dim=-1)[n - 1 :],
        "probe:mlp_post:2": (seen[2, "mlp_post"] @ (v / v.norm()))[n - 1 :],
    }
    assert set(told["signals"]) == set(names)
    for name, values in wanted.items():
        found, numbers = told["signals"][name], values.tolist()
        assert found["positions"] == list(range(n - 1, len(ids)))
        assert found["values"] == pytest.approx(numbers, rel=1e-3, abs=1e-3), name
        about = {"tokens": 6, "first": numbers[0], "last": numbers[-1], "mean": sum(numbers) / 6, "max": max(numbers)}
        assert {k: found[k] for k in about} == pytest.approx(about, rel=1e-3, abs=1e-3), name
    assert "steering" not in answers[1].body
    (plain,) = answers[2].body["steering"]["signals"]
    norms = lengths(captures(oracle, answers[2], None)[2, "resid_post"])[6:]
    assert set(plain["signals"]) == {"norm:2"}
    assert plain["signals"]["norm:2"]["mean"] == pytest.approx(norms.mean(), rel=1e-3)
    assert plain["signals"]["norm:2"]["tokens"] == 4


def test_commands_that_learn_what_is_usual(
    served: tuple[Server, Oracle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, _ = served
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"tell me about the number {i}\n" for i in range(40)))
    asked = ["--server", server.url, "--prompts", str(prompts)]
    (before,) = server.http.get("/v1/steering/norms").json()["data"]
    assert cli.main(["baseline", "record", *asked, "--name", "learnt", "--max-tokens", "32"]) == 0
    ref = capsys.readouterr().out.strip()
    learnt = server.http.get(f"/v1/steering/assets/{ref}").json()
    assert min(learnt["counts"]) == max(learnt["counts"]) > 40 * 32
    (after,) = server.http.get("/v1/steering/norms").json()["data"]
    sums = []
    for reading in (before, after):
        n, mean, square = (np.array(reading[name]) for name in ("count", "mean", "square"))
        sums.append(np.stack([n, n * mean, square + n * mean**2]))  # number, Σx and Σx²
    n, total, squares = sums[1] - sums[0]
    assert learnt["counts"] == n.tolist()
    assert learnt["mean"] == pytest.approx((total / n).tolist(), rel=1e-9)
    assert learnt["deviation"] == pytest.approx(np.sqrt(squares / n - (total / n) ** 2).tolist(), rel=1e-6)
    features = ["answer_entropy.mean", "norm:1.max"]
    assert cli.main(["detector", "collect", *asked, "--features", ",".join(features), "--max-tokens", "8"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["messages"][0]["content"] for a in answers] == prompts.read_text().splitlines()
    values = [features_of(features, a["signals"])[0] for a in answers]
    entropy, norm = np.array(values).T
    assert ((entropy > 0) & (entropy < np.log(600))).all()
    assert (np.abs(np.log(norm) - USUAL[0][1]) < 1).all()


def test_an_edit_beyond_the_limit_is_said_and_counted(served: tuple[Server, Oracle]) -> None:
    server, _ = served
    edit = {"op": "add", "vector": "resid_post", "relative": "norm", "scale": 0.9, "layers": [1], "tokens": "prompt"}
    before = samples(server)
    answer = ask(server, PROMPT, {"interventions": [edit]}, 2)
    (warning,) = answer.body["steering"]["warnings"]
    assert warning.startswith("steering.interventions[0] changed the stream by 0.9 of its norm at layer 1")
    grown = value(samples(server), "dosage_limited_total", asset="resid_post", action="warn")
    assert grown - value(before, "dosage_limited_total", asset="resid_post", action="warn") == len(PROMPT)


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({"probes": [{"vector": "nobody"}]}, 404, "steering.probes[0].vector"),
        ({"probes": [{"vector": "resid_post"}] * 10_000}, 400, "steering.probes"),
        ({"stream_probes": True}, 400, "steering.stream_probes"),
        ({"probes": [{"vector": "resid_post"}], "stream_probes": True}, 400, "steering.stream_probes"),
        ({"signals": ["answer_entropy", "norm:99"]}, 400, "steering.signals[1]"),
        ({"signals": ["attention"]}, 400, "steering.signals"),
    ],
)
def test_bad_probes(served: tuple[Server, Oracle], asked: dict[str, Any], status: int, param: str) -> None:
    server, _ = served
    response = server.post("/v1/completions", {"model": server.model, "prompt": PROMPT, "steering": asked})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_an_engine_that_stops_and_dies(served: tuple[Server, Oracle]) -> None:
    """The last test of its server: a scrape never waits for the engine."""
    server, _ = served
    children = psutil.Process(server.process.pid).children(recursive=True)
    engines = [p for p in children if "APIServer" not in " ".join(p.cmdline())]
    assert engines
    assert lag(server) < 5
    for process in engines:
        process.send_signal(signal.SIGSTOP)
    waiting = ThreadPoolExecutor(1)
    answer = waiting.submit(server.complete, PROMPT, max_tokens=200)
    try:
        time.sleep(4)
        assert lag(server) > 2
    finally:
        for process in engines:
            process.send_signal(signal.SIGCONT)
    answer.result()
    deadline = time.monotonic() + 60
    while lag(server) > 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert lag(server) < 2
    for process in engines:
        process.kill()
    for _ in range(10):
        with suppress(httpx.NetworkError, httpx.RemoteProtocolError):  # vLLM ends its server when its engine has died
            server.http.get("/metrics", timeout=10)  # an HTTP process that is just ending may take seconds to hang up
        time.sleep(0.3)


def lag(server: Server) -> float:
    return value(samples(server), "monitor_lag_seconds")


@pytest.mark.parametrize("action", ["refuse", "cap"])
def test_a_limit_that_is_kept(action: str, tmp_path: Path) -> None:
    options = [*WIDE, "--steering-max-relative-norm", "0.25", "--steering-dosage", action, "--steering-monitor", "off"]
    with serve(tiny_model("llama"), tmp_path, options, forked=True) as server:
        oracle = Oracle(tiny_model("llama"), {})
        random_assets(oracle, server)

        def edit(scale: float) -> dict[str, Any]:
            return {"interventions": [
                {"op": "add", "vector": "resid_post", "relative": "norm", "scale": scale, "layers": [1, 2]}
            ]}  # fmt: skip

        small = ask(server, PROMPT, edit(0.25), 4)
        if action == "cap":
            large = ask(server, PROMPT, edit(0.8), 4)
            assert large.new == small.new
            assert float((large.logprobs - small.logprobs).abs().nan_to_num(0).max()) < 1e-3
            assert large.body["steering"]["interventions"][0]["mean_relative_norm"] == pytest.approx(0.25, rel=1e-3)
            assert "changed the stream by 0.8" in large.body["steering"]["warnings"][0]
        else:
            body = {"model": server.model, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "steering": edit(0.8)}
            response = server.post("/v1/completions", body)
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("dosage_exceeded", "steering.interventions[0]")
            assert "0.8" in error["message"]
            with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as streamed:
                assert events(streamed.iter_lines())[-1]["error"]["code"] == "dosage_exceeded"
        assert not any(name.startswith("steersman_activation") for name, _ in samples(server))
        found = samples(server)
        times = value(found, "dosage_limited_total", asset="resid_post", action=action)
        assert times == 2 * (len(PROMPT) + 3) * (1 if action == "cap" else 2)
