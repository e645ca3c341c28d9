"""The toy road: what is shown is where things are, commands lead where they say, the expert parts and does not crash."""

import math

import pytest
import torch

from rlflow.envs.simulators.drive import (
    LANES,
    STEPS,
    DriveSim,
    ToyDrive,
    choices,
    drive,
    episodes,
    free,
    hits,
    manoeuvres,
    scene,
    trajectory,
)


def started(num: int = 300) -> DriveSim:
    sim = DriveSim(num)
    sim.reset(torch.arange(num), torch.ones(num, dtype=torch.bool))
    return sim


def test_a_car_that_is_not_steered_goes_straight_and_its_speed_is_what_was_asked() -> None:
    """Closed form: v t + a t^2 / 2, and a circle of radius L / tan(steer)."""
    car = torch.tensor([[0.0, 1.0, 0.0, 6.0]])
    for _ in range(4):
        car = drive(car, torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(car, torch.tensor([[6 * 2 + 2 * 2**2 / 2, 1.0, 0.0, 10.0]]))
    car = torch.tensor([[0.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    for _ in range(60):
        car = drive(car, torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    radius, angle = 2.7 / math.tan(0.15), 30 * 4 * math.tan(0.15) / 2.7
    expected = torch.tensor([[radius * math.sin(angle), radius * (1 - math.cos(angle))]], dtype=torch.float64)
    torch.testing.assert_close(car[:, :2], expected, atol=0.02, rtol=0)


def test_overlap_and_the_edge_of_the_road_by_hand() -> None:
    boxes = torch.tensor([[10.0, 0.0, 5.0]])
    places = torch.tensor([[5.6, 0.0], [5.4, 0.0], [10.0, 1.9], [10.0, 2.1], [0.0, 4.2], [0.0, 4.3], [0.0, -4.3]])
    assert hits(places, boxes.expand(7, 1, 3)).tolist() == [True, False, True, False, False, True, True]


def test_the_observation_tells_the_scene() -> None:
    sim = started(20)
    sim.advance(torch.rand(20, 2) * 2 - 1)
    car, boxes = scene(sim.observe())
    truth = sim.state["boxes"].clone()
    truth[..., 0] -= sim.state["car"][:, :1]
    torch.testing.assert_close(boxes, truth, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(car[:, 1:], sim.state["car"][:, 1:])


def test_a_trajectory_is_where_the_simulator_goes() -> None:
    env, obs = ToyDrive(30), ToyDrive(30).reset(torch.arange(30))
    env.reset(torch.arange(30))
    action = torch.rand(30, STEPS, 2) - 0.5
    ends = trajectory(obs, action.unsqueeze(1))[:, 0]
    sim = started(30)
    for step in range(STEPS):
        sim.advance(action[:, step])
        torch.testing.assert_close(sim.state["car"][:, :2], ends[:, step], atol=1e-4, rtol=1e-4)
    assert torch.equal(trajectory(obs, torch.stack([action, action], 1))[:, 1], ends)


def test_what_is_free_is_what_nobody_will_be_on() -> None:
    sim = started(50)
    goals = torch.tensor([[20.0, 0.0], [20.0, 4.4], [1e4, 0.0]])
    found = free(sim.observe(), goals)
    assert not found[:, 1].any()  # off the road
    assert found[:, 2].all()  # beyond them all
    later = sim.state["boxes"].clone()
    later[..., 0] += 4 * later[..., 2]
    gap = (later[..., :2] - goals[0]).abs()
    assert torch.equal(found[:, 0], ~((gap[..., 0] < 4.5) & (gap[..., 1] < 2)).any(1))


def test_no_scene_begins_with_a_collision_and_most_can_be_driven() -> None:
    sim = started(2000)
    assert not hits(sim.state["car"][:, :2], sim.state["boxes"]).any()
    commands, hit, gain = manoeuvres(sim.state["car"], sim.state["boxes"])
    chances = choices(hit, gain)
    assert float(chances.any(1).float().mean()) > 0.99
    assert float((chances.sum(1) > 1).float().mean()) > 0.3  # the expert parts
    ends = trajectory(sim.observe(), commands)[:, :, -1, 1]
    lane = (ends.unsqueeze(-1) - torch.tensor(LANES)).abs().argmin(-1)
    assert float((lane == torch.arange(3))[chances].float().mean()) > 0.9


def test_episodes_of_the_expert_never_crash_and_are_the_same_again() -> None:
    made, again = (list(episodes(40, 5, 0.05)) for _ in range(2))
    assert len(made) == 40
    assert all(torch.equal(a.action, b.action) and torch.equal(a.obs, b.obs) for a, b in zip(made, again, strict=True))
    env = ToyDrive(40)
    env.reset(torch.arange(40))
    assert all(e.obs.shape == (STEPS, 21) and e.success and float(e.reward.min()) > -0.5 for e in made)


def test_success_is_a_whole_manoeuvre_without_a_collision() -> None:
    env = ToyDrive(200)
    obs = env.reset(torch.arange(200))
    sim = started(200)
    commands, hit, gain = manoeuvres(sim.state["car"], sim.state["boxes"])
    keep = torch.where(hit, -1e9, gain).argmax(1)
    step = env.step(commands[torch.arange(200), keep])
    crashed = hit[torch.arange(200), keep]
    assert torch.equal(step.info["success"] == 1, ~crashed)
    assert torch.equal(step.terminated, crashed)
    torch.testing.assert_close(
        step.reward[~crashed] * 10, gain[torch.arange(200), keep][~crashed], rtol=1e-3, atol=1e-3
    )
    off = env.step(torch.tensor([[1.0, 1.0]]).expand(200, STEPS, 2))
    assert float(off.info["success"].mean()) == pytest.approx(0, abs=0.05)
    assert obs.shape == (200, 21)
