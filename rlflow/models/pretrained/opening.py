"""Opening a diffusers pipeline, from a folder or the hub: which class it is, its weights, what is wrong with them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.models import hub
from rlflow.models.pretrained.index import NONE, UNUSED, check_folder, check_index, read_json

QUANTISERS = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Packages by what they quantise to."""
INDEX = "model_index.json"
WEIGHTS = re.compile(r"[\w-]+?(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")
"""Names of files of weights: model.safetensors, model.fp16-00001-of-00002.safetensors."""


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"foreign checkpoints need diffusers ({error}): pip install 'rlflow-torch[image]'") from error
    return diffusers


def is_pipeline(name: str) -> bool:
    """True for a folder that a diffusers pipeline was saved in."""
    return (Path(name) / INDEX).is_file()


def pipeline_class(checkpoint: str) -> str:
    """Its name; of a hub id one small file is fetched."""
    return str(_index(checkpoint)["_class_name"])


def _index(checkpoint: str) -> dict[str, Any]:
    """model_index.json: "_class_name", and by the name of each part the library and class of it."""
    if Path(checkpoint).is_dir():
        if not is_pipeline(checkpoint):
            raise ValueError(f"{checkpoint} has no {INDEX}: give the folder that save_pretrained wrote")
        check_folder(Path(checkpoint))
        index = Path(checkpoint) / INDEX
    elif "/" not in checkpoint:
        raise ValueError(
            f"there is no folder {checkpoint!r}, and a hub id reads owner/name; one of ours? "
            f"`rlflow pretrain {checkpoint}` makes it, `rlflow pretrain --help` lists them"
        )
    else:
        _diffusers()  # or the extra that brings the hub along is not installed
        index = hub.one_file(checkpoint, INDEX)
    found = read_json(index)
    check_index(checkpoint, found)
    return found


def open_pipeline(checkpoint: str, dtype: torch.dtype, quantize: str | None = None, variant: str | None = None) -> Any:
    """The pipeline on the CPU, its VAE in float32: half precision shows in pictures. All of it is looked at."""
    local = Path(checkpoint).is_dir()
    if local and variant is None:
        _check_variants(Path(checkpoint))
    quantization = None if quantize is None else _quantization(quantize, dtype)
    settings = {"variant": variant, "local_files_only": hub.only_here(checkpoint)}
    try:
        with hub.quiet():
            pipe = _from_pretrained(checkpoint, dtype, quantization, settings)
    except (OSError, ValueError) as error:
        hint = "" if variant or local else " (one with *.fp16.* files only wants variant=fp16)"
        raise ValueError(hub.why_not(checkpoint, "pipeline", error) + hint) from error
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            check_finite(f"{checkpoint}: {name}.", part.eval().state_dict())
    pipe.vae.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _from_pretrained(checkpoint: str, dtype: torch.dtype, quantization: Any, settings: Mapping[str, Any]) -> Any:
    diffusers, index = _diffusers(), _index(checkpoint)
    if getattr(diffusers, name := pipeline_class(checkpoint), None) is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}: pip install -U diffusers")
    given = {name: None for name in UNUSED if index.get(name, NONE) != NONE}
    if quantization is not None:
        network = "unet" if "unet" in index else "transformer"
        model = getattr(diffusers, index[network][1])
        part = {"subfolder": network, "quantization_config": quantization}
        given[network] = model.from_pretrained(checkpoint, dtype=dtype, **part, **settings)
    dtypes = {"default": dtype, "vae": torch.float32}
    return diffusers.DiffusionPipeline.from_pretrained(checkpoint, dtype=dtypes, **given, **settings)


def _check_variants(folder: Path) -> None:
    """ValueError where a part of a pipeline has weights of a variant only, such as *.fp16.safetensors."""
    for part in sorted(folder / name for name in _index(str(folder)) if (folder / name).is_dir()):
        found = {m["variant"] for f in part.iterdir() if (m := WEIGHTS.fullmatch(f.name))}
        if found and None not in found:
            name = sorted(found)[0]
            raise ValueError(f"{part} holds *.{name}.* weights only: set variant={name}, of policy.field or rf.load")


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError that names the first tensor with an entry that is inf or nan, which all pictures would be made of."""
    for name, value in tensors.items():
        if type(value) is Tensor and value.is_floating_point() and not value.is_meta and not value.sum().isfinite():
            bad = int((~value.isfinite()).sum())
            if bad:
                raise ValueError(
                    f"{where}{name} has {bad} entries that are inf or nan, as weights of half precision can: take the "
                    "model's weights of full precision"
                )


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    """How diffusers is to quantise the base; ValueError names the package that is missing."""
    try:
        importlib.import_module(QUANTISERS[kind])
    except ImportError as error:
        package = QUANTISERS[kind]
        raise ValueError(f"quantize={kind} needs {package} ({error}): pip install {package}") from error
    if kind == "nf4":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
