"""Captures of a real server against Hugging Face's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steersman.clients.activations import Capture
from steersman.clients.sdk import Steersman
from tests.e2e.server import Server
from tests.oracle.hf import Oracle

CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # of float32 sums in another order


def capture(server: Server, prompts: Sequence[Any], **asked: Any) -> Capture:
    with Steersman(server.url) as client:
        return client.capture(prompts, **asked)


def check(oracle: Oracle, found: Capture, steering: Any = None, label: str = "") -> None:
    """Every array is what the oracle computes of the same prompt at that place, under the same edits."""
    places = [(layer, site) for site, layers in found.about["sites"].items() for layer in layers]
    for i, prompt in enumerate(found.about["prompts"]):
        wanted = oracle.capture(prompt["token_ids"], places, steering, len(prompt["token_ids"]))
        for layer, site in places:
            rows, own = torch.from_numpy(found.rows(site, layer, i).copy()), wanted[layer, site][prompt["positions"]]
            where = f"{label} prompt {i}, layer {layer} {site}: "
            torch.testing.assert_close(rows, own, **CLOSE, msg=lambda m, where=where: where + m)


def everywhere(server: Server, oracle: Oracle, prompts: Sequence[list[int]], steering: Any = None) -> None:
    """At every site of every layer; and that the edits are seen."""
    sites = list(server.http.get("/v1/steering/model").json()["sites"])
    for site in sites:
        found = capture(server, prompts, sites=[site], steering=steering)
        assert [p["token_ids"] for p in found.about["prompts"]] == [list(p) for p in prompts]
        check(oracle, found, steering, site)
        for how, reduced in (("mean", lambda x: x.mean(0)), ("last", lambda x: x[-1])):
            told = capture(server, prompts, sites=[site], steering=steering, reduce=how)
            for layer in found.about["sites"][site]:
                own = torch.stack([reduced(torch.from_numpy(found.rows(site, layer, i))) for i in range(len(prompts))])
                torch.testing.assert_close(torch.from_numpy(told.rows(site, layer)), own, **CLOSE)
