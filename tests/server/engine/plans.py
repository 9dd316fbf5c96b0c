"""Requests' interventions for the toy model, one list of each kind that the runtime treats in its own way."""

from typing import Any

import torch

from steersman.steering.plan import Plan
from tests.steering.library import D, inline, noise, plan_of

OPENS, SHUT = 9, 3  # token ids above and below the gate's bound
TOKEN_AXIS = inline(torch.eye(D)[0])


def sideways(seed: int) -> dict[str, Any]:
    """A direction that leaves the coordinate alone in which tokens are told apart."""
    v = noise(D, seed=seed)
    v[0] = 0
    return inline(v)


def gate(over: str = "token", layer: int = 0, **more: Any) -> dict[str, Any]:
    return {"vector": TOKEN_AXIS, "layer": layer, "measure": "projection", "above": 6.0, "over": over, **more}


def add(seed: int = 0, layers: Any = "all", **more: Any) -> dict[str, Any]:
    return {"op": "add", "vector": sideways(seed), "layers": layers, **more}


def inject(**more: Any) -> dict[str, Any]:
    """From layers 0 and 1 into 1 to 3 at attn_out, and from 2 into 3 at mlp_out."""
    recipe = {
        "rr_attn": [0.75, 1.5, 0.25, 0.0], "rr_mlp": [0.0, 0.0, 2.0, 1.0], "lambda_a": 0.5, "lambda_m": -0.25,
        "sources": {"attn": [0, 1], "mlp": [2]}, "targets": {"attn": [0, 1, 2, 3], "mlp": [1, 3]},
    }  # fmt: skip
    return {"op": "inject", "recipe": {"inline": recipe}, **more}


KINDS: dict[str, list[dict[str, Any]]] = {
    "add": [add(0), add(1, [1, 2], scale=-2)],
    "reads": [add(2, 1, relative="norm", scale=0.1), {"op": "ablate", "vector": sideways(3), "layers": "1-3"}],
    "norm": [add(4, 2, scale=5, preserve_norm=True), {"op": "clamp", "vector": sideways(5), "layers": 2, "max": 0}],
    "neurons": [
        {"op": "neurons", "neurons": {"inline": [[2, 3], [3, 5]]}, "value": 4, "site": "resid_post"},
        {"op": "neurons", "neurons": {"inline": [[2, 3]]}, "value": 2, "mode": "scale", "site": "resid_post"},
    ],
    "words": [
        add(6, 1, tokens="prompt"), add(7, [1, 3], tokens="generated"), add(8, 2, tokens="last_prompt"),
        add(9, 2, tokens={"generated": True, "last": 2}), add(10, 1, tokens={"exclude": "last_prompt"}),
    ],
    "ids": [
        add(11, 1, tokens={"token_ids": [OPENS]}),
        add(12, 3, tokens={"generated": True, "exclude": {"token_ids": [5]}}),
    ],
    "token-gate": [add(13, [1, 3], when=gate())],
    "hold": [add(14, [1, 3], when=gate(hold=True)), add(15, 2, when=gate(below=8.0))],
    "late-hold": [add(20, [1, 3], when=gate(above=25.0, hold=True))],
    "prompt-mean": [add(16, "all", when=gate("prompt_mean", 1))],
    "last-prompt": [add(17, "all", when=gate("last_prompt", 2)), add(18, 1, when=gate("last_prompt", 2, above=60.0))],
    "inject": [inject(), inject(scale=2.0, layers=[1, 3], tokens={"token_ids": [OPENS]})],
    "inject-among-others": [
        {"op": "ablate", "vector": sideways(21), "layers": [0, 1, 3], "site": "attn_out", "tokens": "generated"},
        inject(tokens="all", when=gate()),
        add(22, [1, 3], site="attn_out", relative="norm", scale=0.5),
    ],
    "gated-reads": [{"op": "ablate", "vector": sideways(19), "layers": [2, 3], "when": gate(), "preserve_norm": True}],
}  # fmt: skip


def plan(kind: str, **more: Any) -> Plan:
    return plan_of(*KINDS[kind], **more)
