"""Flow-GRPO in one file: an executable specification, written from the paper in ITS convention.

Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL" (arXiv:2505.05470). Time is sigma, from 1
(noise) to 0 (data): x_sigma = (1 - sigma) data + sigma noise, and the network predicts v = noise - data. Read it
from top to bottom; tests/rl/learners/test_single_file.py holds rlflow to the same gradients.

Nothing of rlflow's flow mathematics, learners or trainer is used. The package lends the network with its weights
(converted at the border, in `Backbone`), the captions and the reward. The form of the paper's experiments, with
guidance, a LoRA and the KL to the network without it, is `add_lora` and two settings of `Backbone`.

    python scripts/single_file_flow_grpo.py --iterations 20
    python scripts/single_file_flow_grpo.py --guidance 2 --lora 8 --kl 0.04
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlflow.envs.captions import scenes
from rlflow.flow.field import VelocityField
from rlflow.models.dit import DiT
from rlflow.models.io import embedded, load_field
from rlflow.rewards.shapes import shapes_soft, shapes_strict
from rlflow.types import Cond


@dataclass(frozen=True)
class Settings:
    """a = `noise_level`, eps = `clip`, beta = `kl`, K = `num_steps`; `rows` samples are scored at once."""

    num_steps: int = 8
    noise_level: float = 0.7
    group_size: int = 16
    std_of: str = "group"  # whose rewards scale the advantage: the "group"'s or the "epoch"'s
    clip: float = 2e-3
    kl: float = 0.0
    max_grad_norm: float = 1.0
    rows: int = 96


@dataclass(frozen=True)
class Transition:
    """One denoising step of N samples, as it was taken: states (N, C, H, W), its times, log-density (N,)."""

    x: Tensor
    x_next: Tensor
    sigma: float
    sigma_next: float
    log_prob: Tensor


class LowRank(nn.Module):
    """y = W x + b + (alpha / r) B A x, of which A and B train (Hu et al. 2021); B begins at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale, self.on = base, alpha / rank, True
        like = {"bias": False, "dtype": base.weight.dtype}
        self.down, self.up = nn.Linear(base.in_features, rank, **like), nn.Linear(rank, base.out_features, **like)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The base alone when switched off."""
        y = self.base(x)
        return y + self.up(self.down(x)) * self.scale if self.on else y


def add_lora(net: nn.Module, rank: int, alpha: float, ends: Sequence[str]) -> None:
    """Freeze a network and put a LoRA on its linear layers whose names end so."""
    net.requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{end}") for end in ends):
            parent, _, own = name.rpartition(".")
            setattr(net.get_submodule(parent), own, LowRank(layer, rank, alpha))


class Backbone:
    """The package's network in this file's convention: its own time is 1 - sigma, its velocity data - noise.

    Guidance is v_null + w (v - v_null), both halves in one pass; with `detach` the unconditional half is a constant.
    """

    def __init__(self, net: VelocityField, bf16: bool = True, guidance: float = 1.0, detach: bool = False) -> None:
        self.net, self.bf16, self.guidance, self.detach = net, bf16, guidance, detach

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """The network as it was before training, if it trains a LoRA."""
        layers = [layer for layer in self.net.modules() if isinstance(layer, LowRank)]
        for layer in layers:
            layer.on = False
        yield
        for layer in layers:
            layer.on = True

    def precision(self) -> torch.autocast:
        """The network alone runs in bfloat16; everything outside is at least float32."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def encode(self, captions: Sequence[str]) -> Cond:
        """What the network is conditioned on, for N captions; the word embeddings train."""
        with self.precision():
            return self.net.encode(self.net.tokenize(list(captions)))

    def velocity(self, x: Tensor, sigma: float, cond: Cond) -> Tensor:
        """v = noise - data at x (N, C, H, W)."""
        if self.guidance == 1:
            return self._velocity(x, sigma, cond)
        both = Cond.cat([self.net.null(cond), cond])
        v_null, v = self._velocity(torch.cat([x, x]), sigma, both).chunk(2)
        v_null = v_null.detach() if self.detach else v_null
        return v_null + self.guidance * (v - v_null)

    def _velocity(self, x: Tensor, sigma: float, cond: Cond) -> Tensor:
        time_of_net = x.new_full((len(x),), 1 - sigma)
        with self.precision():
            return -self.net(x, time_of_net, torch.zeros_like(time_of_net), cond).to(x.dtype)


# -- the chain ---------------------------------------------------------------------------------------------------


def sde_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float, noise_level: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of the next state, with dt = sigma_next - sigma < 0:

    dx = [v + g^2 / (2 sigma) (x + (1 - sigma) v)] dt + g dW,   g = a sqrt(sigma / (1 - sigma))
    At sigma = 1 the released code puts the first grid point after it into the denominator of g.
    """
    dt = sigma_next - sigma
    g = noise_level * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    mean = x + (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
    return mean, g * math.sqrt(-dt)


def log_density(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian log-density (N,), averaged over pixels and not summed: the clip range is made for this scale."""
    z = (x_next - mean) / std
    return (-0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


@torch.no_grad()
def rollout(
    net: Backbone, captions: Sequence[str], settings: Settings, noise: Iterator[Tensor]
) -> tuple[Tensor, list[Transition]]:
    """Samples (N, C, H, W) and the K - 1 stochastic steps that led to them.

    `noise` yields x at sigma = 1, then one standard normal a step. The step into the data is an Euler step of the
    ODE: noise added there would stay in the picture.
    """
    x, cond, chain = next(noise), net.encode(captions), []
    sigmas = [1 - k / settings.num_steps for k in range(settings.num_steps + 1)]
    for sigma, sigma_next in itertools.pairwise(sigmas[:-1]):
        mean, std = sde_step(x, net.velocity(x, sigma, cond), sigma, sigma_next, settings.noise_level)
        x_next = mean + std * next(noise)
        chain.append(Transition(x, x_next, sigma, sigma_next, log_density(x_next, mean, std)))
        x = x_next
    return x - sigmas[-2] * net.velocity(x, sigmas[-2], cond), chain


# -- the objective -----------------------------------------------------------------------------------------------


def group_advantage(reward: Tensor, group_size: int, std_of: str) -> tuple[Tensor, Tensor]:
    """A = (r - mean of its group) / (std + 1e-4), clipped to +-5, and which rows (N,) carry a signal.

    Where all members of a group have the same reward there is nothing to learn: it leaves the mean of the loss.
    """
    groups = reward.reshape(-1, group_size)
    spread = groups.std(1, correction=0, keepdim=True)
    scale = spread if std_of == "group" else reward.std(correction=0)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (scale + 1e-4)).clamp(-5, 5)
    return advantage.flatten(), (spread > 1e-6).expand_as(groups).flatten()


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - eps, 1 + eps)), elementwise."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def kl_to_reference(mean: Tensor, ref_mean: Tensor, std: float) -> Tensor:
    """KL (N,) between two Gaussians of equal std, |mean - ref_mean|^2 / (2 std^2), averaged over pixels."""
    return ((mean - ref_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


def accumulate_gradients(
    net: Backbone,
    reference: Backbone,
    captions: Sequence[str],
    chain: Sequence[Transition],
    advantage: Tensor,
    used: Tensor,
    settings: Settings,
) -> dict[str, float]:
    """Gradient of E[clipped loss] + beta E[KL] over all samples and steps, into .grad; returns the statistics."""
    num_pairs, num_used = len(chain) * len(used), max(1, len(chain) * int(used.sum()))
    total = dict.fromkeys(("loss", "ratio_mean", "clip_frac", "kl", "first_log_ratio_max"), 0.0)
    for step, start in itertools.product(chain, range(0, len(used), settings.rows)):
        rows = slice(start, start + settings.rows)
        x, a, weight = step.x[rows], advantage[rows], used[rows].to(advantage) / num_used
        times = step.sigma, step.sigma_next, settings.noise_level
        mean, std = sde_step(x, net.velocity(x, step.sigma, net.encode(captions[rows])), *times)
        log_ratio = log_density(step.x_next[rows], mean, std) - step.log_prob[rows]
        ratio = log_ratio.exp()
        loss = (clipped_loss(ratio, a, settings.clip) * weight).sum()
        total["loss"] += loss.item()
        if settings.kl:
            with torch.no_grad(), reference.without_lora():
                v_ref = reference.velocity(x, step.sigma, reference.encode(captions[rows]))
            kl = kl_to_reference(mean, sde_step(x, v_ref, *times)[0], std).sum() / num_pairs
            total["kl"] += kl.item()
            loss = loss + settings.kl * kl
        loss.backward()
        cut = torch.where(a > 0, ratio > 1 + settings.clip, ratio < 1 - settings.clip) & (a != 0)
        total["ratio_mean"] += (ratio.detach() * weight).sum().item()
        total["clip_frac"] += (cut * weight).sum().item()
        total["first_log_ratio_max"] = max(total["first_log_ratio_max"], log_ratio.abs().max().item())
    return total


# -- the loop ----------------------------------------------------------------------------------------------------


class FlowGRPO:
    """`iterate(captions)` samples a group for every caption and takes one AdamW step."""

    def __init__(
        self, net: Backbone, reward: Callable[..., Tensor], settings: Settings, lr: float = 2e-4, seed: int = 0
    ) -> None:
        self.net, self.reward, self.settings = net, reward, settings
        self.parameters = [p for p in net.net.parameters() if p.requires_grad]
        lora = any(isinstance(layer, LowRank) for layer in net.net.modules())
        self.reference = copy.deepcopy(net) if settings.kl and not lora else net
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, num: int) -> Iterator[Tensor]:
        """Standard normals (num, C, H, W), without end."""
        while True:
            yield torch.randn((num, *self.net.net.event_shape), generator=self.generator)

    def iterate(self, captions: Sequence[str]) -> dict[str, float]:
        """One iteration on G samples of each caption; returns metrics."""
        s, repeated = self.settings, [c for c in captions for _ in range(self.settings.group_size)]
        final, chain = rollout(self.net, repeated, s, self.noise(len(repeated)))
        reward = self.reward(self.net.net.decode(final), repeated)
        advantage, used = group_advantage(reward, s.group_size, s.std_of)
        self.optimizer.zero_grad()
        out = accumulate_gradients(self.net, self.reference, repeated, chain, advantage, used, s)
        norm = nn.utils.clip_grad_norm_(self.parameters, s.max_grad_norm)
        self.optimizer.step()
        return {"reward": reward.mean().item(), "used_frac": used.float().mean().item(), "grad_norm": norm.item()} | out


def shapes_reward(images: Tensor, captions: list[str]) -> Tensor:
    """Half for the share of the caption that is right, half for all of it."""
    return 0.5 * shapes_soft(images, captions) + 0.5 * shapes_strict(images, captions)


def load_network() -> DiT:
    """The embedded shapes model; untrained where the package comes without it."""
    return load_field("shapes") if "shapes" in embedded() else DiT(scenes.VOCAB)


def main(argv: list[str] | None = None) -> None:
    """Train and print one JSON line an iteration."""
    p = argparse.ArgumentParser(description="Flow-GRPO on the embedded shapes model")
    p.add_argument("--iterations", type=int, default=20)
    p.add_argument("--prompts", type=int, default=6, help="captions an iteration")
    p.add_argument("--group-size", type=int, default=16)
    p.add_argument("--steps", type=int, default=8, help="K, denoising steps")
    p.add_argument("--kl", type=float, default=0.0, help="beta")
    p.add_argument("--guidance", type=float, default=1.0, help="w; 1 is none")
    p.add_argument("--lora", type=int, default=0, help="rank; 0 trains the whole network")
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--float32", action="store_true", help="no bfloat16 in the network")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    settings = Settings(num_steps=a.steps, group_size=a.group_size, kl=a.kl, std_of="epoch")
    torch.manual_seed(a.seed)
    net = load_network()
    if a.lora:
        add_lora(net, a.lora, 2 * a.lora, ("qkv", "attend"))
    backbone = Backbone(net, not a.float32, a.guidance, detach=True)
    learner = FlowGRPO(backbone, shapes_reward, settings, a.lr, a.seed)
    captions, order = scenes.train_captions(("pair",)), torch.Generator().manual_seed(a.seed)
    for iteration in range(a.iterations):
        begin = time.perf_counter()
        chosen = torch.randint(len(captions), (a.prompts,), generator=order).tolist()
        metrics = learner.iterate([captions[i] for i in chosen])
        print(json.dumps({"iteration": iteration, "seconds": time.perf_counter() - begin} | metrics), flush=True)


if __name__ == "__main__":
    main()
