"""What the arguments of several commands have in common."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlflow.ranges import filled

if TYPE_CHECKING:
    from rlflow.deploy.runs import Asked
    from rlflow.ranges import Spec


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    """A subcommand whose arguments `run` is called with."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=run)
    return parser


def trust_flag(parser: argparse.ArgumentParser) -> None:
    """--trust-code."""
    parser.add_argument("--trust-code", action="store_true", help="allow components named by dotted path (module:name)")


def json_flag(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def recipe_argument(parser: argparse.ArgumentParser) -> None:
    """RECIPE and overrides."""
    parser.add_argument("recipe", type=filled, metavar="RECIPE|FILE", help="of `rlflow list recipes`, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.minutes=2 env.group_size=8")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def which_weights(parser: argparse.ArgumentParser) -> None:
    """--checkpoint and --weights of a run."""
    parser.add_argument("--checkpoint", type=filled, default="last", help="of a run: last, best or an iteration")
    parser.add_argument("--weights", choices=["live", "ema"], help="of a run; default: the ones it evaluates")


def best_of_flags(parser: argparse.ArgumentParser) -> None:
    """--best-of and --scorer."""
    parser.add_argument(
        "--best-of", type=positive, metavar="N", help="make N of each and keep the one that scores best"
    )
    parser.add_argument("--scorer", type=filled, metavar="NAME", help="a reward's name, or critic: of that run of sac")


def chosen(args: argparse.Namespace) -> dict[str, Any] | None:
    """`policy.select` as the flags say it; None without them."""
    if (args.best_of is None) != (args.scorer is None):
        raise ValueError("--best-of N and --scorer NAME go together: give both or none")
    return None if args.best_of is None else {"name": "best_of", "num": args.best_of, "scorer": args.scorer}


def asked(args: argparse.Namespace, select: Spec | None = None) -> Asked:
    """What the flags of a command say of how a run or a checkpoint is evaluated."""
    from rlflow.deploy.runs import Asked

    names = {field.name for field in dataclasses.fields(Asked)}
    return Asked(**{name: value for name, value in vars(args).items() if name in names}, select=select)
