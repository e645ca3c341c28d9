"""demos: demonstrations from other programs' datasets, what is in them, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import command, json_flag, positive, trust_flag
from rlflow.ranges import filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = commands.add_parser("demos", help="Import, look at and export demonstrations.", description=__doc__)
    parts = p.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_import(parts)
    p = command(parts, "info", _info, "What a folder of demonstrations, or another program's dataset, holds.")
    p.add_argument("folder", type=Path, metavar="FOLDER|DATASET")
    json_flag(p)


def _add_import(parts: Any) -> None:
    p = command(parts, "import", _import, "Demonstrations from a dataset of LeRobot, Minari, robomimic, OGBench, ...")
    p.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder, .hdf5, .npz or .parquet; `info` shows its columns"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help="env.settings.NAME=VALUE, as in a config")
    p.add_argument("--env", type=filled, metavar="NAME", help="environment; default: the one that the dataset names")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--obs", action="append", default=[], type=filled, metavar="[NAME=]COLUMN[+COLUMN]")
    p.add_argument("--action", type=filled, metavar="COLUMN")
    p.add_argument("--reward", type=filled, metavar="COLUMN")
    p.add_argument("--units", choices=["env", "unit"], default="env", help="actions: the environment's own, or [-1, 1]")
    p.add_argument("--clip", action="store_true", help="clip actions to the bounds")
    p.add_argument("--convert", choices=["delta", "absolute", "keep"], help="actions to changes, or to targets")
    p.add_argument("--state", type=filled, metavar="COLUMN[0:N]", help="what the actions move, for --convert")
    p.add_argument("--resize", action="store_true", help="scale pictures to the environment's size")
    p.add_argument("--episodes", type=positive, metavar="N", help="the first N only")
    trust_flag(p)


def _import(args: argparse.Namespace) -> None:
    from rlflow.config.values import set_value
    from rlflow.datasets.acting import Options
    from rlflow.datasets.bring import import_demos

    asked: dict[str, Any] = {"env": {"name": args.env} if args.env else {}}
    for assignment in args.overrides:
        set_value(asked, assignment)
    if set(asked) - {"env"} or set(asked["env"]) - {"name", "settings"}:
        raise ValueError("demos import takes env.name and env.settings.NAME=VALUE, and no other part of a config")
    if asked["env"] and "name" not in asked["env"]:
        raise ValueError("env.settings: say of which environment, with --env NAME")
    names = ("obs", "action", "reward", "units", "clip", "convert", "state", "resize", "episodes", "trust_code")
    options = Options(**{name: getattr(args, name) for name in names})
    demos = import_demos(args.source, args.out, asked["env"] or None, options, "rlflow " + " ".join(args.words))
    for note in demos.about["made_by"]["notes"]:
        print(f"note: {note}")
    print(f"{args.out}: {demos.summary}; rlflow pretrain robot_bc --demos {args.out} clones them")


def _info(args: argparse.Namespace) -> None:
    from rlflow.console import print_json
    from rlflow.datasets.info import info, lines

    found = info(args.folder)
    if args.json:
        print_json(found)
        return
    print("\n".join(lines(found)))
