"""export: a LoRA, or a robot's policy, in the format of other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlflow.commands.arguments import command, trust_flag
from rlflow.ranges import filled

FORMATS = ("kohya", "peft", "plain", "lerobot")


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "export", _run, "Write a run's LoRA, or its LeRobot policy, as other programs read it.")
    p.add_argument("source", type=filled, metavar="RUN|MODEL", help="a run folder, or what rf.save wrote")
    p.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="kohya: ComfyUI, A1111; plain: no scale asked for; lerobot: a policy",
    )
    p.add_argument("--out", type=filled, required=True, metavar="DIR")
    trust_flag(p)


def _run(args: argparse.Namespace) -> None:
    if args.format == "lerobot":
        from rlflow.deploy.for_lerobot import export_policy

        print(export_policy(args.source, args.out, trust_code=args.trust_code))
        return
    from rlflow.deploy.runs import is_run
    from rlflow.models.pretrained.lora_formats import read_saved, write_as

    folder = Path(args.source) / "model" if is_run(args.source) else Path(args.source)
    print(write_as(read_saved(folder), Path(args.out), args.format))
