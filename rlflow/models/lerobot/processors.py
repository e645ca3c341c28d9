"""A LeRobot policy's own processors between an environment and the policy: names, words, normalisation, units.

An environment's observation is a dict of tensors as Gymnasium robots have them: pictures (N, H, W, C) uint8, one under
"pixels" or several in a dict of that name, "agent_pos" for the state, "task" for a sentence as bytes (`sentences`).
They get LeRobot's names (observation.image, observation.images.NAME, observation.state), and any entry that is named so
already keeps its name. Actions come back in the environment's own units: one unit of the chain is the std of that joint
in the demonstrations (mean and std normalisation) or half its range (min and max, quantiles).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.types import Tree, num_rows, sentences

NAMES = {"agent_pos": "observation.state", "state": "observation.state", "pixels": "observation.image"}
NAMES |= {"environment_state": "observation.environment_state"}
TASK = "task"
CHANNELS = 4


def flat(obs: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Entries of an observation under LeRobot's names."""
    if not isinstance(obs, dict):
        yield "observation.state", obs
        return
    for name, value in obs.items():
        if name == TASK:
            continue
        if isinstance(value, dict):
            for inner, part in value.items():
                yield (f"observation.images.{inner}" if name == "pixels" else f"observation.{name}.{inner}"), part
        else:
            yield (name if name.startswith("observation.") else NAMES.get(name, f"observation.{name}")), value


def as_picture(value: Tensor) -> Tensor:
    """(N, C, H, W) float32 in [0, 1] of pictures of bytes, whose channels may stand last; others as they are."""
    if value.dtype != torch.uint8 or value.ndim != 4:
        return value
    return (value.permute(0, 3, 1, 2) if value.shape[-1] <= CHANNELS else value).contiguous().float() / 255


class PolicyProcessors:
    """The pipelines of a checkpoint; `source` is where they are saved from again.

    `rename`: an entry's name (as LeRobot has it) to the policy's, where they differ. `restored`: settings of the config
    that were changed to run the policy here, as they were. ValueError for steps that carry something from an
    observation to its action (relative actions): their chunk would be of another row.
    """

    def __init__(
        self, before: Any, after: Any, config: Any, source: str, rename: Mapping[str, str], restored: Mapping[str, Any]
    ):
        self.source, self.rename, self.restored = source, dict(rename), dict(restored)
        self._before, self._after = before, after
        for pipeline in (before, after):
            for step in pipeline.steps:
                if type(step).__name__.startswith(("Relative", "Absolute")) and getattr(step, "enabled", True):
                    raise ValueError(
                        f"{source} has actions relative to the state (use_relative_actions): not supported"
                    )
                if getattr(step, "padding", None) == "longest":
                    step.padding = "max_length"  # conditions of different calls are put together; masked, as ever
            pipeline.steps = [step for step in pipeline.steps if type(step).__name__ != "DeviceProcessorStep"]
        self.asked = {name: tuple(feature.shape) for name, feature in config.input_features.items()}
        self.optional = sum("empty_camera" in name for name in self.asked)
        self.num_actions = int(config.output_features["action"].shape[0])

    def before(self, obs: Tree) -> dict[str, Tensor]:
        """The policy's batch of an environment's observations (N, ...); ValueError names what it lacks."""
        seen = {self.rename.get(name, name): as_picture(value) for name, value in flat(obs)}
        lacks = [name for name in self.asked if name not in seen and "empty_camera" not in name]
        if lacks:
            raise ValueError(
                f"the policy looks at {lacks}, the environment shows {sorted(seen)}: say which is which by "
                f"policy.field.rename, such as {{{next(iter(seen))}: {lacks[0]}}}"
            )
        told = obs.get(TASK) if isinstance(obs, dict) else None
        words = [""] * num_rows(obs) if told is None else sentences(told)
        batch = self._before({**{n: v for n, v in seen.items() if n in self.asked}, TASK: words})
        like = next(iter(seen.values()))
        return {n: v.to(like.device) for n, v in self.chosen(batch).items()}

    def chosen(self, made: dict[str, Any]) -> dict[str, Tensor]:
        """What the policy reads of what the pipeline made, as tensors that lead with rows."""
        return {n: v for n, v in made.items() if isinstance(v, Tensor) and n.startswith("observation.")}

    def after(self, x: Tensor) -> Tensor:
        """Actions (N, H, A) in the environment's units of samples (N, H, D)."""
        made: Tensor = self._after(x[..., : self.num_actions].float())
        return made.to(x.device)

    def unit(self) -> Tensor:
        """(A,) of one unit of the chain, in those of the environment's actions."""
        zero, one = torch.zeros(1, 1, self.num_actions), torch.ones(1, 1, self.num_actions)
        return (self.after(one) - self.after(zero)).flatten()

    def example(self) -> dict[str, Tensor]:
        """A batch of three rows: noise for pictures, no words."""
        shapes = {n: s for n, s in self.asked.items() if "empty_camera" not in n}
        return self.before({n: torch.rand(3, *s) if len(s) == 3 else torch.zeros(3, *s) for n, s in shapes.items()})

    def save(self, folder: Path) -> None:
        """Those of the checkpoint, as they lay there."""
        from lerobot.policies.factory import make_pre_post_processors

        for part in make_pre_post_processors(None, self.source, preprocessor_overrides={}):
            part.save_pretrained(folder)
