"""From the names that dictionaries give to where they were trained, to a layer and a site.

TransformerLens: `blocks.<L>.hook_resid_post` and its like. Hugging Face: a module's path, at whose output it was
trained, `model.layers.<L>` or `transformer.h.<L>.mlp`; with `.input` or `.output` at the end, that side of it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from steersman.steering.errors import InvalidRequest
from steersman.steering.sites import Site

MLP_IN: Final = "mlp_in"  # what the MLP is fed, after its norm: read by transcoders, and no site


class Where(NamedTuple):
    layer: int
    site: str  # of `Site`, or MLP_IN


_LENS: Final[dict[str, str]] = {
    "hook_resid_pre": Site.RESID_PRE,
    "hook_resid_mid": Site.RESID_MID,
    "hook_resid_post": Site.RESID_POST,
    "hook_attn_out": Site.ATTN_OUT,
    "hook_mlp_out": Site.MLP_OUT,
    "attn.hook_z": Site.ATTN_Z,
    "mlp.hook_post": Site.MLP_POST,
    "mlp.hook_in": MLP_IN,
    "ln2.hook_normalized": MLP_IN,
    "hook_mlp_in": MLP_IN,
}
_MODULES: Final[dict[str, str]] = {
    "": Site.RESID_POST,
    "self_attn": Site.ATTN_OUT,
    "attn": Site.ATTN_OUT,
    "attention": Site.ATTN_OUT,
    "mlp": Site.MLP_OUT,
    "post_feedforward_layernorm": Site.MLP_OUT,
}
_INPUTS: Final[dict[str, str]] = {
    "": Site.RESID_PRE,
    "mlp": MLP_IN,
    "self_attn.o_proj": Site.ATTN_Z,
    "attn.c_proj": Site.ATTN_Z,
    "attention.dense": Site.ATTN_Z,
    "mlp.down_proj": Site.MLP_POST,
    "mlp.c_proj": Site.MLP_POST,
    "mlp.dense_4h_to_h": Site.MLP_POST,
}
_OUTPUTS: Final[dict[str, str]] = _MODULES | {"pre_feedforward_layernorm": MLP_IN}
_MAX_LENGTH: Final = 512
_LENS_NAME: Final = re.compile(r"blocks\.(\d{1,5})\.(.+)")
_MODULE_NAME: Final = re.compile(r"(?:.*\.)?(?:layers|h)[._](\d{1,5})(?:\.(.+?))??(?:\.(input|output))?")


def parse(name: str, param: str = "config.hook_name") -> Where:
    """The layer and site that a hook's name means."""
    if name in ("hook_embed", "embed_tokens"):
        return Where(0, Site.RESID_PRE)
    match = None
    if len(name) > _MAX_LENGTH:  # what follows takes time with the square of it
        site = None
    elif match := _LENS_NAME.fullmatch(name):
        site = _LENS.get(match[2])
    elif match := _MODULE_NAME.fullmatch(name):
        tables: dict[str | None, dict[str, str]] = {"input": _INPUTS, "output": _OUTPUTS, None: _MODULES}
        site = tables[match[3]].get(match[2] or "")
    else:
        site = None
    if match is None or site is None:
        known = ", ".join(f"blocks.<L>.{hook}" for hook in _LENS)
        raise InvalidRequest(f"'{name[:128]}' is no place that can be steered; known: {known}", param)
    return Where(int(match[1]), str(site))


def lens_name(layer: int, site: str) -> str:
    """TransformerLens's name, the first of those that mean the same."""
    return f"blocks.{layer}.{next(hook for hook, meant in _LENS.items() if meant == site)}"
