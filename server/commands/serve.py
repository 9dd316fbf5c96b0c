"""Serve a model: vLLM's OpenAI server with steering. Every option of `vllm serve` works as it does there.

On a CPU the model runs eagerly unless compilation is asked for (-O, --compilation-config or --no-enforce-eager):
it starts sooner so, and a layer that is not steered costs nothing. On a GPU vLLM's own default holds: compiled,
with CUDA graphs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import entry_points

from steersman.server.settings import Settings, variable

COMPILING = ("-O", "--compilation-config", "--enforce-eager", "--no-enforce-eager", "-cc", "--optimization-level")
ROUTED = "vllm.endpoint_plugins"
MEMORY = ("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--kv-cache-memory")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "steersman serve [--steering-... VALUE] MODEL [any option of vllm serve]"
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each of our settings."""
    for field in fields(Settings):
        flag = f"--steering-{field.name.replace('_', '-')}"
        text = f"{field.metadata['help']} [{variable(field.name)}]"
        if field.type == "bool":
            parser.add_argument(flag, dest=field.name, action="store_const", const="1", help=text)
        else:
            parser.add_argument(flag, dest=field.name, metavar=field.name.upper(), help=text)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings, which are put into the environment too. Raises SystemExit for wrong ones."""
    for field in fields(Settings):
        if (given := getattr(args, field.name)) is not None:
            os.environ[variable(field.name)] = given
    try:
        return Settings.from_env()
    except ValueError as error:
        raise SystemExit(f"steersman {args.command}: {error}") from None


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    settings_of(args)
    os.environ["VLLM_PLUGINS"] = ",".join(plugins(os.environ.get("VLLM_PLUGINS")))
    _vllm_serve(["serve", *rest, *defaults(rest, os.environ, on_cpu=_on_cpu())])
    return 0


def plugins(named: str | None) -> list[str]:
    """The plugins that vLLM may load: those that ``VLLM_PLUGINS`` names, and Steersman.

    Where it names none, vLLM loads all but those with HTTP routes; once it names one, only that.
    """
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        every = entry_points()
        groups = [group for group in every.groups if group.startswith("vllm.") and group.endswith("_plugins")]
        routed = every.select(group=ROUTED).names
        names = sorted({p.name for group in groups for p in every.select(group=group)} - routed)
    return list(dict.fromkeys([*names, "steersman"]))


def defaults(options: Sequence[str], env: dict[str, str] | os._Environ[str], *, on_cpu: bool) -> list[str]:
    """Options added where the user has not said otherwise; on a CPU, may set the KV cache's size in ``env``."""
    names = [o.partition("=")[0].partition(".")[0].replace("_", "-") for o in options]
    if on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in env and not any(n in MEMORY for n in names):
        env["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB; vLLM's own share of all memory may be more than is free
    compiles = any(n in COMPILING or n.startswith("-O") for n in names)
    return ["--enforce-eager"] if on_cpu and not compiles else []


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _vllm_serve(argv: list[str]) -> None:
    """What ``vllm serve`` does, without its version look-up, which fails where vLLM is installed as vllm-cpu."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    except ImportError:  # vLLM before 0.27
        from vllm.entrypoints.utils import cli_env_setup

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="steersman")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(argv)
    command.validate(args)
    command.cmd(args)
