"""Tiny random-weight checkpoints of every architecture the exactness tests run on.

`tiny_model("llama")` returns a folder with `config.json`, `model.safetensors` (float32) and a real byte-level
BPE tokenizer with a chat template. Folders are built once, deterministically, and cached; a folder is renamed
into place when complete, so that two processes may ask for the same one. Bump `VERSION` with any change that
alters a file's content.

    python -m tests.models.tiny [--out DIR] [NAME ...]

The weights are drawn so that each block changes the stream about as much as the embedding made it, attention is
neither flat nor one-hot and the logits spread over a few nats: an edit that is lost shows.

Sizes that a served engine needs: CPU attention takes head sizes from 32, its MLA kernel only a latent of
512 + 64, its MoE kernel widths divisible by 32; grouped routing wants `n_group` and `topk_group` as numbers.
"""

import argparse
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

VERSION = 2
VOCAB_SIZE = 512
MAX_POSITIONS = 512
N_LAYERS = 4
PAD, BOS, EOS = 0, 1, 2  # ids of the first three special tokens

# The last is what Qwen2's tokenizer class, forced by the model type, would otherwise add beyond the vocabulary
_SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_CORPUS = """
The helmsman turned the wheel and the ship came slowly about, away from the rocks and into the wind.
What is the capital of France? The capital of France is Paris, and the river that runs through it is the Seine.
She asked the robot to pick up the red block and place it on the blue plate near the window.
The weather today is calm and bright; tomorrow there will be rain in the north and snow on the hills.
You are a helpful assistant. Answer the question in one short sentence, please, and be polite.
Steering a model means adding a direction to what it thinks, at some layers and at some tokens.
I love this film: the story is warm, the music is lovely and the ending made me happy.
I hate this film: the story is cold, the music is awful and the ending made me angry.
How do I write a function that returns the sum of two numbers? def add(a, b): return a + b
One two three four five six seven eight nine ten, and then we count from the beginning again.
Bonjour, comment allez-vous ? Je vais très bien, merci, et vous ? Il fait beau aujourd'hui.
Once upon a time there was a small cat who lived in a big house with a very old man.
Move the arm forward, then up, then left; close the gripper, wait, and open the gripper again.
The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the garden.
"""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": N_LAYERS,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
# Grouped-query attention whose width (128) differs from the stream's (64)
_GQA: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
# Attention as wide as the stream, for architectures that know no `head_dim`
_SQUARE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_INTERLEAVED = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
_GEMMA: dict[str, Any] = {
    **_GQA,
    "intermediate_size": 160,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "layer_types": _INTERLEAVED,
}

# name -> (model_type, config fields beside _COMMON)
REGISTRY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GQA, "intermediate_size": 160, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**_SQUARE, "intermediate_size": 192, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GQA, "intermediate_size": 160, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GQA, "intermediate_size": 160, "sliding_window": None}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "phi3": (
        "phi3",
        {**_SQUARE, "intermediate_size": 192, "original_max_position_embeddings": MAX_POSITIONS},
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 64, "n_head": 2, "n_layer": N_LAYERS, "n_positions": MAX_POSITIONS, "n_inner": 160},
    ),
    "gpt_neox": ("gpt_neox", {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192}),
    "olmo2": ("olmo2", {**_SQUARE, "intermediate_size": 192}),
    "mixtral": (
        "mixtral",
        {**_GQA, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 160,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
    ),
}


def default_cache() -> Path:
    """Where checkpoints are kept when no folder is given."""
    return Path.home() / ".cache" / "steersman" / "tiny"


def tiny_model(name: str, cache: Path | None = None) -> Path:
    """The folder of the tiny checkpoint `name`, built on the first call."""
    if name not in REGISTRY:
        raise KeyError(f"no tiny model {name!r}; known: {', '.join(REGISTRY)}")
    target = (cache or default_cache()) / f"{name}-v{VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        build(name, work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def build(name: str, out: Path) -> None:
    """Write config, float32 weights and tokenizer of `name` into the folder `out`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = REGISTRY[name]
    common = dict(_COMMON)
    if model_type == "gpt2":  # has its own names for these, set in the registry
        common.pop("num_hidden_layers"), common.pop("max_position_embeddings")
    config = AutoConfig.for_model(model_type, **common, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed=zlib.crc32(name.encode()))
    if name == "deepseek_v2":
        _without_rotation(model)
    model.config.architectures = [type(model).__name__]
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    _tokenizer().save_pretrained(out)


@torch.no_grad()
def _without_rotation(model: torch.nn.Module) -> None:
    """Zeroes the rotary part of MLA's queries, in which vLLM 0.32 and transformers 5.19 differ.

    Without any plugin their logprobs for the random model differ by several units from the second token on, and
    agree to 1e-5 when that part is zero. What is compared is where the edits are made, not whose rotation is right.
    """
    for module in model.modules():
        if hasattr(module, "qk_nope_head_dim"):
            weight = module.q_proj.weight
            weight.view(-1, module.qk_head_dim, weight.shape[1])[:, module.qk_nope_head_dim :] = 0


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew from one generator, in the order of their names.

    Norm weights: 1 + 0.2·N; biases 0.1·N; embeddings and head 0.3·N; matrices 1.2·N/√fan_in, so that a unit-size
    input gives a unit-size output. Gemma multiplies its tied embeddings by √d_model and adds 1 to its norms'
    weights: there embeddings are 0.15·N, and norms stand at 2 behind attention, MLP and the last block, at 1 elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        if name.endswith("bias"):
            p.copy_(0.1 * noise)
        elif p.ndim == 1:
            inner = gemma and not ("post_" in name or name == "model.norm.weight")
            p.copy_((0.0 if inner else 1.0) + 0.2 * noise)
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            p.copy_((0.15 if gemma else 0.3) * noise)
        else:
            transposed = model.config.model_type == "gpt2"  # Conv1D keeps [in, out]
            fan_in = p.shape[0] if transposed else p.shape[-1]
            p.copy_(1.2 * noise / fan_in**0.5)
    model.tie_weights()


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries trained on the sentences above; it adds BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS.strip().splitlines(), trainer)
    if bpe.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the corpus gives {bpe.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    bpe.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=_SPECIAL[PAD],
        bos_token=_SPECIAL[BOS],
        eos_token=_SPECIAL[EOS],
        additional_special_tokens=_SPECIAL[EOS + 1 :],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def main(argv: Iterable[str] | None = None) -> None:
    """Build the named checkpoints (default: all) and print their folders."""
    parser = argparse.ArgumentParser(description="build tiny random-weight checkpoints")
    parser.add_argument("names", nargs="*", default=list(REGISTRY), metavar="NAME")
    parser.add_argument("--out", type=Path, default=default_cache())
    args = parser.parse_args(None if argv is None else list(argv))
    for name in args.names:
        print(tiny_model(name, args.out))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
