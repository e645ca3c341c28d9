"""serve-reward: one reward behind HTTP."""

from __future__ import annotations

import argparse
from typing import Any

from rlflow.commands.arguments import command, trust_flag
from rlflow.ranges import Port, Timeout, argument, filled


def add(commands: Any) -> None:
    """Enter the command."""
    p = command(commands, "serve-reward", _run, "Serve one reward to runs elsewhere (reward remote).")
    p.add_argument("name", type=filled, metavar="NAME", help="a name of `rlflow list rewards`")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="its settings, e.g. model=FOLDER")
    p.add_argument("--port", type=argument(Port), required=True, metavar="P", help="0 takes a free one")
    p.add_argument("--host", type=filled, default="127.0.0.1", help="default: this machine; others need a token")
    p.add_argument(
        "--token-env", type=filled, default="RLFLOW_REWARD_TOKEN", metavar="NAME", help="which holds the token"
    )
    p.add_argument("--timeout", type=argument(Timeout), default=60.0, metavar="S", help="seconds for one batch")
    trust_flag(p)


def _run(args: argparse.Namespace) -> None:
    from rlflow.config.values import set_value
    from rlflow.rewards.component import check_reward, make_reward
    from rlflow.rewards.remote.server import serve

    settings: dict[str, Any] = {}
    for assignment in args.overrides:
        set_value(settings, assignment)
    check_reward("reward", args.name, {args.name: settings}, args.trust_code)
    fn = make_reward(args.name, {args.name: settings}, args.trust_code)
    serve(args.name, fn, args.host, args.port, args.token_env, args.timeout)
