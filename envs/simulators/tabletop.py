"""Tabletop: a sentence, a small picture and the finger's place; discs to touch, or to push to a side of the table.

Fifteen tasks, batched tensors on any device: the embedded stand-in for the multi-task manipulation sets on which
vision-language-action models are tuned. Contact is quasi-static: a disc that the finger overlaps is moved along the
line of centres until they touch, so a push that is off centre slips. Discs slide past one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rlflow.envs.demos import demonstrators
from rlflow.envs.demos.dataset import Demos, Episode
from rlflow.envs.demos.experts import play, successes
from rlflow.envs.seeds import normal, uniform
from rlflow.envs.sim import Outcome, SimEnv
from rlflow.envs.simulators.toy import ToySim
from rlflow.ranges import Count, Size
from rlflow.types import Tree

COLOURS = {"red": (0.9, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.2, 0.3, 0.95)}
SIDES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "bottom": (0.0, -1.0), "top": (0.0, 1.0)}
TASKS = [f"push {c} to the {s}" for c in COLOURS for s in SIDES] + [f"touch {c}" for c in COLOURS]
WORDS = ["", *dict.fromkeys(word for task in TASKS for word in task.split())]
"""Vocabulary; 0 fills short sentences up."""
LENGTH = max(len(task.split()) for task in TASKS)
PIXELS = 24
PER_BODY = 16
"""Points of each disc, and of the finger, in a cloud."""
TABLE = 0.08
"""Grey of the empty table."""
DISC, FINGER = 0.13, 0.09
CONTACT = DISC + FINGER
SPEED = 0.1
"""Of a primitive step at full command, on a table [-1, 1]^2."""
EDGE = 0.75
"""How far out along its side a pushed disc must be."""


def tokens(sentence: str) -> list[int]:
    """Word numbers of a sentence, filled up to LENGTH; ValueError for a word that is not known."""
    words = sentence.split()
    unknown = sorted(set(words) - set(WORDS))
    if unknown or len(words) > LENGTH:
        raise ValueError(f"{sentence!r}: at most {LENGTH} words of {WORDS[1:]}, got {unknown or len(words)}")
    return [WORDS.index(word) for word in words] + [0] * (LENGTH - len(words))


class TabletopSim(ToySim):
    """State: finger (B, 2), discs (B, 3, 2), task (B,) of TASKS; two velocity commands per primitive step."""

    step_seconds, tasks = 0.1, TASKS

    def __init__(self, num_envs: int, horizon: int, device: str = "cpu", only: str = "", shaped: bool = False):
        drawn = [i for i, task in enumerate(TASKS) if task.startswith(only)]
        if not drawn:
            raise ValueError(f"only: no task begins with {only!r}, they are {', '.join(TASKS)}")
        self.drawn, self.shaped = torch.tensor(drawn, device=device), shaped
        sides = [SIDES.get(task.split()[-1], (0.0, 0.0)) for task in TASKS]
        colours = [next(i for i, c in enumerate(COLOURS) if c in task.split()) for task in TASKS]
        self.sentences = torch.tensor([tokens(task) for task in TASKS], device=device)
        self.directions = torch.tensor(sides, device=device)  # zero where the disc is to be touched
        self.colours = torch.tensor(colours, device=device)
        super().__init__(num_envs, 2, horizon, device)

    def start(self, seeds: Tensor) -> dict[str, Tensor]:
        """Finger and discs in four different cells of nine, a task drawn evenly."""
        u = uniform(seeds, 9 + 8 + 1)
        cells = u[:, :9].argsort(1)[:, :4]
        centres = torch.stack([cells % 3, cells // 3], -1) - 1
        places = (0.42 * centres + 0.16 * (u[:, 9:17].view(-1, 4, 2) - 0.5)).float()
        return {"finger": places[:, 0], "discs": places[:, 1:], "task": self.drawn[(u[:, 17] * len(self.drawn)).long()]}

    def observe(self) -> Tree:
        pixels = draw(self.state["finger"], self.state["discs"], PIXELS)
        return {"pixels": pixels, "state": self.state["finger"], "text": self.sentences[self.state["task"]]}

    @property
    def asked(self) -> Tensor:  # type: ignore[override]
        """(B,) of TASKS."""
        return self.state["task"]

    @property
    def target(self) -> Tensor:
        """(B, 2) place of the disc that the sentence names."""
        rows = torch.arange(self.num_envs, device=self.device)
        return self.state["discs"][rows, self.colours[self.state["task"]]]

    @property
    def nearness(self) -> Tensor:
        """(B,) the finger to the disc, and the disc to its side: minus and plus a distance."""
        direction = self.directions[self.state["task"]]
        return (self.target * direction).sum(-1) - (self.target - self.state["finger"]).norm(dim=-1)

    def advance(self, action: Tensor) -> Outcome:
        """Move the finger, then every disc out of its way; 1 and the end where the task is done."""
        before = self.nearness if self.shaped else None
        finger = (self.state["finger"] + SPEED * action).clamp(-1, 1)
        offset = self.state["discs"] - finger.unsqueeze(1)
        distance = offset.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        pushed = finger.unsqueeze(1) + offset / distance * CONTACT
        self.state["finger"] = finger
        self.state["discs"] = torch.where(distance < CONTACT, pushed, self.state["discs"]).clamp(-1, 1)
        direction = self.directions[self.state["task"]]
        touched = (self.target - finger).norm(dim=-1) < CONTACT + 1e-3
        there = (self.target * direction).sum(-1) > EDGE
        done = torch.where(direction.any(-1), there, touched)
        reward = done.float() if before is None else done.float() + self.nearness - before
        return Outcome(self.observe(), reward, done, info={"success": done.float()})

    def render(self, row: int, size: tuple[int, int]) -> Tensor:
        """The table from above."""
        finger, discs = (self.state[name][row : row + 1] for name in ("finger", "discs"))
        return draw(finger, discs, min(size))[0].cpu()


def draw(finger: Tensor, discs: Tensor, size: int) -> Tensor:
    """Pictures (B, size, size, 3) uint8 with smooth edges of discs (B, 3, 2) and, white, of the finger (B, 2)."""
    line = (torch.arange(size, device=finger.device) + 0.5) * 2 / size - 1
    places = torch.cat([discs, finger.unsqueeze(1)], 1)
    across = (line - places[..., :1]).square().unsqueeze(2)
    down = (-line - places[..., 1:]).square().unsqueeze(3)  # the top of the table is the first row
    radii = torch.tensor([DISC] * len(COLOURS) + [FINGER], device=finger.device).view(-1, 1, 1)
    cover = (across + down).sqrt_().sub_(radii).mul_(-size / 2).add_(0.5).clamp_(0, 1)
    bare = torch.ones_like(cover[:, 0])
    for i in reversed(range(len(radii))):  # what lies above hides what lies below
        cover[:, i] *= bare
        bare = bare - cover[:, i]
    paint = torch.tensor([*COLOURS.values(), (1.0, 1.0, 1.0)], device=finger.device)
    picture = torch.einsum("bnij,nc->bijc", cover, 255 * (paint - TABLE))
    return picture.add_(255 * TABLE + 0.5).to(torch.uint8)


class TabletopCloudSim(TabletopSim):
    """Seen as {"cloud": coloured points, "state": finger, "words": (11,) 1 for every word of the sentence}."""

    def observe(self) -> Tree:
        text, finger = self.sentences[self.state["task"]], self.state["finger"]
        words = torch.zeros(len(text), len(WORDS), device=self.device).scatter_(1, text, 1.0)[:, 1:]
        return {"cloud": points(finger, self.state["discs"]), "state": finger, "words": words}


def points(finger: Tensor, discs: Tensor) -> Tensor:
    """(B, 64, 6) places and colours of points all over the discs (B, 3, 2), at height 0, and the finger (B, 2), at .1.

    From the state, with nothing hidden behind anything: Vogel's spiral of each body.
    """
    i = torch.arange(PER_BODY, device=finger.device)
    radius, angle = ((i + 0.5) / PER_BODY).sqrt(), i * torch.pi * (3 - 5**0.5)
    spiral = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.zeros_like(radius)], -1)
    radii = torch.tensor([DISC] * len(COLOURS) + [FINGER], device=finger.device)
    flat = torch.cat([discs, finger.unsqueeze(1)], 1)
    height = torch.tensor([0.0] * len(COLOURS) + [0.1], device=finger.device).expand(len(flat), -1)
    centres = torch.cat([flat, height.unsqueeze(-1)], -1)
    places = centres.unsqueeze(2) + radii[:, None, None] * spiral
    paint = torch.tensor([*COLOURS.values(), (1.0, 1.0, 1.0)], device=finger.device)
    return torch.cat([places, paint.unsqueeze(1).expand_as(places)], -1).flatten(1, 2)


class Tabletop(SimEnv):
    """Fifteen tasks with three coloured discs by sentence: push one to a side (12) or touch one (3); 1 on success.

    Observation: {"pixels": (24, 24, 3) uint8, "text": (5,) word numbers, "state": the finger's place}; with `clouds`
    {"cloud": (64, 6) coloured points, "state", "words": 0 or 1 for each of 11}. Action: a chunk of velocities of at
    most .1 on each axis. `horizon` primitive steps, then a truncation. `only` is how the sentences begin that are
    asked: "touch", "push red", by default any; `shaped` pays, beside the 1, what the finger comes nearer to the disc
    and the disc to its side.
    """

    sim: TabletopSim

    def __init__(
        self,
        num_envs: int = 64,
        chunk: Size = 4,
        horizon: Count = 40,
        gamma: float = 0.99,
        device: str = "cpu",
        clouds: bool = False,
        only: str = "",
        shaped: bool = False,
    ):
        sim = TabletopCloudSim if clouds else TabletopSim
        super().__init__(sim(num_envs, horizon, device, only, shaped), chunk, gamma)


# -- the expert -----------------------------------------------------------------------------------


def expert(sim: TabletopSim) -> Tensor:
    """Actions (B, 2): round the disc to the side opposite of its goal, then push; straight at a disc to touch."""
    direction, offset = sim.directions[sim.state["task"]], sim.state["finger"] - sim.target
    normal_ = torch.stack([-direction[:, 1], direction[:, 0]], -1)
    along, aside = (offset * direction).sum(-1, keepdim=True), (offset * normal_).sum(-1, keepdim=True)
    side = torch.where(aside < 0, -1.0, 1.0)
    clear = CONTACT + 0.06
    behind, centred, beside = along < 0.02 - CONTACT, aside.abs() < 0.03, aside.abs() > clear - 0.04
    push = direction * SPEED - aside * normal_
    centre = -aside * normal_ - (along + clear) * direction
    back = -(along + clear + 0.02) * direction + (side * clear - aside) * normal_
    out = (side * clear - aside) * normal_
    move = torch.where(behind, torch.where(centred, push, centre), torch.where(beside, back, out))
    move = torch.where(direction.any(-1, keepdim=True), move, -offset)
    return move / move.abs().amax(-1, keepdim=True).clamp(min=SPEED)


def episodes(num: int, seed: int, noise: float, clouds: bool = False) -> Iterator[Episode]:
    """`num` successful episodes of the expert, whose commands are disturbed by Gaussian noise of that std."""
    env = Tabletop(2 * num, chunk=1, clouds=clouds)
    env_seeds = seed + torch.arange(env.num_envs)
    calls = iter(range(env.sim.horizon))

    def act(obs: Tree) -> Tensor:
        eps = normal(env_seeds * env.sim.horizon + next(calls), 2).float()
        return (expert(env.sim) + noise * eps).clamp(-1, 1).unsqueeze(1)

    return successes(play(env, act, seed), num)


def cloud_episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """Those episodes, seen as clouds."""
    return episodes(num, seed, noise, clouds=True)


def make_demos(folder: Path | str, num: int = 100, seed: int = 0, noise: float = 0.3) -> Demos:
    """Write those episodes."""
    return demonstrators.make_demos("tabletop", folder, noise=noise, num_episodes=num, seed=seed)
