"""π0 as Transformers has it, its layers hooked, computing several robots' observations in one padded batch.

A batch is one pass of the backbone (PaliGemma) over every prompt, and then one pass of the action expert for each
denoising step, over the state's token and the chunk's action tokens. Layers are numbered through: the backbone's from
0, the expert's after them. A request's positions are those of its prompt, and then those of the expert's tokens, step
after step: the token ``i`` of step ``k`` is at ``prompt + k * tokens + i``, where ``tokens`` is 1 + chunk.

The contract with Transformers: ``PI0ForConditionalGeneration`` has ``model.vlm`` and ``model.dit``; what this does is
its ``sample_actions``, with the passes told to a :class:`~steersman.server.engine.runtime.Runtime`. The decoder layers
see rows [batch, tokens], each prompt padded at its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steersman.kernels import cpu_library
from steersman.server.engine import hooks
from steersman.server.engine.layers import TORCH
from steersman.server.engine.owners import Scheduled
from steersman.server.engine.runtime import Runtime
from steersman.server.policies.pi0 import Pi0Prompt
from steersman.server.policies.policy import Floats
from steersman.steering.sites import ModelInfo, Site
from steersman.steering.tokens import Ints

BACKBONE, EXPERT = "backbone", "expert"


class Pi0Model:
    def __init__(self, folder: Path, runtime: Runtime, sites: frozenset[Site], device: str, dtype: torch.dtype) -> None:
        """Raises ValueError for a checkpoint that lacks weights."""
        from transformers import PI0Config, PI0ForConditionalGeneration

        config = PI0Config.from_pretrained(folder)
        made, about = PI0ForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
        if missing := about["missing_keys"]:
            raise ValueError(f"{folder} has no weights for {', '.join(sorted(missing)[:3])}")
        self.model: Any = made.to(device).eval()
        self.config = config
        self.device, self.dtype = torch.device(device), dtype
        self.runtime = runtime
        self.lock = threading.Lock()  # one pass at a time, and nothing else touches the runtime meanwhile
        self.steps: int = config.num_inference_steps
        self.tokens: int = config.chunk_size + 1  # of the expert, in one step
        if self.device.type == "cpu":
            cpu_library.library(cpu_library.backend())  # compiled now, not in the first steered pass
        text, expert = config.vlm_config.text_config, config.dit_config
        self.n_backbone: int = text.num_hidden_layers
        backbone = self.model.model.vlm.language_model.layers
        widths, _ = hooks.install(enumerate(backbone), text.hidden_size, runtime, sites, kinds=TORCH)
        hooked, _ = hooks.install(
            enumerate(self.model.model.dit.layers, self.n_backbone), expert.hidden_size, runtime, sites, kinds=TORCH
        )
        if expert.num_attention_heads != text.num_attention_heads:
            hooked.pop(Site.ATTN_Z, None)  # whoever names heads means those of a model that has as many in every layer
        for site, by_layer in hooked.items():
            widths.setdefault(site, {}).update(by_layer)
        self.info = ModelInfo(
            name=str(folder),
            architecture="PI0ForConditionalGeneration",
            n_layers=self.n_backbone + expert.num_hidden_layers,
            d_model=text.hidden_size,
            n_heads=text.num_attention_heads,
            d_head=text.head_dim,
            sites=widths,
        )

    def parts(self) -> dict[str, Any]:
        """What clients are told of the layers, beside ``info``."""
        n, heads, expert = self.n_backbone, self.info.n_heads, self.config.dit_config
        return {
            BACKBONE: {"layers": [0, n - 1], "tokens": "prompt", "d_model": self.info.d_model, "n_heads": heads},
            EXPERT: {
                "layers": [n, self.info.n_layers - 1],
                "tokens": "generated",
                "d_model": expert.hidden_size,
                "n_heads": expert.num_attention_heads,
                "steps": self.steps,
                "tokens_per_step": self.tokens,
            },
        }

    @torch.no_grad()
    def sample(self, jobs: Mapping[str, Pi0Prompt]) -> list[Floats]:
        """[chunk, max_action_dim] for each request, by its name, as the model puts them out."""
        prompts = list(jobs.values())
        ids, mask = self._padded([prompt.token_ids for prompt in prompts])
        pixels, state, noise = (
            torch.stack([getattr(prompt, name) for prompt in prompts]).to(self.device, self.dtype)
            for name in ("pixels", "state", "noise")
        )
        cameras = torch.ones(pixels.shape[:2], dtype=torch.bool, device=self.device)
        embedded = self.model.model.embed_prefix(ids, pixels, cameras)
        lengths = {name: len(prompt.token_ids) for name, prompt in jobs.items()}
        rows = [Scheduled(name, 0, i * ids.shape[1], n) for i, (name, n) in enumerate(lengths.items())]
        flat = ids.cpu().numpy().ravel()
        with self._told(rows, lambda row, n: flat[row : row + n]):
            cache = self.model.model.vlm(
                inputs_embeds=embedded,
                attention_mask=mask,
                position_ids=mask.cumsum(-1) - 1,
                token_type_ids=torch.zeros_like(embedded)[:, :, 0],  # all see each other
                use_cache=True,
            ).past_key_values
        prefix, dt = cache.get_seq_length(), -1.0 / self.steps
        for step in range(self.steps):
            time = torch.tensor(1.0 + step * dt, dtype=torch.float32, device=self.device).expand(len(jobs))
            rows = [
                Scheduled(name, n + step * self.tokens, i * self.tokens, self.tokens)
                for i, (name, n) in enumerate(lengths.items())
            ]
            with self._told(rows, _no_ids):
                velocity = self.model(
                    state=state, noise=noise, timestep=time, attention_mask=mask, past_key_values=cache
                ).logits
            cache.crop(prefix)  # no step sees another one's tokens
            noise = noise + dt * velocity
        return [made.double().cpu().numpy() for made in noise]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """[batch, longest] ids and the mask of those that are a prompt's, padded at the end."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
            mask[i, : len(prompt)] = 1
        return ids.to(self.device), mask.to(self.device)

    @contextmanager
    def _told(self, rows: Sequence[Scheduled], token_ids: Callable[[int, int], Ints]) -> Iterator[None]:
        """One pass, told to the runtime."""
        with self.lock:
            self.runtime.begin(rows, token_ids)
            try:
                yield
            finally:
                self.runtime.end()


def _no_ids(row: int, n: int) -> NDArray[np.int64]:
    """Action tokens have no ids."""
    return np.full(n, -1, np.int64)
