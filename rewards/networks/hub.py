"""Pretrained networks for rewards: where their files are, and when they lie on the device.

A source is a folder, or the name of a repository of the Hugging Face hub. Weights are safetensors, or a torch file
read with weights_only=True: nothing of a stranger's runs here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.files import read_tensors

M = TypeVar("M", bound=nn.Module)

Precision = Literal["float32", "bfloat16", "float16"]


def pick_device(name: str) -> torch.device:
    """'auto' is this process's GPU where there is one; ValueError for a device that torch does not know."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}; write auto, cpu or cuda") from None


class OnDevice(Generic[M]):
    """A frozen network in evaluation mode; with `offload` it lies on its device only while it is used."""

    def __init__(self, network: M, device: str = "auto", offload: bool = False, precision: Precision = "float32"):
        self.device, self.offload = pick_device(device), offload
        home = "cpu" if offload else self.device
        self.network = network.eval().requires_grad_(False).to(home, getattr(torch, precision))
        self.dtype: torch.dtype = getattr(torch, precision)
        self._lock = threading.RLock()

    @contextmanager
    def use(self) -> Iterator[M]:
        """The network on its device, without gradients; one user at a time."""
        with self._lock, torch.no_grad():
            if self.offload:
                self.network.to(self.device)
            try:
                yield self.network
            finally:
                if self.offload:
                    self.network.to("cpu")


def need_transformers() -> Any:
    """The transformers module; ImportError that names the extra."""
    try:
        import transformers
    except ImportError:
        raise ImportError("this reward needs transformers: pip install 'rlflow-torch[image]'") from None
    return transformers


def check_source(source: str, what: str) -> str:
    """`source` if it is a folder or may be a name on the hub; ValueError that says what was expected."""
    if Path(source).is_dir() or (source.count("/") == 1 and not Path(source).is_absolute() and source[0] != "."):
        return source
    raise ValueError(f"{what} {source!r}: no such folder, and a name on the hub reads OWNER/NAME")


def source_file(source: str, name: str) -> Path:
    """A file of a folder or of a repository on the hub, downloaded at first use."""
    if Path(source).is_dir():
        path = Path(source) / name
        if not path.is_file():
            raise FileNotFoundError(f"{source} holds no {name}")
        return path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, name))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors or a torch file, also where they lie under "state_dict"; ValueError else."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    values = torch.load(path, map_location="cpu", weights_only=True)
    values = values.get("state_dict", values) if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path} holds no table of weights: give the checkpoint's file")
    return dict(values)
