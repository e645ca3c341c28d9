"""The (row, column) pairs of a minibatch in pieces of one network pass each.

A loss of whole rows whose columns do not fit in one graph has its exact gradient too, at the price of a second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlflow.flow.gaussian import Gaussian
from rlflow.rl.batch import Pairs
from rlflow.rl.likelihoods.base import Score


@dataclass(frozen=True)
class Later:
    """dL / dscore of some pairs, None for what the loss does not read; stands in for L when they are scored again."""

    log_prob: Tensor | None
    mean: Tensor | None
    std: Tensor | None

    def __call__(self, score: Score) -> Tensor:
        """A number whose gradient is the part of dL that runs through these pairs."""
        parts = ((self.log_prob, score.log_prob), (self.mean, score.dist.mean), (self.std, score.dist.std))
        return torch.stack([(c * value).sum() for c, value in parts if c is not None]).sum()


def differentiate(scores: list[Score], num_rows: int, loss: Callable[[Score], Tensor]) -> list[Later]:
    """dL / dscore of `scores`, pieces (M, 1, ...) of rows x columns in order, which `loss` reads as (rows, R, ...)."""
    parts = ([s.log_prob for s in scores], [s.dist.mean for s in scores], [s.dist.std for s in scores])
    leaves = [torch.cat(part).requires_grad_() for part in parts]
    log_prob, mean, std = (leaf.unflatten(0, (num_rows, -1)).flatten(1, 2) for leaf in leaves)
    found = torch.autograd.grad(loss(Score(log_prob, Gaussian(mean, std))), leaves, allow_unused=True)
    sizes = [len(s.log_prob) for s in scores]
    split = [[None] * len(scores) if c is None else c.split(sizes) for c in found]
    return [Later(*of_piece) for of_piece in zip(*split, strict=True)]


def pieces(
    rows: Tensor,
    num_columns: int,
    micro_batch: int,
    joint: bool,
    score: Callable[[Pairs], Score],
    loss: Callable[[Score], Tensor],
) -> Iterator[tuple[Pairs, Later | None]]:
    """Of rows (M,) x R columns, `micro_batch` pairs each: whole rows where R fits.

    Rows of one `joint` loss that do not fit are scored first without gradient; the derivative of `loss`, of all of
    them, by each score then stands in for the loss.
    """
    if num_columns <= micro_batch:
        yield from ((Pairs(part, None), None) for part in rows.split(micro_batch // num_columns))
        return
    grid = torch.cartesian_prod(rows, torch.arange(num_columns, device=rows.device))
    pairs = [Pairs(p[:, 0], p[:, 1]) for p in grid.split(micro_batch)]
    if not joint:
        yield from ((p, None) for p in pairs)
        return
    with torch.no_grad():
        scores = [score(p) for p in pairs]
    yield from zip(pairs, differentiate(scores, len(rows), loss), strict=True)
