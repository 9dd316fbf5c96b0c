"""Writes `tests/data/sparsify`: small dictionaries as EleutherAI's sparsify saves them, and what it computes with them.

    pip install eai-sparsify==1.3.3
    SPARSIFY_DISABLE_TRITON=1 python tests/data/make_sparsify.py

`expected.safetensors` holds for each the inputs `<name>.x` [n, d] and the library's own activations, all of them,
`<name>.acts` [n, m] and reconstructions `<name>.out` [n, d].
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

OUT = Path(__file__).parent / "sparsify"
D, M, N, K = 8, 20, 24, 4


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(0)
    expected: dict[str, torch.Tensor] = {}
    for name, transcode in (("layers.2", False), ("layers.1.mlp", True)):
        coder = SparseCoder(D, SparseCoderConfig(num_latents=M, k=K, transcode=transcode, skip_connection=transcode))
        for parameter in coder.parameters():
            parameter.data = torch.randn(parameter.shape) / (1 if parameter.dim() > 1 else 3)
        coder.save_to_disk(OUT / name)
        coder = SparseCoder.load_from_disk(OUT / name)  # what is compared is what a user of the file gets
        x = torch.randn(N, D)
        with torch.no_grad():
            found = coder.encode(x)
            out = coder.decode(found.top_acts, found.top_indices)
        acts = torch.zeros(N, M).scatter(1, found.top_indices, found.top_acts)
        expected |= {f"{name}.x": x, f"{name}.acts": acts, f"{name}.out": out}
    save_file(expected, OUT / "expected.safetensors")


if __name__ == "__main__":
    main()
