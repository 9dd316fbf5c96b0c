"""The ``steersman`` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from steersman.steering.errors import SteeringError

COMMANDS = (
    "serve", "serve-policy", "assets", "chat", "resolve", "extract", "select", "calibrate", "trace", "condition",
    "neurons", "baseline", "detector", "eval", "robot", "doctor",
)  # fmt: skip
"""Each is a module of ``server/commands``; only the one that is asked for is imported, as a robot has no torch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code. Expected failures are one line on standard error."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="steersman", description="Steering inside vLLM's decoder layers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: _module(name) for name in ([given[0]] if given and given[0] in COMMANDS else COMMANDS)}
    for name, module in modules.items():
        assert module.__doc__
        sub = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        module.configure(sub)
    # `serve` passes on every option that it does not know itself.
    args, rest = parser.parse_known_args(given)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(modules[args.command].run(args, rest))
    except SteeringError as error:
        where = f" ({error.param})" if error.param else ""
        print(f"steersman: {error.message}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"steersman: {error}", file=sys.stderr)
        return 1


def _module(name: str) -> Any:
    return importlib.import_module(f"steersman.server.commands.{name.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
