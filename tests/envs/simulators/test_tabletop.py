"""Tabletop: what a sentence asks for is what is paid, pictures show the state, contact moves what it touches only."""

import pytest
import torch

from rlflow.envs.demos.dataset import Demos
from rlflow.envs.simulators.tabletop import (
    COLOURS,
    CONTACT,
    DISC,
    EDGE,
    FINGER,
    SIDES,
    TASKS,
    WORDS,
    Tabletop,
    TabletopCloudSim,
    TabletopSim,
    draw,
    expert,
    make_demos,
    points,
    tokens,
)


def started(num: int) -> TabletopSim:
    sim = TabletopSim(num, 40)
    sim.reset(torch.arange(num), torch.ones(num, dtype=torch.bool))
    return sim


def test_only_the_tasks_named_are_asked():
    sim = TabletopSim(200, 40, only="push red")
    sim.reset(torch.arange(200), torch.ones(200, dtype=torch.bool))
    assert {TASKS[i] for i in sim.asked.tolist()} == {f"push red to the {side}" for side in SIDES}
    with pytest.raises(ValueError, match="only: no task begins with 'pull'"):
        TabletopSim(2, 40, only="pull")


def test_shaping_pays_what_was_gained_on_the_whole_way():
    """Undiscounted it is the gain from the first state to the last, beside the 1: no way round is worth more."""
    sim, plain = (TabletopSim(64, 40, shaped=shaped) for shaped in (True, False))
    begin = torch.ones(64, dtype=torch.bool)
    for one in (sim, plain):
        one.reset(torch.arange(64), begin)
    first, paid, earned = sim.nearness, torch.zeros(64), torch.zeros(64)
    for _ in range(20):
        action = torch.randn(64, 2).clamp(-1, 1)
        paid, earned = paid + sim.advance(action).reward, earned + plain.advance(action).reward
    torch.testing.assert_close(paid - earned, sim.nearness - first, atol=1e-5, rtol=0)


def test_the_expert_does_every_task_and_the_words_name_the_disc_and_the_side():
    """Success is judged again from the sentence alone."""
    sim = started(300)
    done = torch.zeros(300, dtype=torch.bool)
    ends = torch.zeros(300, 2)
    for _ in range(40):
        out = sim.advance(expert(sim))
        ends = torch.where((out.terminated & ~done).unsqueeze(1), sim.target, ends)
        done = done | out.terminated
    assert bool(done.all())
    assert set(sim.state["task"].tolist()) == set(range(len(TASKS)))
    for row in range(300):
        words = [WORDS[i] for i in sim.observe()["text"][row] if i]
        assert " ".join(words) == TASKS[sim.state["task"][row]]
        if words[0] == "push":
            assert float(ends[row] @ torch.tensor(SIDES[words[-1]])) > EDGE
        assert sim.colours[sim.state["task"][row]] == list(COLOURS).index(words[1])


def test_clouds_show_every_disc_in_its_colour_and_words_name_the_task():
    sim = TabletopCloudSim(6, 40)
    sim.reset(torch.arange(6), torch.ones(6, dtype=torch.bool))
    obs = sim.observe()
    cloud = points(sim.state["finger"], sim.state["discs"])
    assert torch.equal(obs["cloud"], cloud)
    for i, colour in enumerate([*COLOURS.values(), (1.0, 1.0, 1.0)]):
        mine = (cloud[..., 3:] == torch.tensor(colour)).all(-1)
        assert mine.sum(1).tolist() == [16] * 6
        places = cloud[mine].view(6, 16, 6)[..., :2]
        centre, radius = (sim.state["discs"][:, i], DISC) if i < 3 else (sim.state["finger"], FINGER)
        far = (places - centre.unsqueeze(1)).norm(dim=-1)
        assert float(far.max()) <= radius
        assert float((places.mean(1) - centre).abs().max()) < 0.1 * radius
    told = {tuple(words.tolist()) for words in words_of_all()}
    assert len(told) == len(TASKS)
    assert obs["words"].sum(1).tolist() == (sim.sentences[sim.state["task"]] > 0).sum(1).tolist()


def words_of_all() -> torch.Tensor:
    """(15, 11) of every task."""
    sim, num = TabletopCloudSim(len(TASKS), 40), len(TASKS)
    sim.reset(torch.arange(num), torch.ones(num, dtype=torch.bool))
    sim.state["task"] = torch.arange(num)
    return sim.observe()["words"]


def test_a_push_at_the_wrong_disc_or_side_is_not_paid():
    sim = started(len(TASKS))
    sim.state["task"] = torch.arange(len(TASKS))
    sim.state["discs"][:, 0] = torch.tensor([0.9, 0.0])  # red lies at the right
    sim.state["discs"][:, 1:] = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    sim.state["finger"][:] = torch.tensor([-0.9, 0.0])
    out = sim.advance(torch.zeros(len(TASKS), 2))
    assert [TASKS[i] for i in out.terminated.nonzero()[:, 0]] == ["push red to the right"]
    assert torch.equal(out.reward, out.terminated.float())


def test_contact_moves_only_what_is_touched_and_leaves_no_overlap():
    sim, rng = started(64), torch.Generator().manual_seed(0)
    for _ in range(30):
        before = sim.state["discs"].clone()
        sim.advance(2 * torch.rand(64, 2, generator=rng) - 1)
        finger, discs = sim.state["finger"].unsqueeze(1), sim.state["discs"]
        far = (before - finger).norm(dim=-1) > CONTACT
        assert torch.equal(discs[far], before[far])
        inside = (discs.abs() < 1).all(-1)  # not held back by the edge of the table
        assert float((discs - finger).norm(dim=-1)[inside].min()) > CONTACT - 1e-5


def test_an_off_centre_push_slips():
    """The disc leaves along the line of centres, away from the finger's side."""
    sim = started(1)
    sim.state["discs"][0, 0], sim.state["finger"][0] = torch.zeros(2), torch.tensor([-CONTACT, -0.05])
    sim.advance(torch.tensor([[1.0, 0.0]]))
    assert float(sim.state["discs"][0, 0, 1]) > 0.01


@pytest.mark.parametrize("size", [24, 96])
def test_pictures_show_places_and_colours(size):
    """The centre of mass of a disc alone on the table is its place, up in the picture is up on the table."""
    place, away = torch.tensor([0.3, -0.55]), torch.tensor([9.0, 9.0])
    for i, colour in enumerate(COLOURS.values()):
        discs = torch.stack([place if i == j else away for j in range(3)]).unsqueeze(0)
        bright = draw(away.unsqueeze(0), discs, size)[0].float() - draw(away.unsqueeze(0), discs + 9, size)[0].float()
        mass = bright.abs().sum(-1)
        line = (torch.arange(size) + 0.5) * 2 / size - 1
        centre = torch.stack([(mass.sum(0) * line).sum(), -(mass.sum(1) * line).sum()]) / mass.sum()
        torch.testing.assert_close(centre, place, atol=0.01, rtol=0)
        middle = bright.flatten(0, 1)[mass.argmax()] / 255 + 0.08
        torch.testing.assert_close(middle, torch.tensor(colour), atol=0.01, rtol=0)


def test_a_film_is_the_picture_at_another_size():
    env = Tabletop(2)
    env.reset(torch.arange(2))
    assert env.render(1, (48, 64)).shape == (48, 48, 3)


def test_words():
    assert tokens("touch red")[2:] == [0] * 3
    with pytest.raises(ValueError, match="'yellow'"):
        tokens("touch yellow")


def test_demonstrations_succeed_are_disturbed_and_repeat(tmp_path):
    one, two = (make_demos(str(tmp_path / name), num=12, seed=3) for name in "ab")
    assert all(e["success"] and e["terminated"] for e in one.episodes)
    assert len(one.episodes) == 12
    index = torch.arange(sum(e["length"] for e in one.episodes))
    assert torch.equal(one.actions(index), two.actions(index))
    assert float(one.actions(index).std()) > 0.3
    seen = Demos.open(tmp_path / "a").observations(index)
    assert seen["pixels"].dtype == torch.uint8
    assert seen["text"].dtype == torch.long
    assert one.moments.shape == (3, 2 + 5)  # pixels have none
