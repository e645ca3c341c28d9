"""ToyDrive: a car on a road of three lanes among six others, batched; one decision is a manoeuvre of four seconds.

The car is a bicycle (acceleration and steering, half a second a step), the others keep lane and speed and do not react.
A scripted expert keeps its lane or changes to another, so demonstrations of one scene part: what goals are for. It is
our own stand-in for planning benchmarks of driving; no score here compares with theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlflow.envs.demos.dataset import Episode
from rlflow.envs.seeds import uniform
from rlflow.envs.sim import Outcome, SimEnv
from rlflow.envs.simulators.toy import ToySim
from rlflow.ranges import Size
from rlflow.types import Tree

DT, STEPS, BOXES = 0.5, 8, 6
LANES = (-3.5, 0.0, 3.5)
HALF = 4.25
"""Metres from the middle that the car's centre may be: three lanes, less half a car."""
LONG, WIDE = 4.5, 2.0
"""Of a car, metres."""
GAS, STEER, WHEELBASE = 4.0, 0.15, 2.7
"""Metres per second squared and radians at full command; metres between the axles."""
FASTEST = 12.0
FAR = torch.tensor([20.0, 3.5, 10.0])
"""By which distance along, distance across and speed are divided where they are shown."""


def drive(car: Tensor, action: Tensor) -> Tensor:
    """The car (..., 4) of x, y, heading, speed after one step of commands (..., 2) in [-1, 1]."""
    x, y, heading, speed = car.unbind(-1)
    gas, steer = action.clamp(-1, 1).unbind(-1)
    after = (speed + GAS * DT * gas).clamp(0, FASTEST)
    way = DT * (speed + after) / 2
    turn = way * torch.tan(STEER * steer) / WHEELBASE
    middle = heading + turn / 2
    return torch.stack([x + way * middle.cos(), y + way * middle.sin(), heading + turn, after], -1)


def hits(place: Tensor, boxes: Tensor) -> Tensor:
    """(...) whether a car at (..., 2) overlaps one of (..., K, 3) boxes of x, y, speed, or has left the road."""
    gap = (boxes[..., :2] - place.unsqueeze(-2)).abs()
    return ((gap[..., 0] < LONG) & (gap[..., 1] < WIDE)).any(-1) | (place[..., 1].abs() > HALF)


def moved(boxes: Tensor, seconds: float) -> Tensor:
    """Boxes (..., K, 3) after some seconds."""
    return torch.stack([boxes[..., 0] + seconds * boxes[..., 2], boxes[..., 1], boxes[..., 2]], -1)


class DriveSim(ToySim):
    """State: car (B, 4), boxes (B, 6, 3), steps driven (B,)."""

    step_seconds = DT

    def __init__(self, num_envs: int, device: str = "cpu"):
        super().__init__(num_envs, 2, STEPS, device)

    def start(self, seeds: Tensor) -> dict[str, Tensor]:
        u = uniform(seeds, 2 + 2 * BOXES).float()
        lanes = torch.tensor(LANES, device=seeds.device)
        lane = (3 * u[:, 0]).long().clamp(max=2)
        still = torch.zeros_like(u[:, 0])
        car = torch.stack([still, lanes[lane], still, 4 + 6 * u[:, 1]], -1)
        rank = torch.arange(BOXES, device=seeds.device)
        mine = (rank % 3) == lane.unsqueeze(1)
        first = torch.where(mine, 10.0, -12.0)  # beside the car others may be, but not on it
        x = first + 26.0 * (rank // 3) + 20.0 * u[:, 2 : 2 + BOXES]
        boxes = torch.stack([x, lanes[rank % 3].expand_as(x), 1 + 7 * u[:, 2 + BOXES :]], -1)
        return {"car": car, "boxes": boxes, "driven": torch.zeros_like(lane)}

    def observe(self) -> Tree:
        """(B, 21): speed, place across, heading; of each box distance along and across, and speed."""
        x, y, heading, speed = self.state["car"].unbind(-1)
        boxes = self.state["boxes"] - torch.stack([x, y, torch.zeros_like(x)], -1).unsqueeze(1)
        own = torch.stack([speed / FAR[2], y / FAR[1], heading], -1)
        return torch.cat([own, (boxes / FAR.to(boxes)).flatten(1)], 1)

    def advance(self, action: Tensor) -> Outcome:
        car, boxes = drive(self.state["car"], action), moved(self.state["boxes"], DT)
        way = car[:, 0] - self.state["car"][:, 0]
        driven = self.state["driven"] + 1
        self.state = {"car": car, "boxes": boxes, "driven": driven}
        hit = hits(car[:, :2], boxes)
        through = (driven >= STEPS) & ~hit
        return Outcome(self.observe(), way / 10 - hit.float(), hit, info={"success": through.float()})


class ToyDrive(SimEnv):
    """One manoeuvre of eight steps: reward the tens of metres gained, -1 on a collision or off the road, the end.

    Success is a manoeuvre without either. `trajectory` tells where commands lead, from what is shown.
    """

    action_shape, obs_dim = (STEPS, 2), 3 + 3 * BOXES

    def __init__(self, num_envs: int = 64, gamma: float = 1.0, device: str = "cpu", chunk: Size = STEPS):
        super().__init__(DriveSim(num_envs, device), chunk=chunk, gamma=gamma)


def scene(obs: Tensor) -> tuple[Tensor, Tensor]:
    """(car (N, 4) at x = 0, boxes (N, 6, 3)) that observations (N, 21) show."""
    speed, y, heading = (obs[:, :3] * torch.tensor([FAR[2], FAR[1], 1.0]).to(obs)).unbind(1)
    boxes = obs[:, 3:].unflatten(1, (BOXES, 3)) * FAR.to(obs)
    boxes = torch.stack([boxes[..., 0], boxes[..., 1] + y.unsqueeze(1), boxes[..., 2]], -1)
    return torch.stack([torch.zeros_like(y), y, heading, speed], -1), boxes


def trajectory(obs: Tensor, action: Tensor) -> Tensor:
    """Points (N, n, H, 2) in metres, x from where the car is, of commands (N, n, H, 2) in scenes (N, 21)."""
    car = scene(obs)[0].unsqueeze(1).expand(-1, action.shape[1], -1)
    points = []
    for step in range(action.shape[2]):
        car = drive(car, action[:, :, step])
        points.append(car[..., :2])
    return torch.stack(points, 2)


def free(obs: Tensor, goals: Tensor) -> Tensor:
    """(N, V) bool: on the road, and no other car there at the end of the manoeuvre; goals (V, 2) or (N, V, 2)."""
    boxes = moved(scene(obs)[1], DT * STEPS).unsqueeze(1)
    places = goals.expand(len(obs), -1, 2)
    return ~hits(places, boxes.expand(-1, places.shape[1], -1, -1))


# -- the expert -----------------------------------------------------------------------------------


def manoeuvres(car: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(commands (N, 3, H, 2), whether each collides (N, 3), metres gained (N, 3)) of a change to each of the lanes."""
    lanes = torch.tensor(LANES).to(car)
    car, boxes = car.unsqueeze(1).expand(-1, 3, -1), boxes.unsqueeze(1).expand(-1, 3, -1, -1)
    begin, commands, hit = car[..., 0], [], torch.zeros(car.shape[:2], dtype=torch.bool, device=car.device)
    for _ in range(STEPS):
        _, y, heading, speed = car.unbind(-1)
        wanted = torch.asin(((lanes - y) / (1.6 * speed.clamp(min=3))).clamp(-0.35, 0.35))
        steer = torch.atan((wanted - heading) * WHEELBASE / (DT * speed.clamp(min=2))) / STEER
        ahead = boxes[..., 0] - car[..., :1]
        near = torch.minimum((boxes[..., 1] - y.unsqueeze(-1)).abs(), (boxes[..., 1] - lanes.view(1, 3, 1)).abs()) < 2.4
        gap = torch.where(near & (ahead > 0), ahead - LONG - 2, torch.inf)
        safe = (boxes[..., 2] + gap / 2.0).amin(-1).clamp(0, FASTEST)  # two seconds behind whoever is in the way
        action = torch.stack([(safe - speed) / (GAS * DT), steer], -1).clamp(-1, 1)
        car, boxes = drive(car, action), moved(boxes, DT)
        hit = hit | hits(car[..., :2], boxes)
        commands.append(action)
    return torch.stack(commands, 2), hit, car[..., 0] - begin


def choices(hit: Tensor, gain: Tensor) -> Tensor:
    """(N, 3) bool: manoeuvres without a collision that gain nearly as much as the best of them."""
    gained = torch.where(hit, -torch.inf, gain)
    return ~hit & (gained > gained.amax(1, keepdim=True) - 6)


def episodes(num: int, seed: int, noise: float) -> Iterator[Episode]:
    """A manoeuvre without a collision from each of the first `num` seeds that allow one, by a lane drawn at random."""
    rng, made, first = torch.Generator().manual_seed(seed), 0, seed
    while made < num:
        sim = DriveSim(num)
        seen = [sim.reset(first + torch.arange(num), torch.ones(num, dtype=torch.bool))]
        commands, hit, gain = manoeuvres(sim.state["car"], sim.state["boxes"])
        chances = choices(hit, gain).float()
        lane = torch.multinomial(chances + 1e-9, 1, generator=rng)[:, 0]
        done = commands[torch.arange(num), lane]
        done = (done + noise * torch.randn(done.shape, generator=rng)).clamp(-1, 1)
        paid, crashed = [], torch.zeros(num, dtype=torch.bool)
        for step in range(STEPS):
            out = sim.advance(done[:, step])
            seen.append(out.obs)
            paid.append(out.reward)
            crashed |= out.terminated
        obs, reward = torch.stack(seen[:-1], 1), torch.stack(paid, 1)
        for row in (~crashed).nonzero()[:, 0].tolist():
            if made < num:
                yield Episode(obs[row], done[row], reward[row], False, True, True)
                made += 1
        first += num
