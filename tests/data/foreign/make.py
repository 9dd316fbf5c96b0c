"""Writes the files beside it with the real libraries, and what those libraries did with them on a tiny model.

    python -m venv V && V/bin/pip install numpy==1.26.4 transformers==4.45.1 torch==2.13.0 gguf==0.19.0 \
        "pyarrow<20" "datasets<4" scikit-learn accelerate evaluate matplotlib plotnine ipywidgets wandb
    V/bin/pip install --no-deps repeng==0.4.0 steering-vectors==0.12.2 pyreft==0.1.0 pyvene==0.1.8
    V/bin/python tests/data/foreign/make.py

The libraries do not install beside the project (numpy 1, transformers 4), hence an environment of their own. Written
are the tiny model with random weights, one file or folder for each format, and `expected.safetensors`:

| key | what |
|---|---|
| `ids` | the one sequence that every pass is run on |
| `logits.NAME` [T, V] | the pass edited by the library's own hook with the file NAME; `logits.plain` is not edited |
| `states` [2·n, L, d] | resid_post of the last token as repeng reads it, positive and negative in turn |
| `repeng.METHOD` [L, d], `steering_vectors.NAME` [L, d] | the directions that they make of `states` |

The formats whose projects are not in the registry (`.svec`, vLLM-Hook, EasySteer) are made to their documented schemas;
their edit is the one line that their code makes, written out in `by_hand`.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyreft
import repeng
import torch
from repeng.extract import batched_get_hiddens, read_representations
from safetensors.torch import save_file
from steering_vectors import train_steering_vector
from steering_vectors.aggregators import logistic_aggregator, mean_aggregator, pca_aggregator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
WORDS = ["the", "a", "cat", "dog", "sun", "rain", "is", "was", "very", "so", "happy", "sad", "glad", "angry", "warm"]
WORDS += ["cold", "calm", "loud", "day", "night", "good", "bad"]
LAYERS, D, SCALE = 4, 16, 1.5
T = 9

warnings.filterwarnings("ignore")
torch.manual_seed(0)


def tiny() -> tuple[Any, Any]:
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_input_names=names
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.5 if "embed" in name else 1.2 / parameter.shape[1] ** 0.5)
    return model, tokenizer


PAIRS = [
    (f"{a} {b} {c} {d} {e} happy", f"{a} {b} {c} {d} {e} sad")
    for a, b, c, d, e in zip(WORDS, WORDS[1:], WORDS[6:], WORDS[3:], WORDS[9:], strict=False)
]
PAIRS += [(p.replace("happy", "glad"), n.replace("sad", "angry")) for p, n in PAIRS]
model, tokenizer = tiny()
ids = torch.randint(2, len(WORDS), (1, T))
expected: dict[str, torch.Tensor] = {"ids": ids[0]}


def logits(run: Any = model) -> torch.Tensor:
    with torch.no_grad():
        return run(input_ids=ids).logits[0].clone()


def by_hand(name: str, rows: dict[int, torch.Tensor], where: str) -> None:
    """Adds SCALE·row at each layer's input or output, as the projects that cannot be installed do."""
    handles = []
    for layer, row in rows.items():
        block = model.model.layers[layer]
        if where == "input":
            added = block.register_forward_pre_hook(lambda _m, args, row=row: (args[0] + SCALE * row, *args[1:]))
        else:
            added = block.register_forward_hook(lambda _m, _a, out, row=row: (out[0] + SCALE * row, *out[1:]))
        handles.append(added)
    expected[f"logits.{name}"] = logits()
    for handle in handles:
        handle.remove()


def make_repeng() -> None:
    dataset = [repeng.DatasetEntry(positive=p, negative=n) for p, n in PAIRS]
    vector = repeng.ControlVector.train(model, tokenizer, dataset)
    vector.export_gguf(HERE / "repeng.gguf")
    controlled = repeng.ControlModel(model, list(vector.directions))
    controlled.set_control(vector, SCALE)
    expected["logits.repeng"] = logits(controlled)
    controlled.reset()
    controlled.unwrap()
    texts = [text for pair in PAIRS for text in pair]
    states = batched_get_hiddens(model, tokenizer, texts, list(range(LAYERS - 1)), 8)
    expected["states"] = torch.from_numpy(np.stack(list(states.values()), 1))
    for method in ("pca_diff", "pca_center"):
        made = read_representations(model, tokenizer, dataset, list(range(LAYERS - 1)), method=method)
        expected[f"repeng.{method}"] = torch.from_numpy(np.stack([made[i] for i in range(LAYERS - 1)]))


def make_steering_vectors() -> None:
    for layer_type in ("decoder_block", "self_attn", "mlp"):
        vector = train_steering_vector(model, tokenizer, PAIRS, layers=[0, 2, -1], layer_type=layer_type)
        torch.save(vector, HERE / f"steering_vectors_{layer_type}.pt")
        with vector.apply(model, multiplier=SCALE):
            expected[f"logits.steering_vectors_{layer_type}"] = logits()
    states = expected["states"]
    aggregators = {"mean": mean_aggregator(), "pca": pca_aggregator(), "logistic": logistic_aggregator({"tol": 1e-8})}
    for name, aggregate in aggregators.items():
        made = [aggregate(states[::2, i], states[1::2, i]) for i in range(states.shape[1])]
        expected[f"steering_vectors.{name}"] = torch.stack(made)


def make_loreft(name: str, layers: dict[int, str]) -> None:
    interventions = [
        {
            "layer": layer,
            "component": component,
            "low_rank_dimension": 2,
            "intervention": pyreft.LoreftIntervention(embed_dim=D, low_rank_dimension=2, dtype=torch.float32),
        }
        for layer, component in layers.items()
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=interventions), set_device=False)
    with torch.no_grad():
        everywhere = [[list(range(T))]] * len(layers)
        _, edited = reft({"input_ids": ids}, unit_locations={"sources->base": (None, everywhere)})
    expected[f"logits.{name}"] = edited.logits[0].clone()
    shutil.rmtree(HERE / name, ignore_errors=True)
    reft.save(str(HERE / name))


def make_by_schema() -> None:
    rows = {layer: torch.randn(D) for layer in range(LAYERS)}
    svec = {
        "model_type": "llama",
        "directions": {layer: row.tolist() for layer, row in rows.items()},
        "explained_variances": dict.fromkeys(rows, 0.5),
    }
    (HERE / "cast.svec").write_text(json.dumps(svec))
    by_hand("cast", {layer: row for layer, row in rows.items() if layer > 0}, "input")
    writer = gguf.GGUFWriter(HERE / "easysteer.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_string("controlvector.method", "diffmean")
    writer.add_uint32("controlvector.layer_count", LAYERS)
    writer.add_float32("controlvector.normalize", 1.0)
    writer.add_string("controlvector.token_pos", "-1")
    for layer, row in rows.items():
        writer.add_float32(f"controlvector.explained_variance.{layer}", float("nan"))
        writer.add_tensor(f"direction.{layer}", row.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    by_hand("easysteer", rows, "output")
    torch.save({"dir": rows[2].numpy(), "avg_proj": torch.tensor(0.75)}, HERE / "vllm_hook.pt")
    torch.save(rows[2], HERE / "tensor.pt")
    by_hand("vllm_hook", {2: rows[2]}, "output")


model.save_pretrained(HERE / "model")
expected["logits.plain"] = logits()
make_repeng()
make_steering_vectors()
make_loreft("loreft", {1: "block_output", 3: "block_output"})
make_loreft("loreft_input", {2: "block_input"})
make_loreft("loreft_path", {2: "model.layers[2].output"})
make_by_schema()
save_file({name: tensor.contiguous() for name, tensor in expected.items()}, HERE / "expected.safetensors")
