"""Pre-training by flow matching, of images and of robots: Muon for hidden matrices, AdamW for the rest, weight average.

The result is a function of the batches, the seed and the number of steps, never of the clock. Captions are
dropped at random so that an image model also learns the unconditional velocity (classifier-free guidance, Ho and
Salimans 2022). Muon: Jordan et al. 2024, step size matched to AdamW's (Liu et al. 2025).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlflow.flow.field import VelocityField
from rlflow.flow.grid import logit_normal
from rlflow.flow.matching import Coupling, MatchingLoss, Scheduled, cfm_loss, independent, loss_at
from rlflow.flow.path import expand
from rlflow.types import Cond, Tree

Field = TypeVar("Field", bound=VelocityField)
Progress = Callable[[int, float, VelocityField], None]
"""(steps done, loss of the last one, averaged field) -> None."""
Times = Callable[[int, torch.Generator], Tensor]
"""(N, generator) -> training times (N,)."""
BEFORE_THE_MIDDLE: Times = partial(logit_normal, mean=-0.4, std=1.2)


def pretrain(
    field: Field,
    batches: Iterable[tuple[Tensor, Tree]],
    *,
    steps: int,
    hidden: Iterable[nn.Parameter] = (),
    lr: float = 3e-3,
    muon_lr: float = 4e-3,
    drop: float = 0.1,
    average: float = 0.99,
    times: Times = BEFORE_THE_MIDDLE,
    coupling: Coupling = independent,
    loss: MatchingLoss | Scheduled = cfm_loss,
    seed: int = 0,
    autocast: bool = True,
    progress: Progress | None = None,
) -> Field:
    """Train `field` in place on `batches` of (data (N, *D), observation); returns its weight average.

    `hidden` names the matrices for Muon; `drop` is the share of rows whose condition is hidden from the
    field; `average` is the decay of the weight average; `loss` and `times` say what is learned and where. A
    `Scheduled` loss may take targets from the weight average, with the condition as the live weights encode it.
    """
    optimizers = _optimizers(field, list(hidden), lr, muon_lr)
    schedules = [LambdaLR(o, lambda i: learning_rate_factor(i, steps)) for o in optimizers]
    averaged = copy.deepcopy(field).eval()
    rng = torch.Generator().manual_seed(seed)
    for step, (x_1, obs) in enumerate(islice(batches, steps), start=1):
        with torch.autocast(x_1.device.type, torch.bfloat16, enabled=autocast):
            cond = drop_condition(field, field.encode(obs), drop, rng)
            x_0 = coupling(torch.randn(x_1.shape, generator=rng).to(x_1), x_1)
            now = loss_at(loss, (step - 1) / steps, averaged)
            error = now(field, x_1, cond, x_0, times(len(x_1), rng).to(x_1)).mean()
        field.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(field.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        # a young average forgets its random start fast
        update_average(averaged, field, min(average, (step + 1) / (step + 10)))
        if progress is not None:
            progress(step, error.item(), averaged)
    return averaged


def _optimizers(
    field: VelocityField, hidden: list[nn.Parameter], lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    chosen = {id(p) for p in hidden}
    rest = [p for p in field.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0))
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def report(steps: int, every: int = 50) -> Progress:
    """Prints a line every so many steps."""
    begin = time.perf_counter()

    def progress(step: int, loss: float, averaged: VelocityField) -> None:
        if step % every == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss:.4f}  {time.perf_counter() - begin:.0f} s", flush=True)

    return progress


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over 30 steps, constant, then linear to .02 over the last two fifths."""
    left = (1 - step / steps) / 0.4
    return min(1.0, (step + 1) / 30) * min(1.0, max(0.02, left))


def drop_condition(field: VelocityField, cond: Cond, share: float, rng: torch.Generator) -> Cond:
    """`cond` with a random `share` of its rows replaced by the null condition."""
    if share == 0:
        return cond
    null = field.null(cond)
    gone = torch.rand(len(cond), generator=rng) < share
    mixed = {}
    for name in cond.data:
        kept = cond[name]
        mixed[name] = torch.where(expand(gone.to(kept.device), kept), null[name].to(kept.dtype), kept)
    return Cond(mixed)


@torch.no_grad()
def update_average(averaged: nn.Module, live: nn.Module, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * live, parameter by parameter."""
    torch._foreach_lerp_(list(averaged.parameters()), list(live.parameters()), 1 - decay)
