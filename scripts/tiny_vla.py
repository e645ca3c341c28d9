"""A small SmolVLA of the real LeRobot on a small task, from cloning to plain LeRobot again (Python 3.12, docs/vla.md):

    cd scripts
    python tiny_vla.py clone policy                       # demonstrations, LeRobot's own loss
    python tiny_vla.py recipe policy > mine.yaml
    rlflow train mine.yaml --run run --trust-code \\
        'env.settings={env_id: "tiny_vla:TinyVLA-v0", chunk: 4, sentence_from: task_description}'
    rlflow export run --format lerobot --out tuned --trust-code
    python tiny_vla.py evaluate policy tuned              # by LeRobot alone

The task: a hand goes to the mark that the sentence names ("go left", ...) and the state tells, in eight steps;
the demonstrators, too slow as a rule, often stop short of it. Success: within .12 of the mark.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

SIDE, STEPS, CHUNK, NEAR, NUM = 64, 8, 4, 0.12, 200
WAYS = {"go left": (-1, 0), "go right": (1, 0), "go up": (0, 1), "go down": (0, -1)}

FIELD = "{{name: lerobot, checkpoint: {policy}, rename: {{observation.image: observation.images.top}}, weights: null}}"
ON_POLICY = f"""\
policy: {{{{field: {FIELD}, precision: float32}}}}
algorithm: {{{{micro_batch: 128, num_minibatches: 4, optimizer: {{{{lr: 5.0e-4, warmup: 2}}}}}}}}
env: {{{{name: gym_vector, num_groups: 64, rows_per_call: 64, horizon: 4}}}}
"""
OTHERS = {
    "vla_sac_flow": f"""\
policy: {{{{field: {FIELD}, precision: float32}}}}
algorithm: {{{{capacity: 8000, lr: 1.0e-4, start: 1024}}}}
env: {{{{name: gym_vector, num_groups: 16, rows_per_call: 16, horizon: 16}}}}
""",
    "vla_dsrl": f"""\
env:
  {{{{name: gym_vector, num_groups: 16, rows_per_call: 16, horizon: 16,
  frozen: {{{{policy: {FIELD}, steering: {{{{chosen: [4, 2]}}}}}}}}}}}}
""",
}
"""Settings beside those of a recipe: all play 20 iterations of 256 decisions."""
REST = """\
train: {{iterations: 20, threads: 1}}
eval: {{num: {num}, noise: zero, every: 0, rows_per_call: 100, video: 0, train_mode: false}}
"""


class TinyVLA(gymnasium.Env):
    """Observed: a picture of the hand, places of hand and mark, a sentence. Action: velocity, up to .3."""

    def __init__(self) -> None:
        box = gymnasium.spaces.Box
        spaces = {"pixels": box(0, 255, (SIDE, SIDE, 3), np.uint8), "agent_pos": box(-2, 2, (4,), np.float32)}
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = box(-0.3, 0.3, (2,), np.float32)
        self.task_description = next(iter(WAYS))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """A sentence, a distance, the hand near the middle."""
        super().reset(seed=seed)
        self.task_description = list(WAYS)[self.np_random.integers(len(WAYS))]
        self.hand = self.np_random.uniform(-0.2, 0.2, 2)
        self.mark = self.np_random.uniform(0.6, 1.2) * np.array(WAYS[self.task_description])
        return self._seen(), {}

    def _seen(self) -> dict[str, np.ndarray]:
        picture = np.full((SIDE, SIDE, 3), 40, np.uint8)
        x, y = ((self.hand + 1.6) / 3.2 * SIDE).clip(3, SIDE - 4).astype(int)
        picture[y - 3 : y + 4, x - 3 : x + 4] = (255, 200, 0)
        return {"pixels": picture, "agent_pos": np.array([*self.hand, *self.mark], np.float32)}

    def step(self, action: np.ndarray) -> Any:
        """Move the hand."""
        self.hand = self.hand + np.clip(action, -0.3, 0.3)
        done = bool(np.abs(self.hand - self.mark).max() < NEAR)
        return self._seen(), float(done), done, False, {"is_success": done}

    def expert(self, gain: float) -> np.ndarray:
        """(STEPS, 2) of a demonstrator who covers the share `gain` of the way in six steps."""
        return np.tile(gain * (self.mark - self.hand) / 6, (STEPS, 1))


gymnasium.register("TinyVLA-v0", entry_point=TinyVLA, max_episode_steps=STEPS)


def demonstrations(num: int) -> dict[str, Any]:
    """Observations of both decisions of an episode, and the chunks of actions from there on."""
    env, rng, rows = TinyVLA(), np.random.default_rng(0), []
    for seed in range(num):
        env.reset(seed=seed)
        actions = env.expert(rng.uniform(0.45, 0.85)) + rng.normal(0, 0.02, (STEPS, 2))
        for at in range(STEPS):
            if at % CHUNK == 0:
                chunk = np.concatenate([actions[at:], np.zeros((STEPS, 2))])[:STEPS]
                rows.append((env._seen(), env.task_description, chunk))
            env.step(actions[at])
    seen = {name: torch.from_numpy(np.stack([row[0][name] for row in rows])) for name in ("pixels", "agent_pos")}
    actions = torch.from_numpy(np.stack([row[2] for row in rows])).float()
    return {**seen, "task": [row[1] for row in rows], "action": actions}


def clone(folder: Path, steps: int, rows: int = 32) -> None:
    """A new policy, cloned by its own loss."""
    from lerobot.policies.factory import make_pre_post_processors

    from rlflow.models.lerobot import tiny

    torch.manual_seed(0)
    data = demonstrations(400)

    def spread(v: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": v.mean(0), "std": v.std(0) + 1e-3, "min": v.amin(0), "max": v.amax(0)}

    stats = {"observation.state": spread(data["agent_pos"]), "action": spread(data["action"].flatten(0, 1))}
    policy = tiny.smolvla(
        folder, chunk=STEPS, n_action_steps=CHUNK, image=SIDE, state=4, actions=2, stats=stats, train_expert_only=False
    )
    before, _ = make_pre_post_processors(policy.config, str(folder))
    images = data["pixels"].permute(0, 3, 1, 2).float() / 255
    whole = {"observation.images.top": images, "observation.state": data["agent_pos"], "action": data["action"]}
    batch = {n: v for n, v in before({**whole, "task": data["task"]}).items() if isinstance(v, torch.Tensor)}
    policy.train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(data["action"]), (rows,))
        loss, _ = policy.forward({n: v[chosen] for n, v in batch.items() if len(v) == len(data["action"])})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    policy.eval().save_pretrained(folder)


@torch.no_grad()
def evaluate(folder: Path) -> float:
    """Success of NUM held-out episodes by LeRobot alone, every chain from zero noise."""
    from lerobot.envs.utils import preprocess_observation
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from rlflow.envs.seeds import episode_seeds, evaluation_seeds  # the starts of rlflow's evaluation

    policy = SmolVLAPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, str(folder))
    seeds = episode_seeds(evaluation_seeds(0, NUM), torch.zeros(NUM, dtype=torch.long))
    envs, done = [TinyVLA() for _ in range(NUM)], np.zeros(NUM, bool)
    seen = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
    policy.reset()
    for _ in range(STEPS):
        raw = {name: np.stack([row[name] for row in seen]) for name in ("pixels", "agent_pos")}
        batch = preprocess_observation(raw)
        batch["observation.images.top"] = batch.pop("observation.image")
        batch = before({**batch, "task": [env.task_description for env in envs]})
        action = after(policy.select_action(batch, noise=torch.zeros(NUM, STEPS, policy.config.max_action_dim)))
        for i in np.flatnonzero(~done):
            seen[i], _, done[i], _, _ = envs[i].step(action[i].numpy())
    return float(done.mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clone", "recipe", "evaluate"))
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--steps", type=int, default=500, help="of cloning")
    parser.add_argument("--base", default="vla_pirl_flow_sde", help="the recipe that learns")
    args = parser.parse_args()
    for folder in args.folders:
        if args.what == "clone":
            clone(Path(folder), args.steps)
        elif args.what == "recipe":
            text = f"base: {args.base}\n" + OTHERS.get(args.base, ON_POLICY) + REST
            print(text.format(policy=Path(folder).resolve(), num=NUM))
        else:
            print(f"{folder}: success {evaluate(Path(folder)):.3f} of {NUM}")


if __name__ == "__main__":
    main()
