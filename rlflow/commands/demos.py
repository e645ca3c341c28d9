"""demos: demonstrations from other programs' datasets, what is in them, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import asked, command, json_flag, positive, trust_flag, which_weights
from rlflow.ranges import Natural, Seed, argument, filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = commands.add_parser("demos", help="Import, look at and export demonstrations.", description=__doc__)
    parts = p.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_import(parts)
    p = command(parts, "info", _info, "What a folder of demonstrations, or another program's dataset, holds.")
    p.add_argument("folder", type=Path, metavar="FOLDER|DATASET")
    json_flag(p)
    p = command(parts, "show", _show, "One episode: a film of its pictures (.mp4), or curves of its numbers (.png).")
    p.add_argument("folder", type=Path, metavar="FOLDER|DATASET")
    p.add_argument("--episode", type=argument(Natural), default=0, metavar="N")
    p.add_argument("--out", type=Path, required=True, metavar="x.mp4|x.png")
    p.add_argument("--name", type=filled, help="of the pictures, where there are several")
    _add_record(parts)
    _add_export(parts)


def _add_record(parts: Any) -> None:
    p = command(parts, "record", _record, "Demonstrations by a robot's run or checkpoint, an episode from each seed.")
    p.add_argument("source", type=filled, metavar="RUN|CHECKPOINT")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--num", type=positive, default=32, help="episodes")
    p.add_argument("--seed", type=argument(Seed), default=0)
    which_weights(p)
    trust_flag(p)


def _add_export(parts: Any) -> None:
    p = command(parts, "export", _export, "Demonstrations as a dataset of LeRobot v3 or Minari.")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    p.add_argument("--format", choices=["lerobot", "minari"], required=True)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--fps", type=positive, help="default: as imported, or the environment's")
    p.add_argument("--task", type=filled, metavar="TEXT", help="what the robot was to do; default: as imported")
    p.add_argument("--id", type=filled, metavar="NAMESPACE/NAME-v0", help="for Minari")
    trust_flag(p)


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


def _show(args: argparse.Namespace) -> None:
    from rlflow.datasets.show import show

    print(show(args.folder, args.out, args.episode, args.name))


def _record(args: argparse.Namespace) -> None:
    from rlflow.deploy.record import record

    demos = record(args.source, args.out, asked(args), "rlflow " + " ".join(args.words))
    print(f"{args.out}: {demos.summary}; rlflow demos export gives them to others")


def _export(args: argparse.Namespace) -> None:
    from rlflow.datasets.out import export_demos
    from rlflow.datasets.to_lerobot import ToLeRobot
    from rlflow.datasets.to_minari import ToMinari

    if args.id is not None and args.format != "minari":
        raise ValueError("--id: LeRobot's datasets are known by their folder; leave it out")
    writer = ToMinari(args.id) if args.format == "minari" else ToLeRobot()
    demos = export_demos(args.folder, args.out, writer, args.fps, args.task, args.trust_code)
    print(f"{args.out}: {len(demos.episodes)} episodes for {args.format}")
