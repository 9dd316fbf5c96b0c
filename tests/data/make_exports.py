"""Writes `tests/data/dictionaries/exports.safetensors`: what SAELens computes with the folders that we export for it.

    pip install sae-lens==6.54.12
    PYTHONPATH=. python tests/data/make_exports.py

in an environment that has this project too. Every dictionary of `tests/data/dictionaries` is exported, loaded by
`SAE.load_from_disk` and run on the inputs of `expected.safetensors`: `<name>.acts` [n, m] and `<name>.out` [n, d_out].
`<name>.given.<tensor>` and the metadata `<name>` are the folder's weights and cfg.json, so that the tests can tell
whether today's export is what SAELens was given. To be run again when an export, or a dictionary, has changed.
"""

import tempfile
from pathlib import Path

import sae_lens
import torch
from safetensors.torch import load_file, save_file

from steersman.steering.formats import dictionary_files
from tests.steering.saes import EXPECTED, EXPORTS, NAMES, load


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    about = {"sae_lens": sae_lens.__version__}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            folder = Path(scratch) / "out"
            dictionary_files.to_folder(load(name, Path(scratch)), folder)
            about[name] = (folder / "cfg.json").read_text()
            given = load_file(folder / "sae_weights.safetensors")
            tensors |= {f"{name}.given.{key}": tensor for key, tensor in given.items()}
            sae = sae_lens.SAE.load_from_disk(folder)
            acts = sae.encode(EXPECTED[f"{name}.x"])
            tensors[f"{name}.acts"] = acts.contiguous()
            tensors[f"{name}.out"] = sae.decode(acts).contiguous()
    save_file(tensors, EXPORTS, about)
    EXPORTS.chmod(0o644)


if __name__ == "__main__":
    main()
