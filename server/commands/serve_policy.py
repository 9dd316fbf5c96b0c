"""Serve a π0: a robot policy that acts by flow matching, which vLLM does not run. Steered as the others are.

The model runs in this process, with Transformers. Robots reach it on /v1/actions, /act and openpi's WebSocket.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from steersman.server.commands.serve import add_settings, settings_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder with the checkpoint")
    parser.add_argument("--host", default="0.0.0.0", help="[%(default)s]")
    parser.add_argument("--port", type=int, default=8000, help="[%(default)s]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[%(default)s]")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="[%(default)s]")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="observations in one batch [%(default)s]")
    parser.add_argument("--api-key", action="append", help="that robots need; may be repeated [VLLM_API_KEY]")
    parser.add_argument("--served-model-name", action="append", help="another name that assets may be made for")
    add_settings(parser)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    settings = settings_of(args)
    if args.max_num_seqs < 1:
        raise SystemExit("steersman serve-policy: --max-num-seqs must be at least 1")
    import uvicorn

    from steersman.server.pi0 import app

    device = app.chosen_device(args.device)
    try:
        made = app.build(
            args.model,
            settings,
            device=device,
            dtype=app.chosen_dtype(args.dtype, device),
            limit=args.max_num_seqs,
            api_keys=args.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key],
            aliases=tuple(args.served_model_name or ()),
        )
    except ValueError as error:
        raise SystemExit(f"steersman serve-policy: {error}") from None
    uvicorn.run(made, host=args.host, port=args.port, log_level="warning")
    return 0
