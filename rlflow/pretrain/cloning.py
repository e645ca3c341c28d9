"""Behaviour cloning of robots: a flow policy of action chunks that is matched to demonstrations.

What comes out is a checkpoint folder whose "made_by" names the command, the data, the loss on held-out episodes
and the mean return in the environment beside that of the demonstrations.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlflow import registry
from rlflow.envs.base import VecEnv, told_scores
from rlflow.envs.checked import Checked
from rlflow.envs.demos.dataset import Chunks, Demos
from rlflow.envs.demos.demonstrators import demonstrator, make_demos
from rlflow.envs.demos.identity import check_alike, differences
from rlflow.envs.simulators.tabletop import LENGTH, PIXELS, WORDS
from rlflow.envs.targets import Targeted
from rlflow.flow.field import VelocityField
from rlflow.flow.grid import uniform_times
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.matching import Coupling, MatchingLoss, Scheduled, cfm_loss, independent, minibatch_ot
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import save_field
from rlflow.models.scratch import fit_normalizers, scratch
from rlflow.models.vla import VLA
from rlflow.pretrain.matching import pretrain, report
from rlflow.ranges import Size, argument, filled

COUPLINGS: dict[str, Coupling] = {"independent": independent, "ot": minibatch_ot}
GAMMA = 0.99
"""Of the environment that judges, whose returns are not discounted."""
DIGITS = {"return": 1, "success": 3}
"""Of the scores that are kept."""


@dataclass(frozen=True)
class Cloning:
    """One policy to make; few_steps.py has those that are also good at few denoising steps."""

    name: str
    env: str
    steps: int = 3000
    num_steps: int = 4  # K at which it is judged
    chunk: int = 4
    rows: int = 512  # of a batch
    lr: float = 1e-3
    muon_lr: float = 6e-3  # of the matrices that Muon trains
    average: float = 0.998  # decay of the weight average
    judged: int = 64  # episodes
    num_demos: int | None = None  # episodes, where they have to be made; default: the demonstrator's
    drop: float = 0.0  # share of rows whose condition is hidden, for guidance
    shown_by: str = ""  # demonstrator; default: the environment's own
    hold_out: int = 10  # every so many-th episode is kept for validation

    @property
    def asset(self) -> str:
        """Its folder."""
        return self.env

    @property
    def loss(self) -> MatchingLoss | Scheduled:
        """What is minimised."""
        return cfm_loss

    @property
    def judged_at(self) -> dict[str, int]:
        """Numbers of denoising steps that the policy is judged at, by what is behind the names of its scores."""
        return {"": self.num_steps}

    @property
    def demonstrator(self) -> str:
        """Name of who shows it."""
        return self.shown_by or self.env

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Options of this kind of data."""
        parser.add_argument("--demos", type=filled, default=f"demos/{self.demonstrator}", help="folder; made if absent")
        self.add_common(parser)

    def add_common(self, parser: argparse.ArgumentParser) -> None:
        """Options of all data."""
        parser.add_argument("--judged", type=argument(Size), default=self.judged, help="episodes played in the end")
        parser.add_argument("--coupling", choices=COUPLINGS, default="independent")

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """Clone the demonstrations, judge the policy and save it in `out`; returns config.json's "made_by"."""
        settings = demonstrator(self.demonstrator).settings
        demos = demos_of(self.env, Path(args.demos), settings, num=self.num_demos, by=self.demonstrator)
        return self.make_of(demos, out, args)

    def make_of(self, demos: Demos, out: Path, args: argparse.Namespace, trust_code: bool = False) -> dict[str, Any]:
        """The same of demonstrations in hand; whatever they do not fit is said before anything is learnt."""
        world = self.world(demos, trust_code)
        env = make_env(world, args.judged, trust_code)
        check_alike(str(demos.folder), demos.obs_spec, demos.action_shape, env.unwrapped)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        field, validation = self.clone(demos, args.steps, args.seed, COUPLINGS[args.coupling])
        seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}
        made_by = {
            "command": f"rlflow pretrain {self.name} --steps {args.steps} --seed {args.seed}"
            f" --judged {args.judged} --coupling {args.coupling}{self.options(args)}",
            "seed": args.seed,
            "steps": args.steps,
            **{name: round(value) for name, value in seconds.items()},
            "threads": torch.get_num_threads(),
            "validation_loss": round(validation, 4),
            **self.judge(field, env),
            "demonstrations": {**demos.figures, **demos.about["made_by"]},
        }
        judged_by = {"policy": {"num_steps": self.num_steps}, "env": world}
        save_field(field, out, made_by, judged_by)
        return made_by

    def options(self, args: argparse.Namespace) -> str:
        """Of the command that makes the same, beyond those of all."""
        return ""

    def world(self, demos: Demos, trust_code: bool = False) -> dict[str, Any]:
        """Name and settings of the environment, with the chunk of this policy."""
        name, settings = demos.env["name"], dict(demos.env.get("settings", {}))
        known = registry.settings(registry.find("env", name, trust_code))
        usual = known["chunk"].default if "chunk" in known else 1
        if self.chunk != usual and "chunk" not in known:
            raise ValueError(f"env {name} takes no chunks of actions: use --chunk 1")
        settings.pop("chunk", None)
        if self.chunk != usual:
            settings["chunk"] = self.chunk
        return {"name": name, "settings": settings} if settings else {"name": name}

    def chunks(self, demos: Demos) -> Chunks:
        """What is learnt from."""
        return demos.chunks(self.chunk)

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """What will be trained, and which of its matrices by Muon."""
        return self.multilayer(demos), []

    def multilayer(self, demos: Demos, average: bool = False) -> VelocityField:
        """A multilayer perceptron, behind an encoder where there is a picture; `average` reads dt."""
        shape = (self.chunk, *demos.action_shape)
        field = scratch(shape, demos.obs_spec, width=256, depth=3, average=average, running=False)
        fit_normalizers(field, demos.moments, demos.obs_spec)
        return field

    def clone(self, demos: Demos, steps: int, seed: int, coupling: Coupling) -> tuple[VelocityField, float]:
        """(policy, its flow-matching loss on held-out episodes)."""
        train, held_out = (self.chunks(part) for part in demos.split(self.hold_out))
        torch.manual_seed(seed)
        field, hidden = self.network(demos)
        averaged = pretrain(
            field,
            train.batches(self.rows, torch.Generator().manual_seed(seed)),
            steps=steps,
            hidden=hidden,
            lr=self.lr,
            muon_lr=self.muon_lr,
            drop=self.drop,
            average=self.average,
            times=uniform_times,
            coupling=coupling,
            loss=self.loss,
            seed=seed,
            autocast=False,
            progress=report(steps, every=500),
        )
        return averaged, validation_loss(averaged, held_out)

    def judge(self, field: VelocityField, env: VecEnv) -> dict[str, Any]:
        """Mean return, and success where it is told, with K denoising steps; with fewer where made for it."""
        found: dict[str, float] = {}
        for suffix, k in self.judged_at.items():
            scores = play_once(field, env, k)
            found |= {f"{name}{suffix}": round(score.mean().item(), DIGITS[name]) for name, score in scores.items()}
        return found


class OwnCloning(Cloning):
    """A policy of whatever environment a folder says that its demonstrations are of."""

    @property
    def asset(self) -> str:
        """Of no environment in particular."""
        return self.name

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """The folder, and what follows from no environment."""
        parser.add_argument("--demos", type=Path, required=True, help="folder of write_demos")
        parser.add_argument("--chunk", type=int, default=self.chunk, help="actions made at once")
        parser.add_argument("--trust-code", action="store_true", help="run an environment outside rlflow")
        self.add_common(parser)

    def make(self, out: Path, args: argparse.Namespace) -> dict[str, Any]:
        """As of a known environment."""
        demos = Demos.open(args.demos)
        demos.check()
        mine = replace(self, chunk=args.chunk)
        return mine.make_of(demos, out, args, args.trust_code)

    def options(self, args: argparse.Namespace) -> str:
        trust = " --trust-code" if args.trust_code else ""
        return f" --demos {args.demos} --chunk {args.chunk}{trust}"


class TabletopCloning(Cloning):
    """A vision-language-action model of the tabletop's fifteen tasks."""

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """A prefix and an action expert, and the matrices of their layers."""
        field = VLA((self.chunk, *demos.action_shape), vocab=len(WORDS), context=LENGTH, pixels=PIXELS)
        return field, field.hidden_matrices()


class MetaWorldCloning(Cloning):
    """A model of words and numbers of MT10's tasks."""

    def network(self, demos: Demos) -> tuple[VelocityField, list[Parameter]]:
        """As the tabletop's, without a picture; its state is normalised."""
        from rlflow.envs.simulators import metaworld

        field = VLA(
            (self.chunk, *demos.action_shape),
            vocab=len(metaworld.WORDS),
            context=metaworld.LENGTH,
            pixels=0,
            state_dim=metaworld.STATE,
        )
        field.normalizer.moments.copy_(demos.moments[:, : metaworld.STATE])  # the words' numbers come behind
        return field, field.hidden_matrices()


TABLETOP = TabletopCloning(
    "robot_bc_tabletop", "tabletop", steps=6000, rows=128, lr=3e-3, average=0.99, judged=512, num_demos=1000
)
STEPS = {"hopper": 3000, "walker2d": 3000, "halfcheetah": 12_000}
"""An expert of little noise (std .16 to .28 where the others have .43 to .73) takes longer to copy."""
CLONINGS = {
    c.name: c
    for c in (
        *(Cloning(f"robot_bc_{env}", env, steps=n) for env, n in STEPS.items()),
        OwnCloning("robot_bc", "", steps=3000),
        Cloning("robot_bc_cube", "cube_single", steps=1000, chunk=5),
        MetaWorldCloning(
            "robot_bc_metaworld", "metaworld", steps=1000, chunk=5, lr=3e-3, average=0.99, judged=500, num_demos=20
        ),
        TABLETOP,
    )
}


def demos_of(
    env: str, folder: Path, settings: dict[str, Any] | None = None, num: int | None = None, by: str | None = None
) -> Demos:
    """Those of a folder, of this environment; made first, by whoever demonstrates it (or `by`), if there is no folder.

    ValueError where they are of another environment, or of this one under settings that make it another.
    """
    wanted = {"name": env, "settings": settings or {}}
    absent = not folder.exists()
    would_be = {"name": env, "settings": demonstrator(by).settings if by else {}}
    if why := differences(would_be if absent else Demos.open(folder).env, wanted):
        raise ValueError(f"{folder}: demonstrations {'would be' if absent else 'are'} of another env: {'; '.join(why)}")
    if absent:
        print(f"{folder} does not exist: demonstrations of {env} are made", flush=True)
        print(make_demos(by or env, folder, num_episodes=num).summary, flush=True)
    demos = Demos.open(folder)
    demos.check()
    return demos


def make_env(world: dict[str, Any], num_envs: int, trust_code: bool = False) -> VecEnv:
    """`num_envs` rows of an environment by name and settings."""
    spec = {**world.get("settings", {}), "name": world["name"]}
    env = registry.build("env", "env.settings", spec, {"num_envs": num_envs, "gamma": GAMMA}, trust_code)
    checked = Checked(env, world["name"])
    return Targeted(checked, world["targets"]) if world.get("targets") else checked


@torch.no_grad()
def validation_loss(field: VelocityField, chunks: Chunks, seed: int = 0, most: int = 20_000) -> float:
    """Mean flow-matching loss of at most `most` pairs, with noise and times from `seed`."""
    rng = torch.Generator().manual_seed(seed)
    obs, action = chunks[torch.randperm(len(chunks), generator=rng)[:most]]
    x_0, t = torch.randn(action.shape, generator=rng), uniform_times(len(action), rng)
    return cfm_loss(field, action, field.encode(obs), x_0, t).mean().item()


@torch.no_grad()
def play_once(field: VelocityField, env: VecEnv, num_steps: int, seed: int = 10_000) -> dict[str, Tensor]:
    """(B,) undiscounted "return", and "success" where it is told, of each row's episode from seed + b.

    Actions are made by K Euler steps from random noise.
    """
    policy = FlowPolicy(field, FlowSDE(), num_steps=num_steps)
    obs = env.reset(seed + torch.arange(env.num_envs))
    scores = dict.fromkeys(DIGITS, torch.full((env.num_envs,), torch.nan))
    for step in range(env.horizon):
        cond, rows, key = policy.encode(obs), torch.arange(env.num_envs), Key(seed, "judge", outer=step)
        action = policy.select(policy, cond, obs, policy.plan(), key, rows)
        reached = env.step(action)
        told = {"return": reached.info["episode_return"], "success": reached.info.get("success", scores["success"])}
        now = scores["return"].isnan() & reached.ended
        scores = {name: torch.where(now, told[name], score) for name, score in scores.items()}
        if not bool(scores["return"].isnan().any()):
            break
        obs = reached.obs
    return told_scores(scores)
