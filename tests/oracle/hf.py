"""The oracle: Hugging Face hooks that do what a steering request says, edit by edit, in plain float32 torch.

It is the truth that the server is compared with, so it shares no code with it and takes no shortcut: one forward
pass over the whole sequence, no KV cache, attention "eager", and every edit computed on the full activation as
the formulas of the design state it. A request it cannot follow to the letter raises `ValueError` (`KeyError` for
an unknown name, `NotImplementedError` for an op it does not have).

    oracle = Oracle(tiny_model("llama"), {"calm": AssetData("vector", "resid_post", {1: v})})
    oracle.logprobs(ids, {"interventions": [{"op": "add", "vector": "calm"}]}, prompt_len=5)

Order of places: within a layer resid_pre, attn_z, attn_out, resid_mid, mlp_post, mlp_out, resid_post. At one place
all gates are read first, then the edits apply in request order.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle import ops
from tests.oracle.request import (
    COMMON_FIELDS,
    GATE_FIELDS,
    OP_FIELDS,
    SITES,
    AssetData,
    Gate,
    Place,
    PromptContext,
    inline_vector,
    known,
    named_layers,
    select,
)

__all__ = ["ARCHITECTURES", "SITES", "Arch", "AssetData", "Oracle", "PromptContext"]


@dataclass(frozen=True)
class Arch:
    """Module paths of one architecture, relative to a block except `blocks`; the sites are taken from these."""

    blocks: str
    attn: str  # its output is attn_out
    attn_proj: str  # its input is attn_z
    mlp: str  # its output is mlp_out
    mlp_proj: str  # its input is mlp_post; MoE blocks do not have it


_LLAMA = Arch("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
_POST_NORM = Arch(
    "model.layers", "post_attention_layernorm", "self_attn.o_proj", "post_feedforward_layernorm", "mlp.down_proj"
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "mixtral": _LLAMA,
    "deepseek_v2": _LLAMA,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "gpt2": Arch("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_neox": Arch("gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
}


@dataclass(frozen=True)
class Edit:
    """One intervention at one place."""

    place: Place
    op: ops.Op
    tokens: Any
    gate: Gate | None
    earlier: tuple[tuple[float, Place], ...] = ()  # of inject: the rates and places of what it adds


class Oracle:
    """A model whose every forward pass follows a steering request. Not thread-safe."""

    def __init__(self, model_dir: str | Path, assets: Mapping[str, AssetData]) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self.model: nn.Module = model.eval()
        self.config = model.config
        self.assets = dict(assets)
        self.arch = ARCHITECTURES[model.config.model_type]
        self.blocks: Sequence[nn.Module] = list(model.get_submodule(self.arch.blocks))
        self.parallel = bool(getattr(model.config, "use_parallel_residual", False))

    def sites(self, layer: int) -> list[str]:
        """The sites that exist in a layer."""
        absent = {"resid_mid"} if self.parallel else set()
        if self._mlp_proj(self.blocks[layer]) is None:
            absent.add("mlp_post")
        return [site for site in SITES if site not in absent]

    @torch.inference_mode()
    def logprobs(
        self, token_ids: Sequence[int], steering: Any, prompt_len: int, context: PromptContext | None = None
    ) -> Tensor:
        """Log-probabilities of the token after each position: [T, vocab] float32."""
        return self._forward(token_ids, steering, prompt_len, context, {}, True).log_softmax(-1)

    def generate(
        self,
        prompt_ids: Sequence[int],
        steering: Any,
        max_tokens: int,
        context: PromptContext | None = None,
        eos_token_id: int | None = None,
    ) -> list[int]:
        """Greedy continuation by whole forward passes; stops early only at an `eos_token_id` given here."""
        ids = list(prompt_ids)
        for _ in range(max_tokens):
            ids.append(int(self.logprobs(ids, steering, len(prompt_ids), context)[-1].argmax()))
            if ids[-1] == eos_token_id:
                break
        return ids[len(prompt_ids) :]

    @torch.inference_mode()
    def capture(
        self,
        token_ids: Sequence[int],
        where: Iterable[tuple[int, str]],
        steering: Any = None,
        prompt_len: int | None = None,
        context: PromptContext | None = None,
        edited: bool = True,
    ) -> dict[tuple[int, str], Tensor]:
        """Activations [T, width] at each (layer, site), after the edits made there or (`edited=False`) before."""
        seen: dict[Place, Tensor] = {}
        for layer, site in where:
            if site not in self.sites(layer):
                raise ValueError(f"layer {layer} of {self.config.model_type} has no {site}")
            seen[layer, SITES.index(site)] = torch.empty(0)
        n = len(token_ids) if prompt_len is None else prompt_len
        self._forward(token_ids, steering, n, context, seen, edited)
        return {(layer, SITES[s]): x for (layer, s), x in seen.items()}

    # ------------------------------------------------------------------------------------------ reading a request

    def asset(self, ref: Any, kind: str) -> AssetData:
        """The asset a request names as "name" or "name@version", or gives inline."""
        if isinstance(ref, str):
            found = self.assets.get(ref) or self.assets[ref.split("@")[0]]
        elif kind == "neurons":
            found = AssetData("neurons", "mlp_post", neurons=ref["inline"])
        else:
            found = inline_vector(ref["inline"])
        if found.kind != kind:
            raise ValueError(f"{ref!r} is of kind {found.kind}, not {kind}")
        return found

    def edits(self, steering: Mapping[str, Any] | None) -> list[Edit]:
        """Every intervention of a request at every place it acts on, in request order."""
        if steering is None:
            return []
        known(steering, {"profile", "default", "interventions", "probes", "report"}, "steering")
        return [edit for spec in steering.get("interventions", ()) for edit in self._edits_of(spec)]

    def _edits_of(self, spec: Mapping[str, Any]) -> list[Edit]:
        spec = {key: value for key, value in spec.items() if value is not None}
        op = spec["op"]
        if op not in OP_FIELDS:
            raise NotImplementedError(f"the oracle has no op {op!r}")
        if op == "inject":
            return self._injections_of(spec)
        known(spec, COMMON_FIELDS | OP_FIELDS[op], op)
        kind = {"neurons": "neurons", "affine": "affine", "feature": "dictionary"}.get(op, "vector")
        asset = self.asset(spec[kind], kind) if kind in spec else AssetData("vector", "attn_z")
        site = spec.get("site", {"neurons": "mlp_post", "heads": "attn_z"}.get(op, asset.site))
        if {"neurons": "mlp_post", "heads": "attn_z"}.get(op, site) != site:
            raise ValueError(f"{op} does not work at {site}")
        pairs = [tuple(p) for p in {"neurons": asset.neurons, "heads": spec.get("heads", ())}.get(op, ())]
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"{op}: the same (layer, index) twice")
        available = {layer for layer, _ in pairs} if op in ("neurons", "heads") else set(asset.layers)
        gate = self._gate(spec["when"]) if "when" in spec else None
        edits = []
        for layer in named_layers(spec.get("layers"), available):
            if site not in self.sites(layer):
                raise ValueError(f"layer {layer} of {self.config.model_type} has no {site}")
            place = (layer, SITES.index(site))
            if gate is not None and gate.over == "token" and gate.place >= place:
                raise ValueError(f"a token gate at {gate.place} cannot rule an edit at {place}")
            act = self._op(spec, asset, layer, [i for where, i in pairs if where == layer])
            if spec.get("preserve_norm"):
                act = partial(ops.preserving_norm, op=act)
            edits.append(Edit(place, act, spec.get("tokens", asset.tokens), gate))
        return edits

    def _injections_of(self, spec: Mapping[str, Any]) -> list[Edit]:
        """Same-pass injection: one edit for each target of attention and of the MLP, sources before it or not."""
        known(spec, (COMMON_FIELDS | OP_FIELDS["inject"]) - {"site", "preserve_norm"}, "inject")
        if isinstance(spec["recipe"], str):
            asset = self.asset(spec["recipe"], "recipe")
        else:
            asset = AssetData("recipe", recipe=spec["recipe"]["inline"])
        recipe, tokens = asset.recipe, spec.get("tokens", {"generated": True, "last": 1})
        scale = spec.get("scale", 1.0 if asset.scale is None else asset.scale)
        gate = self._gate(spec["when"]) if "when" in spec else None
        every = {layer for targets in recipe["targets"].values() for layer in targets}
        named = set(named_layers(spec.get("layers"), every))
        edits = []
        for part, site, strength in (("attn", "attn_out", "lambda_a"), ("mlp", "mlp_out", "lambda_m")):
            index = SITES.index(site)
            for layer in named & set(recipe["targets"].get(part, ())):
                before = [k for k in recipe["sources"].get(part, ()) if k < layer]
                if not before:
                    continue
                if gate is not None and gate.over == "token" and gate.place >= (layer, index):
                    raise ValueError(f"a token gate at {gate.place} cannot rule an edit at {(layer, index)}")
                earlier = tuple((recipe[f"rr_{part}"][k], (k, index)) for k in before)
                act = partial(ops.inject, strength=scale * recipe[strength])
                edits.append(Edit((layer, index), act, tokens, gate, earlier))
        return edits

    def _op(self, spec: Mapping[str, Any], asset: AssetData, layer: int, indices: list[int]) -> ops.Op:
        """The function of x [T, width] that one intervention is at one layer."""
        op, v = spec["op"], asset.layers.get(layer)
        if isinstance(v, Tensor):
            v = v.float()
            if op not in ("ablate", "heads"):  # those take several rows; the others one direction
                v = v.reshape(math.prod(v.shape[:-1]), -1).squeeze(0)
                if v.ndim != 1:
                    raise ValueError(f"{op} takes one direction, not a subspace")
        if op == "add":
            given = [spec[key] for key in ("scale", "strength", "coefficient") if key in spec]
            scale = given[0] if given else (1.0 if asset.scale is None else asset.scale)
            if len(given) > 1 or spec.get("relative") not in (None, "norm"):
                raise ValueError("add: one of scale, strength, coefficient; relative is null or norm")
            return partial(ops.add, v=v, scale=scale, relative=spec.get("relative") == "norm")
        if op == "ablate":
            return partial(ops.ablate, v=v, strength=spec.get("strength", 1.0))
        if op == "clamp":
            if ("value" in spec) == bool({"min", "max"} & set(spec)):
                raise ValueError("clamp: either value, or min and max or one of them")
            low, high = spec.get("value", spec.get("min", -math.inf)), spec.get("value", spec.get("max", math.inf))
            return partial(ops.clamp, v=v, low=low, high=high)
        if op == "multiply":
            return partial(ops.multiply, v=v, factor=spec["factor"])
        if op == "rotate":
            toward = self.asset(spec["toward"], "vector").layers[layer].float().reshape(-1)
            return partial(ops.rotate, v=v, toward=toward, degrees=spec["degrees"])
        if op == "feature":
            if (spec.get("mode", "set") == "ablate") != ("value" not in spec):
                raise ValueError("feature: a value, but for ablate")
            index = spec["index"] if isinstance(spec["index"], list) else [spec["index"]]
            return partial(
                ops.feature, p=asset.layers[layer], indices=index, mode=spec.get("mode", "set"),
                value=spec.get("value", 0.0), only_if_active=spec.get("only_if_active", False),
            )  # fmt: skip
        if op == "neurons":
            return partial(ops.neurons, indices=indices, mode=spec["mode"], value=spec["value"])
        if op == "heads":
            if (v is None) != ("vector" not in spec) or ("factor" in spec) == ("vector" in spec):
                raise ValueError("heads: either factor, or a vector that has the layer")
            scale = spec.get("scale", 1.0 if asset.scale is None else asset.scale)
            n_heads = self.config.num_attention_heads
            return partial(ops.heads, heads=indices, n_heads=n_heads, factor=spec.get("factor"), v=v, scale=scale)
        return partial(ops.affine, p=asset.layers[layer], strength=spec.get("strength", 1.0))

    def _gate(self, when: Mapping[str, Any]) -> Gate:
        known(when, GATE_FIELDS, "when")
        when = {key: value for key, value in when.items() if value is not None}
        if not {"above", "below"} & set(when):
            raise ValueError("when: above or below is given")
        if when.get("over", "token") not in ("token", "prompt_mean", "last_prompt"):
            raise ValueError("when: over is token, prompt_mean or last_prompt")
        layer, value = self._measure(when)
        site = when.get("site", self.assets[when["dictionary"]].site if "dictionary" in when else "resid_post")
        if site not in self.sites(layer):
            raise ValueError(f"layer {layer} of {self.config.model_type} has no {site}")
        return Gate(
            place=(layer, SITES.index(site)),
            value=value,
            above=when.get("above", -math.inf),
            below=when.get("below", math.inf),
            over=when.get("over", "token"),
            hold=when.get("hold", False),
        )

    def _measure(self, when: Mapping[str, Any]) -> tuple[int, Callable[[Tensor], Tensor]]:
        """The layer where a gate is read, and what it reads of x [T, d] there: [T]."""
        measure = when.get("measure", "feature" if "dictionary" in when else "cosine")
        if measure == "feature":
            layers = self.asset(when["dictionary"], "dictionary").layers
            layer = when.get("layer", min(layers))
            return layer, lambda x: ops.activations(x, layers[layer])[:, when["index"]]
        v = ops.unit(self.asset(when["vector"], "vector").layers[when["layer"]].float().reshape(-1))
        if measure not in ("cosine", "projection"):
            raise ValueError("when: measure is cosine, projection or feature")
        cosine = measure == "cosine"
        return when["layer"], lambda x: x @ v / (x.norm(dim=-1).clamp_min(1e-30) if cosine else 1.0)

    # ------------------------------------------------------------------------------------------ forward passes

    def _forward(
        self,
        token_ids: Sequence[int],
        steering: Any,
        prompt_len: int,
        context: PromptContext | None,
        seen: dict[Place, Tensor],
        edited: bool,
    ) -> Tensor:
        """Logits [T, vocab] of one steered pass; fills `seen`, keyed by the places to record."""
        edits = self.edits(steering)
        if not 0 < prompt_len <= len(token_ids):
            raise ValueError("prompt_len is from 1 to the number of tokens")
        if any(edit.gate and edit.gate.over != "token" for edit in edits):
            # Decides: what is computed for the prompt is the same whatever is generated after it
            self._pass(token_ids[:prompt_len], edits, prompt_len, context or PromptContext(), {}, True)
        return self._pass(token_ids, edits, prompt_len, context or PromptContext(), seen, edited)

    def _pass(
        self,
        token_ids: Sequence[int],
        edits: list[Edit],
        prompt_len: int,
        context: PromptContext,
        seen: dict[Place, Tensor],
        edited: bool,
    ) -> Tensor:
        gates = {id(edit.gate): edit.gate for edit in edits if edit.gate}.values()
        raw: dict[Place, Tensor] = {}  # what layers put out before any edit there, as far as injections need it
        wanted = {place for edit in edits for _, place in edit.earlier}

        def at(layer: int, site: str, x: Tensor) -> Tensor:
            """What becomes of the activation x [1, T, width] at one place."""
            place, x = (layer, SITES.index(site)), x[0]
            before = x
            if place in wanted:
                raw[place] = x.clone()
            for gate in gates:
                if gate.place == place:
                    gate.see(x, prompt_len)
            for edit in edits:
                if edit.place == place:
                    mask = select(edit.tokens, token_ids, prompt_len, context)
                    if edit.gate:
                        mask = mask & edit.gate.mask(place, len(token_ids), prompt_len)
                    op = (
                        partial(edit.op, earlier=[(rate, raw[k]) for rate, k in edit.earlier])
                        if edit.earlier
                        else edit.op
                    )
                    x = torch.where(mask[:, None], op(x), x)
            if place in seen:
                seen[place] = (x if edited else before).clone()
            return x[None]

        with ExitStack() as hooks:
            for layer, block in enumerate(self.blocks):
                self._hook(block, partial(at, layer), hooks)
            return self.model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()

    def _mlp_proj(self, block: nn.Module) -> nn.Module | None:
        try:
            return block.get_submodule(self.arch.mlp_proj)
        except AttributeError:
            return None

    def _hook(self, block: nn.Module, at: Callable[[str, Tensor], Tensor], hooks: ExitStack) -> None:
        """Put `at` in the way of every site of one block."""
        stream: dict[str, Tensor] = {}  # "pre": what entered the block, after its edits

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            if args:
                args = (at("resid_pre", args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": at("resid_pre", kwargs["hidden_states"])}
            stream["pre"] = args[0] if args else kwargs["hidden_states"]
            return args, kwargs

        def attn(_: Any, __: Any, out: Any) -> Any:
            x = at("attn_out", out[0] if isinstance(out, tuple) else out)
            if not self.parallel:  # resid_mid = resid_pre + attn_out; its edit travels as part of attn_out
                mid = stream["pre"] + x
                x = x + (at("resid_mid", mid) - mid)
            return (x, *out[1:]) if isinstance(out, tuple) else x

        def output(site: str, _: Any, __: Any, out: Any) -> Any:
            return (at(site, out[0]), *out[1:]) if isinstance(out, tuple) else at(site, out)

        def before(site: str, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (at(site, args[0]), *args[1:])

        handles = [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.get_submodule(self.arch.attn_proj).register_forward_pre_hook(partial(before, "attn_z")),
            block.get_submodule(self.arch.attn).register_forward_hook(attn),
            block.get_submodule(self.arch.mlp).register_forward_hook(partial(output, "mlp_out")),
            block.register_forward_hook(partial(output, "resid_post")),
        ]
        if (proj := self._mlp_proj(block)) is not None:
            handles.append(proj.register_forward_pre_hook(partial(before, "mlp_post")))
        for handle in handles:
            hooks.callback(handle.remove)
