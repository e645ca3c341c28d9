"""The command `rlflow`: arguments here, work elsewhere; heavy modules load only when a command needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlflow.arguments import command, json_flag, positive, recipe_argument, trust_flag
from rlflow.console import print_json, say_error, user_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; user errors are one line and exit code 2."""
    args = parse(argv)
    try:
        args.run_command(args)
    except BrokenPipeError:  # `rlflow list ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing more can be written
    except user_errors() as error:
        if getattr(args, "debug", False):
            raise
        say_error(error)
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
    make, look = (_train, _sweep, _compare, _pretrain), (_plan, _doctor, _report, _bench, _serve_reward)
    for add in (*make, _eval, _sample, _list, *look):
        add(commands)
    return parser


# -- train ----------------------------------------------------------------------------------------


def _train(commands: Any) -> None:
    p = command(commands, "train", _run_train, "Fine-tune a policy with a recipe.")
    recipe_argument(p)
    p.add_argument("--run", metavar="DIR", help="run folder (default runs/RECIPE-TIME)")
    p.add_argument("--resume", metavar="last|PATH", help="continue the run in --run from a checkpoint")
    p.add_argument("--seeds", metavar="0,1,2", help="one run per seed, in DIR/seed-N")
    p.add_argument("--processes", type=positive, default=1, metavar="N", help="share each iteration among N processes")
    p.add_argument("--quiet", action="store_true", help="no progress display")
    trust_flag(p)


def _run_train(args: argparse.Namespace) -> None:
    if args.resume and not args.run:
        raise ValueError("--resume needs --run DIR, the folder of the run to continue")
    seeds = None if args.seeds is None else _seeds(args.seeds)
    if args.processes > 1:
        _train_shared(args)
        return
    from rlflow import dist

    try:
        if seeds is None:
            _train_one(args, args.run, args.overrides, args.resume)
        else:
            _train_seeds(args, seeds)
    finally:
        dist.stop()  # once: processes that leave the group between two seeds do not find each other again


def _seeds(text: str) -> list[int]:
    """The numbers of "0,1,2", each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise ValueError(f"--seeds {text!r}: write whole numbers with commas between them, each once, as in 0,1,2")
    return [int(word) for word in words]


def _train_seeds(args: argparse.Namespace, seeds: list[int]) -> None:
    """One run after the other; a signal ends all. With --resume last those that have not begun are begun."""
    base = Path(args.run or f"runs/{Path(args.recipe).stem}")
    folders = {seed: base / f"seed-{seed}" for seed in seeds}
    begun = {seed for seed, folder in folders.items() if (folder / "config.yaml").exists()}
    for seed, folder in folders.items():
        resume = None if args.resume == "last" and begun and seed not in begun else args.resume
        if _train_one(args, folder, [*args.overrides, f"train.seed={seed}"], resume):
            return


def _train_shared(args: argparse.Namespace) -> None:
    from rlflow import dist, recipes
    from rlflow.train.trainer import default_run

    recipes.load(args.recipe, args.overrides, args.trust_code)  # an error is said once
    words = args.words if args.run else [*args.words, "--run", str(default_run(args.recipe))]
    dist.launch(args.processes, main, [*words, "--processes", "1"])


def _train_one(args: argparse.Namespace, run: Path | str | None, overrides: list[str], resume: str | None) -> bool:
    """Train one run; True when it was interrupted."""
    from rlflow.train.trainer import Trainer

    trainer = Trainer(
        args.recipe, run, overrides=overrides, resume=resume, trust_code=args.trust_code, quiet=args.quiet
    )
    trainer.fit()
    if os.environ.get("RANK", "0") == "0":
        state = "stopped by a signal, resume with --resume last" if trainer.interrupted else "finished"
        print(f"{state}: {trainer.iteration} iterations, {trainer.seconds:.0f} s of training; run folder {trainer.run}")
    return trainer.interrupted


def _sweep(commands: Any) -> None:
    p = command(commands, "sweep", _run_sweep, "Run a table of recipes and seeds; prints the plan and its cost first.")
    p.add_argument("table", metavar="TABLE.yaml")
    p.add_argument("--run", metavar="DIR", required=True, help="folder of all runs; finished ones are skipped")
    p.add_argument("--jobs", type=positive, default=None, help="processes side by side")
    p.add_argument("--dry", action="store_true", help="print the plan and its cost only")
    trust_flag(p)


def _run_sweep(args: argparse.Namespace) -> None:
    from rlflow.train.sweep import run_sweep

    run_sweep(Path(args.table), Path(args.run), dry=args.dry, jobs=args.jobs, trust_code=args.trust_code)


def _compare(commands: Any) -> None:
    p = command(commands, "compare", _run_compare, "Compare runs: last evaluation, cost, paired differences.")
    p.add_argument("runs", nargs="+", metavar="RUN")
    json_flag(p)


def _run_compare(args: argparse.Namespace) -> None:
    from rlflow.train.compare import compare, print_comparison

    result = compare([Path(r) for r in args.runs])
    print_json(result) if args.json else print_comparison(result)


def _pretrain(commands: Any) -> None:
    p = command(
        commands, "pretrain", _run_pretrain, "Pre-train an embedded model from data the program draws or plays."
    )
    p.add_argument("world", metavar="NAME", help="shapes, words, robot_bc_hopper, ...")
    p.add_argument("rest", nargs=argparse.REMAINDER, metavar="--steps N --seed N --out DIR ...")


def _run_pretrain(args: argparse.Namespace) -> None:
    from rlflow.registry import nearest
    from rlflow.train.worlds import WORLDS
    from rlflow.train.worlds import main as pretrain

    if args.world not in WORLDS:
        raise ValueError(f"unknown world {args.world!r}{nearest(args.world, WORLDS)}")
    pretrain(WORLDS[args.world], args.rest)


# -- use ------------------------------------------------------------------------------------------


def _eval(commands: Any) -> None:
    p = command(commands, "eval", _run_eval, "Evaluate a run or a checkpoint on held-out prompts, noise off.")
    p.add_argument("source", metavar="RUN|CHECKPOINT", help="a run folder, a checkpoint folder, or shapes / words")
    p.add_argument("--steps", type=positive, metavar="K", help="denoising steps")
    p.add_argument("--solver", metavar="NAME")
    p.add_argument("--seed", type=int, default=None, help="of the initial noise")
    p.add_argument("--num", type=positive, help="number of samples")
    _which_weights(p)
    trust_flag(p)
    json_flag(p)


def _run_eval(args: argparse.Namespace) -> None:
    from rlflow.train.runs import evaluator_of

    evaluator = evaluator_of(
        args.source,
        num=args.num,
        num_steps=args.steps,
        solver=args.solver,
        seed=args.seed,
        checkpoint=args.checkpoint,
        weights=args.weights,
        trust_code=args.trust_code,
    )
    result = evaluator()
    means = {f"eval/heldout/{name}": value for name, value in result.means().items()}
    means |= {f"eval/task/{name}": value for name, value in result.by_task().items()}
    if args.json:
        print_json({"samples": len(result), **means})
        return
    print(f"{result.about}, deployment sampler")
    width = max(28, *(len(name) for name in means))
    for name, value in means.items():
        print(f"  {name:{width}s} {value:.4f}")


def _sample(commands: Any) -> None:
    p = command(commands, "sample", _run_sample, "Images of a run or a checkpoint, or a film of a robot's episodes.")
    p.add_argument("source", metavar="RUN|CHECKPOINT")
    p.add_argument("--prompt", action="append", default=[], help="of images; may be repeated")
    p.add_argument("--out", required=True, metavar="x.png|x.mp4")
    p.add_argument("--num", type=positive, default=4, help="images per prompt, or episodes")
    p.add_argument("--steps", type=positive, metavar="K", help="denoising steps")
    p.add_argument("--seed", type=int, default=0)
    _which_weights(p)
    trust_flag(p)


def _which_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="last", help="of a run: last, best or an iteration")
    parser.add_argument("--weights", choices=["live", "ema"], help="of a run; default: the ones it evaluates")


def _run_sample(args: argparse.Namespace) -> None:
    from rlflow.train.figures import image_grid
    from rlflow.train.runs import judging_config, load, sample

    env = judging_config(args.source, args.trust_code).env.name
    if env != "prompt":
        if args.prompt:
            raise ValueError(f"--prompt: {args.source} takes no text, it acts in {env}; leave it out")
        _film(args)
        return
    if not args.prompt:
        raise ValueError(f"{args.source} makes images: say of what, with --prompt")
    if Path(args.out).suffix != ".png":
        raise ValueError(f"{args.out}: {args.source} makes images, name a file that ends in .png")
    policy = load(args.source, checkpoint=args.checkpoint, weights=args.weights, trust_code=args.trust_code)
    prompts = [text for text in args.prompt for _ in range(args.num)]
    images = sample(policy, prompts, seed=args.seed, num_steps=args.steps)
    image_grid(images, prompts, Path(args.out))
    print(f"{len(prompts)} images in {args.out}")


def _film(args: argparse.Namespace) -> None:
    from rlflow.train.runs import film

    episodes = film(
        args.source,
        args.out,
        num=args.num,
        num_steps=args.steps,
        seed=args.seed,
        checkpoint=args.checkpoint,
        weights=args.weights,
        trust_code=args.trust_code,
    )
    for row in range(len(episodes)):
        print(f"episode {row}: " + ", ".join(f"{name} {float(v[row]):,.4g}" for name, v in episodes.scores.items()))
    print(f"{len(episodes)} episodes in {args.out}")


KINDS = {"kernels": "kernel", "solvers": "solver", "grids": "grid", "steps": "steps", "guidance": "guidance"}
KINDS |= {"likelihoods": "likelihood", "advantages": "advantage", "algorithms": "algorithm", "models": "model"}
KINDS |= {"rewards": "reward", "envs": "env", "policies": "policy"}
"""What `rlflow list` knows besides recipes, by kind of component."""


def _list(commands: Any) -> None:
    p = command(commands, "list", _run_list, "What can be named in a recipe.")
    p.add_argument("kind", choices=("recipes", *KINDS))
    json_flag(p)


def _run_list(args: argparse.Namespace) -> None:
    from rlflow.registry import about

    rows = _recipes() if args.kind == "recipes" else about(KINDS[args.kind])
    if args.json:
        print_json(rows)
        return
    width = max(len(name) for name in rows)
    for name, text in rows.items():
        print(f"{name:{width}s}  {text}")


def _recipes() -> dict[str, str]:
    from rlflow import recipes

    return {name: str(recipes.read(name).get("about", "")) for name in recipes.names()}


# -- look -----------------------------------------------------------------------------------------


def _doctor(commands: Any) -> None:
    p = command(commands, "doctor", _run_doctor, "Check a recipe: ratios, kappa, gradients, resume, cost.")
    recipe_argument(p)
    trust_flag(p)
    json_flag(p)


def _run_doctor(args: argparse.Namespace) -> None:
    from rlflow import recipes
    from rlflow.train.doctor import checks_as_json, doctor, print_checks

    checks = doctor(recipes.load(args.recipe, args.overrides, args.trust_code), args.trust_code)
    print_json(checks_as_json(checks)) if args.json else print_checks(checks)
    if any(check.passed is False for check in checks):
        raise SystemExit(1)


def _plan(commands: Any) -> None:
    p = command(commands, "plan", _run_plan, "Network evaluations, memory and time of a recipe, before it starts.")
    recipe_argument(p)
    p.add_argument("--gpu", default="24GB", metavar="24GB|NAME", help="memory of a GPU, or its name, as rtx4090")
    p.add_argument("--gpus", type=positive, default=1, metavar="N", help="processes, a GPU each")
    trust_flag(p)
    json_flag(p)


def _run_plan(args: argparse.Namespace) -> None:
    from rlflow import recipes
    from rlflow.train.gpus import find_gpu
    from rlflow.train.plan import Planner, plan_as_json, print_plan

    gpu, config = find_gpu(args.gpu), recipes.load(args.recipe, args.overrides, args.trust_code)
    planner = Planner(config, args.trust_code)
    print_json(plan_as_json(planner, gpu, args.gpus)) if args.json else print_plan(planner, gpu, args.gpus)


def _report(commands: Any) -> None:
    p = command(commands, "report", _run_report, "Write RUN/report.html again.")
    p.add_argument("run", metavar="RUN")


def _run_report(args: argparse.Namespace) -> None:
    from rlflow.train.report import write_report

    print(f"Report: {write_report(Path(args.run)).resolve()}")


def _bench(commands: Any) -> None:
    p = command(commands, "bench", _run_bench, "Time training iterations against bare network passes.")
    p.add_argument("what", choices=["t2i", "robot"])
    p.add_argument("--paper", action="store_true", help="robot: the published size too, and a plain loop as its peer")
    json_flag(p)


def _run_bench(args: argparse.Namespace) -> None:
    if args.what == "robot":
        from rlflow.train.bench_robot import bench_robot

        result = bench_robot(args.paper)
    else:
        from rlflow.train.bench import bench_t2i

        result = bench_t2i()
    if args.json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")


# -- serve ----------------------------------------------------------------------------------------


def _serve_reward(commands: Any) -> None:
    p = command(commands, "serve-reward", _run_serve_reward, "Serve one reward to runs elsewhere (reward remote).")
    p.add_argument("name", metavar="NAME", help="a name of `rlflow list rewards`")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="its settings, e.g. model=FOLDER")
    p.add_argument("--port", type=int, required=True, metavar="P", help="0 takes a free one")
    p.add_argument("--host", default="127.0.0.1", help="default: this machine alone; others need a token")
    p.add_argument("--token-env", default="RLFLOW_REWARD_TOKEN", metavar="NAME", help="variable that holds the token")
    p.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one batch")
    trust_flag(p)


def _run_serve_reward(args: argparse.Namespace) -> None:
    from rlflow.config import set_value
    from rlflow.rewards.component import check_reward, make_reward
    from rlflow.rewards.serve import serve

    settings: dict[str, Any] = {}
    for assignment in args.overrides:
        set_value(settings, assignment)
    check_reward("reward", args.name, {args.name: settings}, args.trust_code)
    fn = make_reward(args.name, {args.name: settings}, args.trust_code)
    serve(args.name, fn, args.host, args.port, args.token_env, args.timeout)
