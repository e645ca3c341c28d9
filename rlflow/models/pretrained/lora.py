"""Diffusers folders: opening a pipeline, a LoRA on its transformer (peft), writing what plain diffusers reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.files import as_readable, read_tensors
from rlflow.models.pretrained.index import check_folder, check_index, read_json

ADAPTER = "default"
"""Name of the LoRA that trains."""
FULL = "transformer"
"""Subfolder of a wholly tuned network."""
QUANTISERS = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Packages by what they quantise to."""


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"foreign checkpoints need diffusers ({error}): pip install 'rlflow-torch[image]'") from error
    return diffusers


def pipeline_class(checkpoint: str) -> str:
    """`_class_name` of model_index.json; of a hub id this one file is fetched."""
    folder = Path(checkpoint)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{checkpoint} has no model_index.json: give the folder that save_pretrained wrote")
        check_folder(folder)
        return _class_name(checkpoint, read_json(folder / "model_index.json"))
    if "/" not in checkpoint:
        raise ValueError(
            f"there is no folder {checkpoint!r}, and a hub id reads owner/name; one of ours? "
            f"`rlflow pretrain {checkpoint}` makes it, `rlflow pretrain --help` lists them"
        )
    try:
        index = _diffusers().DiffusionPipeline.load_config(checkpoint)
    except OSError as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"no checkpoint {checkpoint!r}, neither a folder nor a readable hub id: {why}") from error
    return _class_name(checkpoint, index)


def _class_name(checkpoint: str, index: dict[str, Any]) -> str:
    check_index(checkpoint, index)
    return str(index.get("_class_name"))


def open_pipeline(checkpoint: str, dtype: torch.dtype, quantize: str | None = None) -> Any:
    """The pipeline on the CPU, its VAE in float32: half precision shows in pictures."""
    diffusers = _diffusers()
    pipeline = diffusers.DiffusionPipeline
    given: dict[str, Any] = {}
    if quantize is not None:
        model = getattr(diffusers, pipeline.load_config(checkpoint)["transformer"][1])
        settings = {"subfolder": "transformer", "quantization_config": _quantization(quantize, dtype)}
        given["transformer"] = model.from_pretrained(checkpoint, dtype=dtype, **settings)
    pipe = pipeline.from_pretrained(checkpoint, dtype={"default": dtype, "vae": torch.float32}, **given)
    pipe.vae.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA's parameters by name; empty where there is none."""
    return {name: p for name, p in transformer.named_parameters() if "lora_" in name}


def attach(pipe: Any, rank: int | None, alpha: float | None, modules: list[str], start: str | None) -> None:
    """Freeze the transformer and add a float32 LoRA, new or that of `start`; only its parameters train.

    A new one adds nothing at first (its B is zero), so the reference is the base with the adapter off.
    """
    transformer = pipe.transformer.requires_grad_(False)
    if start is not None:
        if rank is not None:
            raise ValueError("adapter brings its own rank: leave lora out with it")
        pipe.load_lora_weights(start, adapter_name=ADAPTER)
    else:
        from peft import LoraConfig

        assert rank is not None
        ends = {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "target_modules": modules}
        transformer.add_adapter(LoraConfig(**ends, init_lora_weights="gaussian"), ADAPTER)
    found = parameters(transformer)
    if not found:
        raise ValueError(f"{start} holds no LoRA of the transformer" if start else f"no layer ends in {modules}")
    for parameter in found.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for module in transformer.modules():
        if hasattr(module, "cast_input_dtype_enabled") and not getattr(module, "lora_variant", None):  # DoRA has one
            module.cast_input_dtype_enabled = _OutsideAutocast()


class _OutsideAutocast:
    """True where peft has to bring a layer's input to the LoRA's dtype. Autocast would undo it at once: float32 copies
    of every layer's input, for nothing."""

    def __bool__(self) -> bool:
        return not any(torch.is_autocast_enabled(device) for device in ("cuda", "cpu"))


def _lora_state(transformer: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def save(pipe: Any, folder: Path, args: dict[str, Any]) -> None:
    """A LoRA as `pipe.load_lora_weights` reads it, or the whole transformer; README.md says how."""
    transformer, full = pipe.transformer, not parameters(pipe.transformer)
    if full:
        transformer.save_pretrained(folder / FULL)
    else:
        from diffusers.training_utils import _collate_lora_metadata

        metadata = _collate_lora_metadata({"transformer": transformer})
        type(pipe).save_lora_weights(folder, transformer_lora_layers=_lora_state(transformer), **metadata)
    as_readable(folder)
    (folder / "README.md").write_text(model_card(type(pipe).__name__, type(transformer).__name__, full, args))


def load(pipe: Any, folder: Path) -> None:
    """Inverse of `save`, into a pipeline that was opened and got its LoRA in the same way."""
    transformer = pipe.transformer
    if not parameters(transformer):
        stored = type(transformer).from_pretrained(folder / FULL, dtype=transformer.dtype)
        transformer.load_state_dict(stored.state_dict())
        return
    from peft import set_peft_model_state_dict

    state = read_tensors(folder / "pytorch_lora_weights.safetensors")
    mine = {name.removeprefix("transformer."): value for name, value in state.items()}
    set_peft_model_state_dict(transformer, mine, adapter_name=ADAPTER)


def model_card(pipeline: str, transformer: str, full: bool, args: dict[str, Any]) -> str:
    """README.md of a saved model: what it is and how plain diffusers uses it."""
    base = args["checkpoint"]
    local = Path(base).is_absolute()
    head = ["---", "library_name: diffusers", *([] if local else [f"base_model: {base}"]), "tags:"]
    head += [*(f"- {tag}" for tag in ("text-to-image", "rlflow", *([] if full else ["lora"]))), "---"]
    usage = [f"from diffusers import {pipeline}" + (f", {transformer}" if full else ""), ""]
    if full:
        usage += [f'transformer = {transformer}.from_pretrained("THIS_FOLDER", subfolder="{FULL}")']
        usage += [f'pipe = {pipeline}.from_pretrained("{base}", transformer=transformer)']
    else:
        usage += [f'pipe = {pipeline}.from_pretrained("{base}")', 'pipe.load_lora_weights("THIS_FOLDER")']
    what = "the whole transformer" if full else "a LoRA of the transformer"
    about = f"Fine-tuned with reinforcement learning by rlflow: {what} of `{base}`, trained at settings"
    settings = ", ".join(f"{k}={v}" for k, v in args.items() if k not in ("checkpoint", "adapter"))
    return "\n".join([*head, "", about, f"{settings or 'of its defaults'}.", "", "```python", *usage, "```", ""])
