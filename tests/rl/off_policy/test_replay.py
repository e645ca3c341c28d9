"""The replay by hand: ends and time limits, chunks, the ring, and its state."""

import pytest
import torch

from rlflow.rl.off_policy.replay import Replay
from rlflow.types import Rollout, tree_map

GAMMA = 0.9


def rollout(first, num, rows=1, *, terminated=(), truncated=(), steps=None, weight=None, start=None):
    """T steps whose observation is a clock: row b sees first + t + 100 b, and is paid 1 + its clock.

    An ended row goes on with its clock 1000 later, as a new episode would.
    """
    obs, final, clock = [], [], torch.full((rows,), float(first)) + 100 * torch.arange(rows)
    clock = clock if start is None else start
    ends = torch.zeros(2, num, rows, dtype=torch.bool)
    for kind, where in enumerate((terminated, truncated)):
        for t, b in where:
            ends[kind, t, b] = True
    for t in range(num):
        obs.append(clock)
        final.append(clock + 1)
        clock = torch.where(ends[:, t].any(0), clock + 1001, clock + 1)
    obs = torch.stack(obs).unsqueeze(-1)
    return Rollout(
        obs=obs,
        action=torch.zeros(num, rows, 1, 2),
        reward=1 + obs[..., 0],
        terminated=ends[0],
        truncated=ends[1],
        weight=torch.ones(num, rows) if weight is None else weight,
        last_obs=clock.unsqueeze(-1),
        final_obs=torch.stack(final).unsqueeze(-1),
        group=torch.arange(rows),
        row_ids=torch.zeros(num, rows, dtype=torch.long),
        num_steps=steps,
    )


def filled(*rollouts, capacity=100):
    replay = Replay(capacity, GAMMA)
    for r in rollouts:
        replay.add(r, r.action.tanh())
    return replay


def at(replay, *index):
    found = replay.at(torch.tensor(index))
    return found.reward.tolist(), found.discount.tolist(), found.next_obs[:, 0].tolist()


def test_an_entry_is_what_happened():
    assert at(filled(rollout(0, 3)), 0, 2) == ([1, 3], pytest.approx([GAMMA, GAMMA]), [1, 3])


def test_nothing_is_bootstrapped_after_a_terminal_step():
    reward, discount, _ = at(filled(rollout(0, 5, terminated=[(1, 0)])), 0, 1, 2)
    assert reward == [1, 2, 1003]
    assert discount == pytest.approx([GAMMA, 0, GAMMA])


def test_a_time_limit_is_bootstrapped_from_what_was_reached():
    """Not from the first observation of the next episode, and not cut to 0; at the border of two rollouts too."""
    replay = filled(rollout(0, 3, truncated=[(1, 0), (2, 0)]), rollout(50, 2))
    assert at(replay, 1, 2) == ([2, 1003], pytest.approx([GAMMA, GAMMA]), [2, 1003])


def test_a_chunk_counts_its_primitive_steps():
    """R is discounted inside already; the next value by gamma^h, of unequal h when a chunk was cut."""
    steps = torch.tensor([[4], [2], [4]])
    reward, discount, _ = at(filled(rollout(0, 3, steps=steps, truncated=[(1, 0)])), 0, 1, 2)
    assert reward == [1, 2, 1003]
    assert discount == pytest.approx([GAMMA**4, GAMMA**2, GAMMA**4])


def test_rows_keep_apart():
    assert at(filled(rollout(0, 3, rows=2)), 2, 3, 5) == ([2, 102, 103], pytest.approx([GAMMA] * 3), [2, 102, 103])


def test_the_ring_forgets_the_oldest():
    replay = filled(rollout(0, 3), rollout(3, 3), rollout(6, 2), capacity=7)
    assert (len(replay), replay.head) == (7, 1)
    assert replay.data["obs"].flatten().tolist() == [7, 1, 2, 3, 4, 5, 6]
    reward, _, reached = at(replay, *range(7))
    assert reached == reward == [8, 2, 3, 4, 5, 6, 7]


def test_a_step_without_a_score_is_masked():
    """0 * nan is nan: it is left out, not multiplied away."""
    bad = rollout(0, 4, weight=torch.tensor([[1.0], [1.0], [0.0], [1.0]]))
    bad.reward[2] = torch.nan
    found = filled(bad).at(torch.arange(4))
    assert found.weight.tolist() == [1, 1, 0, 1]
    assert found.reward.isfinite().all()


def test_an_environment_that_tells_no_final_observation():
    """None means that nothing was cut off: what follows was reached."""
    plain = rollout(0, 3)
    plain.final_obs = None
    assert at(filled(plain), 0, 2) == at(filled(rollout(0, 3)), 0, 2)


def test_draws_are_even_over_all_entries():
    replay = filled(rollout(0, 5, rows=3), rollout(5, 5, rows=3), capacity=24)
    counts = replay.draw(24_000, torch.Generator().manual_seed(0)).bincount(minlength=24)
    assert len(counts) == 24
    assert (counts - 1000).abs().max() < 150


def test_its_state_is_the_whole_of_it():
    """What a loaded one gives, now and after further steps, is equal; only what is filled is saved."""
    replay, other = filled(rollout(0, 4)), Replay(100, GAMMA)
    state = replay.state_dict()
    assert len(state["data"]["reward"]) == 4
    other.load_state_dict(tree_map(torch.clone, state), torch.device("cpu"))
    for r in (replay, other):
        more = rollout(4, 4, truncated=[(2, 0)])
        r.add(more, more.action.tanh())
    a, b = replay.at(torch.arange(8)), other.at(torch.arange(8))
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("obs", "action", "reward", "discount", "next_obs"))


def test_dicts_of_observations_and_pixels_stay_as_they_are():
    pictures = rollout(0, 3)
    for name in ("obs", "final_obs"):
        value = getattr(pictures, name)
        setattr(pictures, name, {"a": value, "pixels": value.to(torch.uint8)})
    pictures.last_obs = {"a": pictures.last_obs, "pixels": pictures.last_obs.to(torch.uint8)}
    found = filled(pictures).at(torch.tensor([0]))
    assert found.obs["pixels"].dtype == torch.uint8
    assert found.next_obs["pixels"].item() == 1


@pytest.mark.parametrize(("settings", "message"), [((0, 0.9), "capacity >= 1"), ((9, 1.1), r"gamma in \[0, 1\]")])
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Replay(*settings)


def test_an_iteration_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"raise algorithm\.capacity or lower env\.horizon"):
        filled(rollout(0, 6, rows=2), capacity=10)
    with pytest.raises(ValueError, match="the replay is empty"):
        Replay(4, 0.9).draw(1, torch.Generator())
