"""Iterations of images that are timed: through the collector and the learner, and those of the single-file script.

A setting says of what shapes; the script runs the same ones, on the same model.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlflow.assembly.network import PRECISION
from rlflow.assembly.parts import make_parts
from rlflow.bench.methods import Method
from rlflow.bench.passes import Bare, listen
from rlflow.config.parse import parse
from rlflow.config.schema import Config
from rlflow.envs.captions import scenes
from rlflow.flow.field import VelocityField
from rlflow.models.dit import DiT
from rlflow.models.pretrained.pipeline import pretrained

SCRIPT = Path(__file__).parents[2] / "scripts" / "single_file_flow_grpo.py"
"""Only in a checkout; an installed package is timed without it."""


@dataclass(frozen=True)
class Setting:
    """The shapes of the benchmark; `field` is a checkpoint's name or folder."""

    field: str
    rows: int
    group_size: int
    num_steps: int
    micro_batch: int

    def config(self, method: Method) -> Config:
        """The run that `rlflow train` would make of it."""
        env = {"num_groups": self.rows // self.group_size, "group_size": self.group_size, "rows_per_call": self.rows}
        return parse(
            {
                "policy": {"field": self.field, "num_steps": self.num_steps, "solver": method.solver},
                "steps": method.steps,
                "algorithm": {"micro_batch": self.micro_batch},
                "env": env | {"shared_noise": method.shared_noise},
                "train": {"iterations": 1},
            }
        )


@dataclass(frozen=True)
class PeerSetting:
    """Flow-GRPO with a LoRA of rank 32 on the network in `folder`; `guided`: with guidance and the KL to the base."""

    folder: str
    guided: bool = True
    images: int = 8
    group_size: int = 4
    num_steps: int = 10
    micro_batch: int = 8
    guidance: ClassVar[float] = 4.5
    kl: ClassVar[float] = 0.04

    def config(self, method: Method) -> Config:
        """Of the same iteration by `rlflow train`; the unconditional half is a constant, as in the peer's release."""
        field = {"name": "pretrained", "checkpoint": self.folder, "lora": 32, "max_sequence_length": 128}
        policy: dict[str, Any] = {"field": field, "num_steps": self.num_steps, "precision": "float32"}
        if self.guided:
            policy |= {"guidance": {"name": "cfg", "scale": self.guidance, "detach": True}}
        env = {"num_groups": self.images // self.group_size, "group_size": self.group_size}
        return parse(
            {
                "policy": policy,
                "steps": method.steps,
                "algorithm": {"micro_batch": self.micro_batch, "kl": {"beta": self.kl if self.guided else 0.0}},
                "env": env | {"rows_per_call": self.images},
                "reward": {"weights": {"brightness": 1.0}},
                "train": {"iterations": 1},
            }
        )

    def peer(self) -> tuple[Any, VelocityField]:
        """The script's learner on diffusers' own network with its own LoRA, and the field that it calls."""
        from diffusers import SD3Transformer2DModel

        script, field = _load(SCRIPT), pretrained(self.folder, max_sequence_length=128)
        net = SD3Transformer2DModel.from_pretrained(self.folder, subfolder="transformer").eval()
        script.add_lora(net, 32, 64, field.adapter.modules)
        field.adapter.pipe.transformer = field.transformer = net
        backbone = script.Backbone(field, False, self.guidance if self.guided else 1.0, detach=True)
        kl, size = self.kl if self.guided else 0.0, self.group_size
        settings = script.Settings(num_steps=self.num_steps, group_size=size, kl=kl, rows=self.micro_batch)
        return script.FlowGRPO(backbone, lambda images, _: images.mean((1, 2, 3)), settings), field


class Real:
    """Iterations through the collector and the learner, as in training."""

    def __init__(self, setting: Setting | PeerSetting, method: Method) -> None:
        self.parts = make_parts(setting.config(method))
        self.precision = PRECISION[setting.config(method).policy.precision]
        self.first_log_ratio = 0.0

    def __call__(self, iteration: int) -> None:
        """Rollout, reward, update."""
        metrics = self.parts.algorithm.update(self.parts.collector.collect(iteration))
        self.first_log_ratio = max(self.first_log_ratio, metrics.get("policy/first_log_ratio_max", 0.0))

    def bare(self, iteration: int) -> Bare:
        """The network passes of one iteration, which it runs."""
        field = self.parts.policy.field.unguided
        passes = listen(field, lambda: self(iteration))
        return Bare(field, self.precision, passes, field.tokenize(scenes.train_captions()[:1]))


class SingleFile:
    """Iterations of scripts/single_file_flow_grpo.py on the same model, shapes and reward."""

    def __init__(self, real: Real, setting: Setting) -> None:
        script = _load(SCRIPT)
        settings = script.Settings(
            num_steps=setting.num_steps, group_size=setting.group_size, rows=setting.micro_batch, std_of="epoch"
        )
        net = DiT(**real.parts.policy.field.args)
        net.load_state_dict(real.parts.policy.field.state_dict())
        self.learner = script.FlowGRPO(script.Backbone(net, real.precision is not None), script.shapes_reward, settings)
        self.captions = scenes.train_captions()[: setting.rows // setting.group_size]

    def __call__(self, iteration: int) -> None:
        self.learner.iterate(self.captions)


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module
