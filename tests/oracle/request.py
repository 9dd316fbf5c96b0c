"""How the oracle reads a steering request: assets, layers, token selections and gates. Plain data and plain torch."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# In the order in which a token passes them within a layer
SITES = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
Place = tuple[int, int]  # (layer, index into SITES)


@dataclass(frozen=True)
class AssetData:
    """What the oracle needs to know of an asset; a field that does not belong to the kind stays empty."""

    kind: str  # "vector", "neurons", "affine", "dictionary" or "recipe"
    site: str = "resid_post"
    # vector: layer -> [d], or [k, d] spanning a subspace, or for `heads` [n_heads·d_head] or [n_heads, d_head]
    # affine: layer -> {"R": [r, d], "A": [r, d], "b": [r]}
    # dictionary: layer -> {"W_enc": [d, m], "W_dec": [m, d], "b_enc": [m], "b_dec": [d], "threshold": [m]}
    layers: Mapping[int, Any] = field(default_factory=dict)
    neurons: Sequence[Sequence[int]] = ()  # neurons: (layer, index) pairs
    recipe: Mapping[str, Any] = field(default_factory=dict)  # recipe: rr_attn, rr_mlp, sources, targets and lambdas
    scale: float | None = None  # recommended scale of `add`, `heads` and `inject`
    tokens: Any = "all"  # default token selection


@dataclass(frozen=True)
class PromptContext:
    """Absolute positions of the prompt's spans that a token selection may name."""

    text: Mapping[str, Sequence[int]] = field(default_factory=dict)  # substring -> positions
    roles: Mapping[str, Sequence[int]] = field(default_factory=dict)  # role -> positions
    image: Sequence[int] = ()


COMMON_FIELDS = {"op", "layers", "site", "tokens", "when", "preserve_norm"}
OP_FIELDS = {
    "add": {"vector", "scale", "strength", "coefficient", "relative"},
    "ablate": {"vector", "strength"},
    "clamp": {"vector", "value", "min", "max"},
    "multiply": {"vector", "factor"},
    "rotate": {"vector", "toward", "degrees"},
    "feature": {"dictionary", "index", "mode", "value", "only_if_active"},
    "neurons": {"neurons", "mode", "value"},
    "heads": {"heads", "factor", "vector", "scale"},
    "affine": {"affine", "strength"},
    "inject": {"recipe", "scale"},
}
TOKEN_FIELDS = {"prompt", "generated", "positions", "ranges", "last", "image", "text", "token_ids", "roles", "exclude"}
GATE_FIELDS = {"vector", "dictionary", "index", "layer", "site", "measure", "above", "below", "over", "hold"}


def known(given: Mapping[str, Any], allowed: Iterable[str], what: str) -> None:
    """Refuse a field that means nothing here: an edit must not be dropped in silence."""
    if unknown := set(given) - set(allowed):
        raise ValueError(f"{what}: unknown or unsupported {sorted(unknown)}")


def named_layers(spec: Any, available: set[int]) -> list[int]:
    """The layers an intervention names, out of those its asset has."""
    if spec is None or spec == "all":
        return sorted(available)
    if isinstance(spec, str):
        first, last = spec.split("-")
        named = list(range(int(first), int(last) + 1))
    else:
        named = [spec] if isinstance(spec, int) else list(spec)
    if missing := set(named) - available:
        raise ValueError(f"the asset lacks layers {sorted(missing)}")
    return sorted(set(named))


def inline_vector(spec: Mapping[str, Any]) -> AssetData:
    """The asset given in the request itself, as base64 of [n_layers, ...]."""
    known(spec, {"dtype", "shape", "layers", "data", "site"}, "inline")
    raw = bytearray(base64.b64decode(spec["data"]))
    stacked = torch.frombuffer(raw, dtype=getattr(torch, spec["dtype"])).reshape(spec["shape"]).float()
    if len(spec["layers"]) != len(stacked):
        raise ValueError("inline: as many layers as rows, please")
    return AssetData("vector", spec.get("site", "resid_post"), dict(zip(spec["layers"], stacked, strict=True)))


def select(spec: Any, token_ids: Sequence[int], prompt_len: int, context: PromptContext) -> Tensor:
    """Which positions a token selection names: [T] bool over prompt and generated tokens."""
    n = len(token_ids)
    mask = torch.zeros(n, dtype=torch.bool)
    if isinstance(spec, str):
        bounds = {"all": (0, n), "prompt": (0, prompt_len), "generated": (prompt_len, n)}
        start, end = {**bounds, "last_prompt": (prompt_len - 1, prompt_len)}[spec]
        mask[start:end] = True
        return mask
    known(spec, TOKEN_FIELDS, "tokens")
    picked: list[int] = []
    if spec.get("prompt"):
        picked += range(prompt_len)
    if spec.get("generated"):
        picked += range(prompt_len, n)
    if spec.get("last"):
        picked += range(max(0, prompt_len - spec["last"]), prompt_len)
    if spec.get("image"):
        picked += context.image
    for p in spec.get("positions", ()):
        picked.append(p if p >= 0 else prompt_len + p)
    for a, b in spec.get("ranges", ()):
        picked += range(a if a >= 0 else prompt_len + a, b if b >= 0 else prompt_len + b)
    if "text" in spec:
        picked += context.text[spec["text"]]
    for role in spec.get("roles", ()):
        picked += context.roles[role]
    wanted = set(spec.get("token_ids", ()))
    picked += [p for p, token in enumerate(token_ids) if token in wanted]
    if set(spec) == {"exclude"}:  # everything but
        picked += range(n)
    mask[[p for p in picked if 0 <= p < n]] = True
    if "exclude" in spec:
        mask &= ~select(spec["exclude"], token_ids, prompt_len, context)
    return mask


@dataclass(eq=False)
class Gate:
    """One `when`. `token_open` is filled while a pass runs, `decision` by the pass over the prompt."""

    place: Place
    value: Callable[[Tensor], Tensor]  # x [T, d] -> what is compared with the bounds, [T]
    above: float
    below: float
    over: str  # token | prompt_mean | last_prompt
    hold: bool
    token_open: Tensor | None = None  # [T] bool
    decision: bool | None = None

    def see(self, x: Tensor, prompt_len: int) -> None:
        """See the stream x [T, d] at the gate's own place, before any edit made there."""
        if self.over == "token":
            opened = self._holds(x)
            self.token_open = opened.int().cumsum(0) > 0 if self.hold else opened
        elif self.decision is None:
            seen = x[:prompt_len].mean(0) if self.over == "prompt_mean" else x[prompt_len - 1]
            self.decision = bool(self._holds(seen[None])[0])

    def _holds(self, x: Tensor) -> Tensor:
        value = self.value(x)
        return (value > self.above) & (value < self.below)

    def mask(self, place: Place, n: int, prompt_len: int) -> Tensor:
        """Where the gate lets an edit made at `place` apply: [T] bool."""
        if self.over == "token":
            assert self.token_open is not None
            return self.token_open
        mask = torch.zeros(n, dtype=torch.bool)
        if self.decision:
            mask[prompt_len:] = True
            mask[prompt_len - 1] = place > self.place
        return mask
