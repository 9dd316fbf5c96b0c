"""The ``steersman`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from steersman.server.commands import (
    assets,
    baseline,
    calibrate,
    chat,
    condition,
    detector,
    doctor,
    extract,
    neurons,
    resolve,
    robot,
    serve,
    trace,
)
from steersman.steering.errors import SteeringError

COMMANDS = {
    "serve": serve,
    "assets": assets,
    "chat": chat,
    "resolve": resolve,
    "extract": extract,
    "calibrate": calibrate,
    "trace": trace,
    "condition": condition,
    "neurons": neurons,
    "baseline": baseline,
    "detector": detector,
    "robot": robot,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code. Expected failures are one line on standard error."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="steersman", description="Steering inside vLLM's decoder layers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        assert module.__doc__
        sub = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        module.configure(sub)
    # `serve` passes on every option that it does not know itself.
    args, rest = parser.parse_known_args(given)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(COMMANDS[args.command].run(args, rest))
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


if __name__ == "__main__":
    sys.exit(main())
