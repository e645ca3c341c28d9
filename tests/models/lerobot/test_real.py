"""The real LeRobot, on small random policies: run where it is installed (Python 3.12, docs/vla.md)."""

import copy
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("lerobot")

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

import rlflow as rf
from rlflow import registry
from rlflow.config import recipes
from rlflow.cost.estimate import Planner
from rlflow.cost.gpus import find_gpu
from rlflow.cost.plan import plan_as_json
from rlflow.datasets.actions import bounds_of
from rlflow.datasets.out import export_demos
from rlflow.datasets.to_lerobot import ToLeRobot
from rlflow.deploy.for_lerobot import export_policy
from rlflow.deploy.record import record
from rlflow.deploy.runs import Asked
from rlflow.envs.conformance import CHECKS, Subject
from rlflow.envs.wrappers import Decoded
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.io import load_field, save_field
from rlflow.models.lerobot import tiny
from rlflow.models.lerobot.export import save_policy
from rlflow.models.lerobot.field import LeRobotField
from rlflow.models.lerobot.opening import lerobot
from rlflow.models.lerobot.processors import PolicyProcessors
from rlflow.train.trainer import Trainer
from rlflow.types import as_bytes

MEAN, STD = torch.tensor([256.0, 200.0]), torch.tensor([80.0, 120.0])
STATS = {"observation.state": {"mean": MEAN, "std": STD}, "action": {"mean": MEAN, "std": STD}}
RENAME = {"observation.image": "observation.images.top"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("smolvla")
    tiny.smolvla(found, state=2, actions=2, stats=STATS)
    return found


def observed(num: int = 5) -> dict[str, torch.Tensor]:
    """As PushT shows itself, with sentences of different lengths."""
    words = [["push the T", "now"][i % 2] for i in range(num)]
    pixels, place = torch.randint(0, 256, (num, 64, 64, 3), dtype=torch.uint8), 512 * torch.rand(num, 2)
    return {"pixels": pixels, "agent_pos": place, "task": as_bytes(words, 64)}


def plain(folder: Path, obs, noise, num: int | None = None) -> torch.Tensor:
    """Actions by LeRobot alone: its observation, its processors, its loop; the first `num` through its own queue."""
    policy = SmolVLAPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, str(folder))
    raw = {"pixels": obs["pixels"].numpy(), "agent_pos": obs["agent_pos"].numpy()}
    batch = {RENAME.get(n, n): v for n, v in preprocess_observation(raw).items()}
    words = [bytes(row).rstrip(b"\0").decode() for row in obs["task"].numpy()]
    batch = before(batch | {"task": words})
    if num is None:
        return after(policy.predict_action_chunk(batch, noise=noise))
    return torch.stack([after(policy.select_action(dict(batch), noise=noise)) for _ in range(num)], 1)


def ours(field: LeRobotField, obs, noise, num_steps: int = 4) -> torch.Tensor:
    policy = FlowPolicy(field, FlowSDE(0.5), num_steps=num_steps)
    with torch.no_grad():
        return field.decode(policy.sample(policy.encode(obs), x_0=noise).final)


def moved(field: LeRobotField) -> LeRobotField:
    """With every trained number elsewhere, as after an update."""
    rng = torch.Generator().manual_seed(1)
    for p in field.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    return field


@pytest.mark.parametrize("version", ["pi0", "pi05"])
def test_the_chain_without_noise_is_the_loop_of_pi(version):
    with tiny.narrow(import_module(f"lerobot.policies.{version}.modeling_{version}")):
        field = LeRobotField(tiny.pi(version), tiny.batch(3))
    batch, noise = tiny.batch(3), torch.randn(3, *field.event_shape)
    policy = FlowPolicy(field, FlowSDE(0.5), num_steps=4)
    with torch.no_grad():
        found = policy.sample(policy.encode(batch), x_0=noise).final[..., :6]
    torch.testing.assert_close(found, field.policy.predict_action_chunk(batch, noise=noise), rtol=1e-5, atol=1e-5)
    assert not policy.encoder_trains
    assert all("expert" in n or "action" in n or "time" in n or "state" in n for n in field.state_dict())


def test_observations_and_actions_go_through_the_policys_own_processors(folder):
    """From an environment's observation to an action in its units: LeRobot's numbers, to rounding (it pads words to the
    longest, we to the most there can be)."""
    field, obs = lerobot(str(folder), rename=RENAME), observed()
    noise = torch.randn(5, *field.event_shape)
    torch.testing.assert_close(ours(field, obs, noise), plain(folder, obs, noise), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(field.processors.unit(), STD, msg="one unit of the noise is a joint's std")
    assert "one unit of its noise is [80, 120]" in field.begun_from


@pytest.mark.parametrize("lora", [None, 3], ids=["expert", "lora"])
def test_plain_lerobot_runs_what_was_saved(folder, tmp_path, lora):
    settings = {} if lora is None else {"lora": lora}
    field, obs = lerobot(str(folder), rename=RENAME, **settings), observed()
    noise = torch.randn(5, *field.event_shape)
    first = ours(field, obs, noise)
    wanted = ours(moved(field), obs, noise, num_steps=3)
    save_policy(field, tmp_path, n_action_steps=2, num_steps=3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_action_steps"], config["num_steps"]) == (2, 3)
    torch.testing.assert_close(plain(tmp_path, obs, noise, num=2), wanted[:, :2], rtol=1e-4, atol=1e-2)
    assert (wanted - first).abs().max() > 1, "something moved"
    if lora is not None:
        assert not [name for name in SmolVLAPolicy.from_pretrained(tmp_path).state_dict() if "lora" in name]


def test_a_checkpoint_holds_what_trained_and_is_the_same_field(folder, tmp_path):
    field, obs = moved(lerobot(str(folder), rename=RENAME, lora=3)), observed()
    save_field(field, tmp_path)
    assert (tmp_path / "trained.safetensors").stat().st_size < 0.2 * (folder / "model.safetensors").stat().st_size
    noise = torch.randn(5, *field.event_shape)
    back = load_field(str(tmp_path))
    torch.testing.assert_close(ours(back, obs, noise), ours(field, obs, noise), rtol=0, atol=0)


def test_a_lora_is_on_the_attention_of_the_expert_alone(folder):
    field = lerobot(str(folder), lora=3)
    trained = [n for n, p in field.named_parameters() if p.requires_grad]
    assert trained
    assert all("lm_expert" in n and "lora_" in n and "_proj" in n for n in trained)
    with pytest.raises(ValueError, match=r"no linear layer of the expert ends in \['to_q'\]; some: .*q_proj"):
        lerobot(str(folder), lora=3, lora_modules=["to_q"])


def test_frozen_weights_can_be_bfloat16(folder):
    field = lerobot(str(folder), weights="bfloat16", rename=RENAME)
    assert {p.dtype for p in field.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in field.parameters() if not p.requires_grad} == {torch.bfloat16}
    policy = FlowPolicy(field, FlowSDE(0.5), num_steps=2, autocast=torch.bfloat16)
    with torch.no_grad():
        assert policy.sample(policy.encode(observed(2))).final.isfinite().all()


def test_real_time_chunking_is_off_here_and_on_again_in_what_is_saved(folder, tmp_path):
    policy = SmolVLAPolicy.from_pretrained(folder)
    policy.config.rtc_config = RTCConfig(enabled=True)
    policy.init_rtc_processor()
    with pytest.raises(ValueError, match="real-time chunking"):
        LeRobotField(
            policy, {n: v[..., :2] if v.ndim == 2 and n.endswith("state") else v for n, v in tiny.batch(3).items()}
        )
    on = tmp_path / "on"
    policy.save_pretrained(on)
    for part in make_pre_post_processors(policy.config, str(folder)):
        part.save_pretrained(on)
    field = lerobot(str(on), rename=RENAME)
    assert field.policy.config.rtc_config is None
    assert "real-time chunking off" in field.begun_from
    save_policy(field, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["rtc_config"]["enabled"]


def test_what_does_not_fit_says_so(folder, tmp_path):
    with pytest.raises(ValueError, match="is no policy of LeRobot's"):
        lerobot(str(tmp_path))
    ACTConfig()._save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a act: policies that are opened are pi0, pi05, smolvla"):
        lerobot(str(tmp_path))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="has no model.safetensors"):
        lerobot(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"looks at \['observation.images.top'\].*observation.image.*policy.field.rename"
    ):
        lerobot(str(folder)).encode(observed(2))
    policy = SmolVLAPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, str(folder))

    class RelativeActionsProcessorStep:
        enabled = True

    steps = copy.copy(before)
    steps.steps = [*before.steps, RelativeActionsProcessorStep()]
    with pytest.raises(ValueError, match="relative to the state"):
        PolicyProcessors(steps, after, policy.config, "it", {}, {})


def test_lerobots_pusht_shows_and_takes_what_lerobot_says(folder):
    size = {"observation_height": 64, "observation_width": 64}
    spec = {"name": "lerobot", "type": "pusht", "chunk": 3, "max_steps": 6, "options": size}
    env = registry.build("env", "env.settings", spec, {"num_envs": 2, "gamma": 0.9})
    obs = env.reset(torch.tensor([3, 4]))
    raw, _ = env.sim.sim.envs[0].reset(seed=3)
    found = preprocess_observation({n: np.asarray(v)[None] for n, v in raw.items()})
    assert torch.equal(obs["observation.image"][0].float() / 255, found["observation.image"][0])
    torch.testing.assert_close(obs["observation.state"][:1], found["observation.state"])
    field = lerobot(str(folder), rename=RENAME)
    acted = Decoded(env, field.decode, field.event_shape)
    env.reset(torch.tensor([3, 4]))
    seen = []
    env.sim.sim.envs[0].step = lambda action, step=env.sim.sim.envs[0].step: (seen.append(action), step(action))[1]
    x = torch.randn(2, *field.event_shape) * 0.3
    step = acted.step(x)
    torch.testing.assert_close(torch.tensor(np.stack(seen)), field.decode(x)[0, :3], rtol=1e-5, atol=1e-3)
    assert step.num_steps.tolist() == [3, 3]
    assert acted.step(x).truncated.all()
    with pytest.raises(ValueError, match="plans 8 actions, the environment carries out 12.*env.settings.chunk=8"):
        Decoded(
            registry.build("env", "env.settings", spec | {"chunk": 12}, {"num_envs": 1, "gamma": 0.9}),
            field.decode,
            (8, 8),
        )


def pusht(chunk: int, max_steps: int):
    size = {"observation_height": 32, "observation_width": 32}
    spec = {"name": "lerobot", "type": "pusht", "chunk": chunk, "max_steps": max_steps, "options": size}
    return lambda num: registry.build("env", "env.settings", spec, {"num_envs": num, "gamma": 0.9})


@pytest.mark.parametrize("one", CHECKS, ids=lambda check: check.__name__)
def test_lerobots_pusht_conforms(one):
    one(Subject(pusht(2, 6), pusht(2, 20), pusht(1, 6), gamma=0.9))


def test_success_is_what_lerobot_says():
    env = pusht(1, 1)(2)
    env.reset(torch.tensor([3, 4]))
    world = env.sim.sim.envs[1]
    world.step = lambda action, step=world.step: (*step(action)[:2], True, False, {"is_success": True})
    step = env.step(torch.zeros(2, 1, 2))
    assert step.info["success"].tolist() == [0, 1]
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([False, True], [True, False])


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """One iteration of a recipe in PushT."""
    found = tmp_path_factory.mktemp("runs") / "run"
    looks = f"{{name: lerobot, checkpoint: {folder}, rename: {{observation.image: observation.images.top}}}}"
    sizes = "{observation_height: 64, observation_width: 64}"
    few = [f"policy.field={looks}", "policy.precision=float32", "env.num_groups=4", "env.horizon=4", "eval.num=4"]
    few += [f"env.settings={{type: pusht, chunk: 3, max_steps: 12, options: {sizes}}}", "train.iterations=1"]
    Trainer("vla_pirl_flow_sde", found, overrides=[*few, "train.tensorboard=false", "eval.video=0"], quiet=True).fit()
    return found


def test_plain_lerobot_acts_as_the_run_that_was_exported(run, tmp_path):
    saved = export_policy(run, tmp_path / "tuned")
    config = json.loads((saved / "config.json").read_text())
    assert (config["n_action_steps"], config["num_steps"]) == (3, 4)
    policy, obs, noise = rf.load(run), observed(2), torch.randn(2, 8, 8)
    with torch.no_grad():
        chunk = policy.field.unguided.decode(policy.sample(policy.encode(obs), x_0=noise).final)
    torch.testing.assert_close(plain(saved, obs, noise, 3), chunk[:, :3], atol=1e-3, rtol=1e-4)


def test_lerobot_opens_the_rollouts_of_its_own_policy(run, tmp_path):
    """Recorded by rlflow, exported, read by LeRobot: what the policy did, in PushT's pixels."""
    demos = record(run, tmp_path / "demos", Asked(num=2, seed=5))
    export_demos(tmp_path / "demos", tmp_path / "out", ToLeRobot())
    found = LeRobotDataset("own", root=tmp_path / "out")
    assert found.num_episodes == 2
    bounds = bounds_of(pusht(1, 6)(1))
    torch.testing.assert_close(found[0]["action"], bounds(demos.actions(torch.tensor([0])))[0].flatten())
    assert found[0]["observation.state"].shape == (2,)


def test_a_smolvla_of_the_published_sizes_fits_a_card_of_24_gb():
    """Its 350 M frozen numbers in bfloat16; of the 100 M that train a copy, an average, two moments, gradients."""
    planner = Planner(recipes.load("vla_pirl_flow_sde"))
    found = plan_as_json(planner, find_gpu("24GB"), 1)
    parts = found["memory_bytes"]
    assert found["fits"]
    assert found["peak_bytes"] / 1e9 == pytest.approx(6.9, abs=0.1), parts
