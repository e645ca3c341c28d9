"""A LoRA on a pipeline's network (peft), new or begun from another, and writing what plain diffusers reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlflow.files import as_readable, read_tensors
from rlflow.models.hub import quiet
from rlflow.models.pretrained.adapter import Adapter
from rlflow.models.pretrained.opening import check_finite
from rlflow.parallel.shards import is_sharded

ADAPTER = "default"
"""Name of the LoRA that trains."""
WEIGHTS = "pytorch_lora_weights.safetensors"
"""Diffusers' name of a LoRA's file."""


def parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA's parameters by name; empty where there is none."""
    return {name: p for name, p in network.named_parameters() if "lora_" in name}


def attach(network: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Freeze the network and add a float32 LoRA of peft's `settings`; only its parameters train.

    Without `tensors` it adds nothing at first (its B is zero), so the reference is the base with the adapter off. It
    stays in evaluation mode: sampling and scoring have to agree.
    """
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(LoraConfig(**settings, init_lora_weights="gaussian"), ADAPTER)
    for parameter in parameters(network).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if tensors is not None:
        _fill(network, tensors)
    merge(network)
    for module in network.eval().modules():
        if hasattr(module, "cast_input_dtype_enabled") and not getattr(module, "lora_variant", None):  # DoRA has one
            module.cast_input_dtype_enabled = _OutsideAutocast()


def new(network: nn.Module, rank: int, alpha: float | None, modules: Sequence[str]) -> dict[str, Any]:
    """Settings of a new LoRA on the layers whose names end so; ValueError for an end that no layer has, or for ends
    that leave out all blocks of a kind."""
    if not modules:
        raise ValueError("lora_modules names no layer: leave it out for the attention's")
    every = dict(network.named_modules())
    linear = [name for name, module in every.items() if isinstance(module, nn.Linear | nn.Conv2d)]
    targets: list[str] = []
    for end in modules:
        found = [name for name in linear if _ends(name, end)]
        if not found:
            ends = sorted({".".join(name.split(".")[2:]) for name in linear if name.count(".") > 1})
            raise ValueError(f"lora_modules: no layer of {type(network).__name__} ends in {end!r}; some: {ends[:12]}")
        targets += [end] if len(found) == sum(_ends(name, end) for name in every) else found  # a list ends so too
    _check_blocks(network, linear, modules)
    return {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "target_modules": targets}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _check_blocks(network: nn.Module, linear: Sequence[str], modules: Sequence[str]) -> None:
    """ValueError where the blocks of one list get nothing, as FLUX.2's single ones do of an `attn.to_q`; whoever names
    a list in `modules` means some of them."""
    lists = [name for name, child in network.named_children() if isinstance(child, nn.ModuleList) and len(child)]
    if any(end.startswith(f"{name}.") for end in modules for name in lists):
        return
    reached = {name.split(".")[0] for name in linear for end in modules if _ends(name, end)}
    for name in lists:
        inside = sorted({n.split(".", 2)[2] for n in linear if n.startswith(f"{name}.") and n.count(".") > 1})
        if inside and name not in reached:
            raise ValueError(
                f"lora_modules: {list(modules)} reach no layer of {name}, which would stay as they are: add some of "
                f"{inside[:8]}, or name the blocks that are meant, such as {lists[0]}.0.{modules[0]}"
            )


def _fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a LoRA's tensors into its parameters; ValueError unless all are taken and nothing is left as it began."""
    from peft import set_peft_model_state_dict

    check_finite("the LoRA's ", tensors)
    try:
        result = set_peft_model_state_dict(network, dict(tensors), adapter_name=ADAPTER)
    except RuntimeError as error:  # shapes that differ, a line each
        why = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise ValueError(f"the LoRA does not fit {type(network).__name__}: {why}") from error
    lacks, brings = [n for n in result.missing_keys if "lora_" in n], list(result.unexpected_keys)
    if lacks or brings:
        raise ValueError(
            f"the LoRA lacks {len(lacks)} tensors ({lacks[:2]}) and brings {len(brings)} of no layer {brings[:2]}"
        )


# -- a LoRA computed as one product ---------------------------------------------------------------------------------


class MergedProduct(torch.autograd.Function):
    """x (W + s B A)^T + bias, in every pass alike, so that the first ratio stays 1; gradients of x, A and B.

    One product of the layer's size in place of three and two passes over the activations, and nothing but x is kept.
    On the way back whichever costs less: the weight's gradient, or products with A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x (..., in), weight (out, in), bias (out,), a (r, in), b (out, r) to (..., out)."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, A and B; none of the frozen weight."""
        x, weight, a, b = ctx.saved_tensors
        of_x = grad @ torch.addmm(weight, b, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        if not (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
            return of_x, None, None, None, None, None
        rows, grads, rank, (wide, narrow) = x.flatten(0, -2), grad.flatten(0, -2), len(a), weight.shape
        if wide * narrow <= 2 * rank * (wide + narrow):
            of_weight = grads.T @ rows * ctx.scale
            return of_x, None, None, b.T @ of_weight, of_weight @ a.T, None
        return of_x, None, None, (grads @ b * ctx.scale).T @ rows, grads.T @ (rows @ a.T) * ctx.scale, None


@cache
def _merged_layer() -> type[nn.Module]:
    from peft.tuners.lora.layer import Linear

    class Merged(Linear):
        """peft's layer, computed as one product where that loses nothing."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """(..., in) to (..., out)."""
            base, a, b = self.get_base_layer(), self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
            halved = torch.is_autocast_enabled(x.device.type)
            if halved or self.disable_adapters or self.merged or {x.dtype, base.weight.dtype} != {a.dtype}:
                return super().forward(x, *args, **kwargs)
            return MergedProduct.apply(x, base.weight, base.bias, a, b, self.scaling[ADAPTER])

    return Merged


def merge(network: nn.Module) -> None:
    """Let plain linear layers with a plain LoRA compute it as one product, in the weights' own precision.

    In bfloat16 they stay as they are: small steps of the LoRA would be lost in the sum.
    """
    from peft.tuners.lora.layer import Linear

    found: list[Any] = [module for module in network.modules() if type(module) is Linear]
    for module in found:
        if list(module.lora_A) != [ADAPTER] or module.lora_variant or module.fan_in_fan_out:
            continue
        plain = isinstance(module.get_base_layer(), nn.Linear) and module.lora_B[ADAPTER].bias is None
        if plain and isinstance(module.lora_dropout[ADAPTER], nn.Identity):
            module.__class__ = _merged_layer()


@contextmanager
def without_idle(network: nn.Module) -> Iterator[None]:
    """Inside, a LoRA that adds nothing, as one at its beginning, is not computed; one of sharded weights is."""
    ups = [p for name, p in parameters(network).items() if "lora_B" in name]
    idle = bool(ups) and not any(is_sharded(p) for p in ups) and not any(bool(p.any()) for p in ups)
    layers: list[Any] = [m for m in network.modules() if hasattr(m, "_disable_adapters")] if idle else []
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # the public switch turns gradients off and on as well
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


class _OutsideAutocast:
    """True where peft has to bring a layer's input to the LoRA's dtype. Autocast would undo it at once: float32 copies
    of every layer's input, for nothing."""

    def __bool__(self) -> bool:
        return not any(torch.is_autocast_enabled(device) for device in ("cuda", "cpu"))


def _lora_state(network: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def scales(network: nn.Module) -> str:
    """What the LoRA's product is multiplied by, in words: alpha over the rank, or over its root, of how many layers."""
    from peft.tuners.lora import LoraLayer

    found = Counter(f"{m.scaling[ADAPTER]:.4g}" for m in network.modules() if isinstance(m, LoraLayer))
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{scale} ({num} layers)" for scale, num in found.most_common())


def save(border: Adapter, folder: Path, args: dict[str, Any]) -> None:
    """A LoRA as `pipe.load_lora_weights` reads it, or the whole network; README.md says how."""
    network, name, full = border.network, border.component, not parameters(border.network)
    if full:
        network.save_pretrained(folder / name)
    else:
        from diffusers.training_utils import _collate_lora_metadata

        layers = {f"{name}_lora_layers": _lora_state(network)}
        type(border.pipe).save_lora_weights(folder, **layers, **_collate_lora_metadata({name: network}))
    as_readable(folder)
    made = "text-to-image" if border.frames is None else "text-to-video"
    card = model_card(type(border.pipe).__name__, type(network).__name__, full, args, name, made)
    (folder / "README.md").write_text(card)


def load(border: Adapter, folder: Path) -> None:
    """Inverse of `save`, into a pipeline that was opened and got its LoRA in the same way."""
    network, name = border.network, border.component
    if not parameters(network):
        with quiet():
            stored = type(network).from_pretrained(folder / name, dtype=network.dtype).state_dict()
        check_finite(f"{folder / name}: ", stored)
        network.load_state_dict(stored)
        return
    state = read_tensors(folder / WEIGHTS)
    _fill(network, {key.removeprefix(f"{name}."): value for key, value in state.items()})


def model_card(
    pipeline: str,
    network: str,
    full: bool,
    args: dict[str, Any],
    name: str = "transformer",
    made: str = "text-to-image",
) -> str:
    """README.md of a saved model: what it is and how plain diffusers uses it; `name`: its attribute there."""
    base = args["checkpoint"]
    local = Path(base).is_absolute()
    head = ["---", "library_name: diffusers", *([] if local else [f"base_model: {base}"]), "tags:"]
    head += [*(f"- {tag}" for tag in (made, "rlflow", *([] if full else ["lora"]))), "---"]
    usage = [f"from diffusers import {pipeline}" + (f", {network}" if full else ""), ""]
    if full:
        usage += [f'{name} = {network}.from_pretrained("THIS_FOLDER", subfolder="{name}")']
        usage += [f'pipe = {pipeline}.from_pretrained("{base}", {name}={name})']
    else:
        usage += [f'pipe = {pipeline}.from_pretrained("{base}")', 'pipe.load_lora_weights("THIS_FOLDER")']
    what = f"the whole {name}" if full else f"a LoRA of the {name}"
    about = f"Fine-tuned with reinforcement learning by rlflow: {what} of `{base}`, trained at settings"
    settings = ", ".join(f"{k}={v}" for k, v in args.items() if k not in ("checkpoint", "adapter"))
    return "\n".join([*head, "", about, f"{settings or 'of its defaults'}.", "", "```python", *usage, "```", ""])
