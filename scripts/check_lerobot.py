"""Tiny random pi0 and SmolVLA of the real LeRobot behind rlflow's adapter; run in an environment of its own:

    pip install 'lerobot[smolvla,pi]==0.6.1' && pip install --no-deps . && python scripts/check_lerobot.py

Says, for each, how far our chain without noise is from LeRobot's own loop, the first log-ratio of an update, and how
far plain LeRobot, with the policy loaded back from disk, is from ours after that update. Fails above 1e-4.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.smolvla import modeling_smolvla, smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from torch import Tensor
from transformers import PaliGemmaConfig, SmolVLMConfig

from rlflow.flow.kernels import FlowSDE
from rlflow.flow.noise import Key
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import OneRandom
from rlflow.models.pretrained.lerobot import LeRobotField, save_policy
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Tree

ROWS, STEPS, LIMIT = 4, 4, 1e-4
FEATURES = {
    "input_features": {
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
        "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
    "chunk_size": 8,
    "n_action_steps": 4,
    "device": "cpu",
}


def batch() -> Tree:
    """What a preprocessor makes: a picture in [0, 1], token numbers, a mask and the state."""
    tokens = torch.randint(5, 90, (ROWS, 6))
    return {
        "observation.images.top": torch.rand(ROWS, 3, 64, 64),
        "observation.state": torch.randn(ROWS, 6),
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": tokens > 20,
    }


def tiny_pi0() -> Any:
    """Layers of width 32 in place of 2048 and 1024."""
    gemma = modeling_pi0.CONFIG_MAPPING["gemma"]
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 32, "image_size": 64}
    small = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    modeling_pi0.CONFIG_MAPPING = {"paligemma": lambda: PaliGemmaConfig(vision_config=vision), "gemma": gemma}
    modeling_pi0.get_gemma_config = lambda variant: modeling_pi0.GemmaConfig(**small)
    config = PI0Config(**FEATURES, dtype="float32", image_resolution=(64, 64), num_inference_steps=STEPS)
    return modeling_pi0.PI0Policy(config)


def tiny_smolvla() -> Any:
    """Two layers of width 48, and ids of the tokens that stand for an image."""
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 100}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}
    config = SmolVLMConfig(text_config={"model_type": "llama", **text}, vision_config=vision, scale_factor=2)
    tokenizer = SimpleNamespace(fake_image_token_id=1, global_image_token_id=2)
    smolvlm_with_expert.AutoConfig = SimpleNamespace(from_pretrained=lambda name: config)
    processor = SimpleNamespace(from_pretrained=lambda name: SimpleNamespace(tokenizer=tokenizer))
    smolvlm_with_expert.AutoProcessor = processor
    asked = {"resize_imgs_with_padding": (64, 64), "num_steps": STEPS, "num_vlm_layers": 2, "load_vlm_weights": False}
    return modeling_smolvla.SmolVLAPolicy(SmolVLAConfig(**FEATURES, **asked))


@torch.no_grad()
def ours(policy: FlowPolicy, obs: Tree, noise: Tensor) -> Tensor:
    """Actions of our chain without noise."""
    return policy.sample(policy.encode(obs), x_0=noise).final[..., :6]


@torch.no_grad()
def theirs(policy: Any, obs: Tree, noise: Tensor) -> Tensor:
    """Actions of LeRobot's loop from the same start."""
    policy.reset()
    return policy.predict_action_chunk(dict(obs), noise=noise)


def check(name: str, make: Callable[[], Any]) -> float:
    """The largest of the three figures, which are printed."""
    torch.manual_seed(0)
    field, obs = LeRobotField(make(), batch()), batch()
    policy, likelihood = FlowPolicy(field, FlowSDE(0.5), num_steps=STEPS), ChainLikelihood("sum")
    noise = torch.randn(ROWS, *field.event_shape)
    border = (ours(policy, obs, noise) - theirs(field.policy, obs, noise)).abs().max().item()
    plan, ids = OneRandom(skip_last=0)(0, policy.grid(STEPS), torch.arange(ROWS)), torch.arange(ROWS)
    with torch.no_grad():
        cond = policy.encode(obs)
        evidence = likelihood.record(policy, cond, policy.sample(cond, plan), Key(0, "check"), ids)
    log_prob = likelihood.score(policy, cond, evidence).log_prob
    ratio = (log_prob - evidence.old_log_prob).abs().max().item()
    trained = [p for p in field.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    (-log_prob.mean() / 100).backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        save_policy(field, folder)
        back = type(field.policy).from_pretrained(folder)
    after = ours(policy, obs, noise)
    saved = (after - theirs(back, obs, noise)).abs().max().item()
    moved = (after - theirs(make(), obs, noise)).abs().max().item()
    numbers = sum(p.numel() for p in trained), sum(p.numel() for p in field.parameters())
    print(f"{name}: loop {border:.1e}  first log-ratio {ratio:.1e}  loaded back {saved:.1e}  moved by {moved:.1e}")
    print(f"{name}: {numbers[0]} of {numbers[1]} parameters train")
    assert moved > 10 * LIMIT, f"{name}: the update changed nothing"
    return max(border, ratio, saved)


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    worst = max(check("pi0", tiny_pi0), check("smolvla", tiny_smolvla))
    assert worst < LIMIT, f"{worst} is above {LIMIT}"


if __name__ == "__main__":
    main()
