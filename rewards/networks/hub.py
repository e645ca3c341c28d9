"""Pretrained networks for rewards: where their files are, and when they lie on the device.

A source is a folder, or the name of a repository of the Hugging Face hub. Weights are safetensors, or a torch file
read with weights_only=True: nothing of a stranger's runs here.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor

from rlflow.files import read_tensors
from rlflow.models.hub import only_here, quiet, why_not
from rlflow.registry import SettingError

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

Precision = Literal["float32", "bfloat16", "float16"]


def pick_device(name: str) -> torch.device:
    """'auto' is this process's GPU where there is one; ValueError for a device that torch does not know."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SettingError("device", f"{name!r}: {str(error).splitlines()[0]}; write auto, cpu or cuda") from None


class OnDevice(Generic[M]):
    """A frozen network in evaluation mode; with `offload` it lies on its device only while it is used."""

    def __init__(self, network: M, device: str = "auto", offload: bool = False, precision: Precision = "float32"):
        self.device, self.offload = pick_device(device), offload
        home = "cpu" if offload else self.device
        self.network = network.eval().requires_grad_(False).to(home, getattr(torch, precision))
        self.dtype: torch.dtype = getattr(torch, precision)
        self._lock = threading.RLock()

    @contextmanager
    def use(self, graph: bool = False) -> Iterator[M]:
        """The network on its device, without gradients; one user at a time.

        With a `graph` to its inputs it stays there until its next user has done: the way back needs it.
        """
        with self._lock, torch.set_grad_enabled(graph):
            if self.offload:
                self.network.to(self.device)
            try:
                yield self.network
            finally:
                if self.offload and not graph:
                    self.network.to("cpu")


def need_transformers() -> Any:
    """The transformers module; ImportError that names the extra."""
    try:
        import transformers
    except ImportError:
        raise ImportError("this reward needs transformers: pip install 'rlflow-torch[image]'") from None
    return transformers


@dataclass(frozen=True)
class Source:
    """A folder, or a name on the hub, and the setting that says so: two of the same name are equal."""

    name: str
    setting: str = field(compare=False)

    def __post_init__(self) -> None:
        if not self.is_folder and not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", self.name):
            raise SettingError(self.setting, f"{self.name!r}: no such folder, and a name on the hub reads OWNER/NAME")

    @property
    def is_folder(self) -> bool:
        """Whether it lies on this disk."""
        return Path(self.name).is_dir()

    def load(self, read: Callable[..., T], holds: str, **options: Any) -> T:
        """read(name, local_files_only=...) without its noise; SettingError where that fails."""
        try:
            with quiet():
                return read(self.name, local_files_only=only_here(self.name), **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # files, networks, access, formats
            raise SettingError(self.setting, why_not(self.name, holds, error)) from error

    def network(self, kind: Any) -> Any:
        """A network of a class of transformers; SettingError where weights are missing, which it would draw."""
        network, info = self.load(kind.from_pretrained, f"weights of a {kind.__name__}", output_loading_info=True)
        if missing := sorted(set(info["missing_keys"]) & {name for name, _ in network.named_parameters()}):
            raise SettingError(self.setting, f"{self.name!r} lacks weights of a {kind.__name__}: {missing[:3]}")
        return network

    def tokenizer(self, num_tokens: int) -> Any:
        """Its tokenizer, for a network that knows `num_tokens`; transformers makes an empty one where files lack."""
        found = self.load(
            need_transformers().AutoTokenizer.from_pretrained,
            "tokenizer (tokenizer.json, ...)",
            trust_remote_code=False,
        )
        if not num_tokens / 2 < len(found) <= num_tokens:
            what = f"{self.name!r} has a tokenizer of {len(found)} tokens for a network of {num_tokens}"
            raise SettingError(self.setting, f"{what}: give the folder or name that holds the network's own")
        return found

    def preprocessor(self) -> dict[str, Any]:
        """Its preprocessor_config.json."""
        from transformers.image_processing_base import ImageProcessingMixin

        values, _ = self.load(ImageProcessingMixin.get_image_processor_dict, "preprocessor_config.json")
        return dict(values)

    def file(self, name: str) -> Path:
        """One of its files, downloaded at first use."""
        if self.is_folder:
            if not (path := Path(self.name) / name).is_file():
                raise SettingError(self.setting, f"the folder {self.name!r} holds no {name}")
            return path
        from huggingface_hub import hf_hub_download

        return Path(self.load(functools.partial(hf_hub_download, filename=name), name))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors or a torch file, also where they lie under "state_dict"; ValueError else."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler stumbles over in a file that is none of its own
        raise ValueError(
            f"{path} cannot be read as weights ({(str(error) or 'it ends early').splitlines()[0]})"
        ) from error
    values = values.get("state_dict", values) if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path} holds no table of weights: give the checkpoint's file")
    return dict(values)
