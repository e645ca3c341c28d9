"""The command `rlflow`: arguments here and in rlflow.commands, work elsewhere."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from rlflow.console import say_error
from rlflow.failures import one_line

COMMANDS: tuple[str, ...] = ("train", "sweep", "suite", "compare", "pretrain", "eval", "sample", "export", "list")
COMMANDS += ("serve_reward", "demos", "plan", "doctor", "report", "bench")
"""In the order of `rlflow --help`; each is a file of rlflow.commands."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; user errors are one line and exit code 2, Ctrl-C is one line and 130."""
    args = parse(argv)
    args.main = main  # for processes that run the same command
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it warns of, a recipe's user cannot mend
    try:
        args.run_command(args)
    except BrokenPipeError:  # `rlflow list ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing more can be written
    except KeyboardInterrupt as stop:
        print(f"rlflow: {str(stop) or 'stopped'}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        message = None if args.debug else one_line(error)
        if message is None:
            raise
        say_error(message)
        raise SystemExit(2) from None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of one command; key=value overrides may stand anywhere after the recipe."""
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
    late = [word for word in extra if "=" in word and not word.startswith("-")]
    if unknown := [word for word in extra if word not in late or not hasattr(args, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def _parser() -> argparse.ArgumentParser:
    from rlflow import __version__

    parser = argparse.ArgumentParser(prog="rlflow", description="Reinforcement-learning fine-tuning of flow policies.")
    parser.add_argument("--version", action="version", version=f"rlflow {__version__}")
    parser.add_argument("--debug", action="store_true", help="full traceback of errors")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"rlflow.commands.{name}").add(commands)
    return parser
