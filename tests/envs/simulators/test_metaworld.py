"""MetaWorld: words name the task, seeds fix it and the first start, success pays most and ends, experts do the tasks."""

import pytest
import torch

pytest.importorskip("gymnasium")

from rlflow.envs.conformance import CHECKS, Subject
from rlflow.envs.simulators import metaworld
from rlflow.envs.simulators.metaworld import MT10, MT50, WORDS, MetaWorld, tasks_of, tokens


def test_a_sentence_is_the_tasks_name():
    spelled = ["-".join(WORDS[i] for i in tokens(task) if i) for task in MT50]
    assert spelled == MT50
    assert len(set(map(tuple, map(tokens, MT50)))) == 50
    assert tasks_of("mt10") == MT10
    assert tasks_of("reach") == ["reach"]
    assert set(MT10) < set(MT50)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no task \\['tidy-up'\\] in MetaWorld"):
        tasks_of(["reach", "tidy-up"])
    for wrong in ([], ["reach", "reach"]):
        with pytest.raises(ValueError, match="name one or more, each once"):
            tasks_of(wrong)


def short(horizon: int, chunk: int = 3):
    return lambda num_envs: MetaWorld(num_envs, ["reach", "push"], chunk=chunk, horizon=horizon)


@pytest.mark.parametrize("one", CHECKS, ids=lambda f: f.__name__)
def test_conforms(one):
    """Rows are reset all together, for EnvPool fixes seeds when a pool is made."""
    pytest.importorskip("envpool")
    one(Subject(short(9), short(40), short(9, 1), num_envs=4, num_steps=8, gamma=0.99, masked_reset=False))


def test_the_names_are_envpools():
    envpool = pytest.importorskip("envpool")
    known = {name for name in envpool.list_all_envs() if name.startswith("MetaWorld/")}
    assert {f"MetaWorld/{metaworld.camel(task)}-v3" for task in MT50} == known


def test_task_and_first_start_are_functions_of_the_seed_alone():
    """Whoever is beside it; the goal, the last three numbers, differs from seed to seed."""
    pytest.importorskip("envpool")
    seeds = torch.tensor([4, 13, 23, 24])
    env = MetaWorld(4)
    obs = env.reset(seeds)
    assert [env.sim.tasks[i] for i in env.asked] == [MT10[4], MT10[3], MT10[3], MT10[4]]
    turned = MetaWorld(4).reset(seeds.flip(0))
    assert torch.equal(turned["state"].flip(0), obs["state"])
    assert torch.equal(turned["text"].flip(0), obs["text"])
    assert not torch.equal(obs["state"][1, -3:], obs["state"][2, -3:])


def test_held_out_starts_are_none_of_trainings():
    """Evaluation's seeds begin at 2^40."""
    pytest.importorskip("envpool")
    train, held_out = (MetaWorld(4, "reach").reset(first + torch.arange(4)) for first in (0, 2**40))
    goals = train["state"][:, -3:], held_out["state"][:, -3:]
    assert float((goals[0] - goals[1]).abs().amax(1).min()) > 1e-3


def test_a_row_keeps_its_task_and_meets_new_starts():
    """Also where all rows end at once."""
    pytest.importorskip("envpool")
    env = MetaWorld(3, ["push", "reach"], chunk=1, horizon=3)
    first = env.reset(torch.arange(3))
    for _ in range(3):
        step = env.step(torch.zeros(3, 1, 4))
    assert bool(step.truncated.all())
    assert torch.equal(step.obs["text"], first["text"])
    assert float((step.obs["state"][:, -3:] - first["state"][:, -3:]).abs().amax(1).min()) > 1e-3
    with pytest.raises(ValueError, match="reset all rows together"):
        env.reset(torch.arange(3), torch.tensor([True, True, False]))


@pytest.mark.parametrize("sparse", [False, True], ids=["shaped", "sparse"])
def test_an_end_by_success_is_never_a_loss_and_sparse_pays_it_alone(sparse):
    """Every step before it costs something, or nothing and pays nothing."""
    pytest.importorskip("envpool")
    policies = pytest.importorskip("metaworld.policies")
    expert = policies.ENV_POLICY_MAP["reach-v3"]()
    env = MetaWorld(6, "reach", chunk=1, sparse=sparse)
    obs, rewards, over = env.reset(torch.arange(6)), [], torch.zeros(6, dtype=torch.bool)
    while not bool(over.all()):
        action = [torch.from_numpy(expert.get_action(row)) for row in obs["state"].double().numpy()]
        step = env.step(torch.stack(action).float().clamp(-1, 1).unsqueeze(1))
        best = 1.0 if sparse else 0.0
        assert bool(((step.reward == best) == step.terminated).all())
        assert bool((step.reward >= (0 if sparse else -1)).all())
        rewards.append(step.reward.where(~over, 0.0))
        obs, over = step.obs, over | step.terminated
    total = torch.stack(rewards).sum(0)
    assert bool((total == 1).all() if sparse else (total < 0).all())


def test_experts_show_every_task_and_stop_when_it_is_done():
    pytest.importorskip("envpool")
    pytest.importorskip("metaworld")
    found = list(metaworld.episodes(20, seed=0, noise=0.2))
    shown = [tuple(episode.obs["text"][0].tolist()) for episode in found]
    assert sorted(shown) == sorted(2 * [tuple(tokens(task)) for task in MT10])
    for episode in found:
        assert episode.success
        assert episode.terminated
        assert float(episode.reward[-1]) == float(episode.reward.sum()) == 1
    assert shown == 2 * [tuple(tokens(task)) for task in MT10]  # in turn, so every eleventh of 110 is one of each
