"""scripts/single_file_flow_grpo.py, written from the paper with sigma = 1 for noise, and PolicyGradient agree.

On the same noise, captions and reward both must have the same advantages, ratios, KL and gradients: one file that
shares no flow mathematics with the package holds the whole package to the published algorithm.
"""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rlflow.envs.captions import scenes
from rlflow.envs.prompt import PromptEnv
from rlflow.envs.prompts import Prompts
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key, noise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import AllButLast
from rlflow.models.dit import DiT
from rlflow.models.pretrained import lora as lora_files
from rlflow.models.pretrained.pipeline import pretrained
from rlflow.rewards.base import Reward, RewardSet
from rlflow.rl.advantages import GroupAdvantage
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.learners.regularizers import KL
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.clip import Clip
from rlflow.rl.optim import AdamW
from rlflow.types import Rollout

SCRIPT = Path(__file__).parents[3] / "scripts" / "single_file_flow_grpo.py"
K, GROUPS, GROUP_SIZE, BETA, CLIP = 5, 3, 4, 0.3, 2e-3
TOLERANCE = 1e-9  # in float64; the contract is 1e-5


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("single_file_flow_grpo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


paper = load_script()


def redness(images: Tensor, prompt: list[str]) -> Tensor:
    """A reward that differs between samples and between captions."""
    return images[:, 0].mean((1, 2)) * torch.tensor([float(len(text)) for text in prompt])


def jittered(net: DiT, seed: int) -> DiT:
    """Every weight moved, so that no layer is zero and no modulation silent."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return net


class Whole:
    """A small DiT that trains as a whole, and copies of it for the single file."""

    def __init__(self) -> None:
        self.net = self.field = jittered(DiT(scenes.VOCAB, size=8, width=16, depth=2, heads=2).double(), 1)

    def copy(self) -> Any:
        made = paper.Backbone(DiT(**self.net.args).double(), bf16=False)
        made.net.load_state_dict(self.net.state_dict())
        return made

    def move(self, seed: int) -> None:
        jittered(self.net, seed)

    def trained(self) -> dict[str, Tensor]:
        return dict(self.net.named_parameters())


class Guided:
    """Guidance whose unconditional half is a constant, and a LoRA of peft's; the single file has a LoRA of its own."""

    SCALE = 2.0
    SIZES: ClassVar = {"resolution": 16, "max_sequence_length": 8}

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.net: Any = pretrained(folder, lora=2, **self.SIZES).double()
        self.field = CFG(self.net, self.SCALE, detach=True)

    def copy(self) -> Any:
        theirs = pretrained(self.folder, **self.SIZES).double()
        paper.add_lora(theirs.transformer, 2, 4, theirs.adapter.modules)
        with torch.no_grad():
            for name, p in self.trained().items():
                theirs.get_parameter(name).copy_(p)
        return paper.Backbone(theirs, False, self.SCALE, detach=True)

    def move(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.trained().values():
                p += 0.05 * torch.randn(p.shape, generator=rng, dtype=p.dtype)

    def trained(self) -> dict[str, Tensor]:
        found = lora_files.parameters(self.net).items()
        return {n.replace("lora_A.default", "down").replace("lora_B.default", "up"): p for n, p in found}


class Setting:
    """One iteration of rlflow, and what the single file needs to do the same."""

    def __init__(self, std: Any, clip: float, beta: float, old_is_new: bool = True, model: Any = None) -> None:
        self.model = model or Whole()
        self.net, self.reference = self.model.net, self.model.copy()
        self.policy = FlowPolicy(self.model.field, FlowSDE(0.7), num_steps=K)
        self.groups = Groups(GROUPS, GROUP_SIZE)
        prompts = Prompts(tuple({"prompt": text} for text in scenes.train_captions()[:40:8]))
        rewards = RewardSet([Reward("redness", redness)])
        shape = self.policy.event_shape
        self.env = PromptEnv(prompts, rewards, self.groups.num_rows, shape, self.net.tokenize, self.net.decode)
        likelihood = ChainLikelihood()
        self.learner = PolicyGradient(
            self.policy,
            likelihood,
            GroupAdvantage(std=std),
            self.groups,
            optimizer=AdamW(lr=1e-12, max_grad_norm=0.0),  # .grad is left as the loss made it
            objective=Clip(likelihood, clip),
            micro_batch=7,
            kl=KL(beta, "exact"),
        )
        self.model.move(2)  # the reference is what the learner started with
        self.collector = Collector(self.env, self.policy, likelihood, AllButLast(), self.groups, seed=5)
        self.behaviour = self.model.copy()
        self.rollout: Rollout = self.collector.collect(0)
        self.captions = prompts.take(self.env.rows)["prompt"]
        if not old_is_new:
            self.model.move(3)
        self.settings = paper.Settings(K, 0.7, GROUP_SIZE, std, clip, beta, rows=5)

    def noise(self) -> Iterator[Tensor]:
        """The draws of the collector, in the order in which the single file asks for them."""
        draws = [("x_0", 0), *(("step", k) for k in range(K - 1))]
        for purpose, k in draws:
            key = Key(5, f"rollout/{purpose}", k=k)
            yield noise(key, self.groups.row_ids(), self.policy.event_shape, torch.float64)

    def paper_gradients(self) -> tuple[dict[str, float], Tensor, Tensor, dict[str, Tensor]]:
        """Metrics, advantages, samples and gradients of the single file at rlflow's weights."""
        live = self.model.copy()
        final, chain = paper.rollout(self.behaviour, self.captions, self.settings, self.noise())
        reward = redness(live.net.decode(final).float(), self.captions).double()
        advantage, used = paper.group_advantage(reward, GROUP_SIZE, self.settings.std_of)
        metrics = paper.accumulate_gradients(live, self.reference, self.captions, chain, advantage, used, self.settings)
        return metrics, advantage, final, {n: live.net.get_parameter(n).grad for n in self.model.trained()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def gradients_agree(setting: Setting, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Run both, compare samples, advantages, metrics and every gradient; returns rlflow's metrics."""
    theirs, advantage, final, gradients = setting.paper_gradients()
    ours = setting.learner.update(setting.rollout)
    assert relative(setting.rollout.action[0], final) < tolerance
    mine = setting.learner.advantage(setting.rollout, None, None)
    assert relative(mine.advantage[0], advantage) < tolerance
    for name in ("loss", "ratio_mean", "clip_frac"):
        assert ours[f"policy/{name}"] == pytest.approx(theirs[name], rel=tolerance, abs=1e-12), name
    if setting.settings.kl:
        assert theirs["kl"] > 0
        assert ours["kl/ref"] == pytest.approx(theirs["kl"], rel=tolerance)
    size = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    assert size > 1e-4
    for name, p in setting.model.trained().items():
        assert p.grad is not None, name
        error = float((p.grad - gradients[name]).norm())  # the bias of the keys has gradient 0: softmax
        assert error < tolerance * float(gradients[name].norm()) + 1e-14 * size, name
    return ours | {"theirs/first_log_ratio_max": theirs["first_log_ratio_max"]}


@pytest.mark.parametrize("std", ["group", "epoch"])
def test_gradients_at_step_one_are_the_papers(std: str) -> None:
    """Same advantages, ratio 1, same gradients, without a KL term."""
    metrics = gradients_agree(Setting(std, CLIP, beta=0.0))
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-12)
    assert metrics["policy/first_log_ratio_max"] < 1e-12
    assert metrics["theirs/first_log_ratio_max"] < 1e-12
    assert metrics["policy/clip_frac"] == 0


def test_gradients_with_a_kl_term_are_the_papers() -> None:
    """The exact KL to reference weights that differ from the live ones, and its gradient."""
    gradients_agree(Setting("group", CLIP, beta=BETA))


def test_gradients_of_a_guided_lora_with_a_kl_term_are_the_papers(tiny_pipeline) -> None:
    """The iteration that the bench times: ours merges the LoRA, leaves it out of the reference and runs the
    unconditional half without a graph; the paper's loop does none of it. Pictures are float32."""
    metrics = gradients_agree(Setting("group", CLIP, beta=BETA, model=Guided(str(tiny_pipeline("sd3")))), 1e-6)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-12)


def test_gradients_off_policy_are_the_papers() -> None:
    """Weights moved since the rollout: ratios differ from 1, some are clipped, the gradients still agree."""
    metrics = gradients_agree(Setting("group", 1e-3, beta=BETA, old_is_new=False))
    assert 0 < metrics["policy/clip_frac"] < 1


def test_group_without_spread_leaves_the_loss_in_both() -> None:
    """Equal rewards in one group: the other groups' gradients are averaged over fewer rows, not shrunk."""
    setting = Setting("group", CLIP, beta=0.0)
    reward = setting.rollout.reward.clone()
    reward[0, :GROUP_SIZE] = 0.5
    setting.rollout.reward = reward
    ours = setting.learner.advantage(setting.rollout, None, None)
    theirs, used = paper.group_advantage(reward[0], GROUP_SIZE, "group")
    assert relative(ours.advantage[0], theirs) < TOLERANCE
    assert torch.equal(ours.weight[0] > 0, used)
    assert used.tolist() == [False] * GROUP_SIZE + [True] * (2 * GROUP_SIZE)


def test_iterations_of_the_script_run() -> None:
    """The class learns on two captions without error, and its first log-ratio is exactly 0."""
    net = paper.Backbone(jittered(DiT(scenes.VOCAB, width=16, depth=1, heads=1), 1), bf16=True)
    settings = replace(paper.Settings(num_steps=3, group_size=2, rows=4), kl=0.1)
    learner = paper.FlowGRPO(net, lambda images, captions: images.mean((1, 2, 3)), settings, lr=0.03)
    before = [p.detach().clone() for p in learner.parameters]
    metrics = [learner.iterate(scenes.train_captions()[:2]) for _ in range(2)]
    assert all(m["first_log_ratio_max"] == 0 for m in metrics)
    assert metrics[0]["kl"] == 0 < metrics[1]["kl"]
    assert any(not torch.equal(b, p) for b, p in zip(before, learner.parameters, strict=True))
