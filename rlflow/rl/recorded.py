"""A pure function of tensors, recorded as the operations that its first call makes, and run as this list from then on.

Small networks spend more time in Python and in autograd's bookkeeping than in arithmetic. A learner's function is
recorded below autograd, forward and backward; a later call makes the same operations in the same order, to the same
bits, and nothing else: no module, Cond, Chain or graph is built. What operations work on is of three kinds:

    given     the arguments, other tensors in each call
    moving    the parameters that optimisers change in place; views of them are made once
    held      everything else: grids, statistics of observations, bounds of the noise. What depends on nothing else is
              computed at the first call, and again by `renew`, before an iteration

A value read from a tensor, by an `if` say, is burnt in: of a held one it is compared by `renew`, of others the function
cannot be recorded and runs as it is. So it does where the second call, made both ways, has two results: then something
reached it that is no operation on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlflow.flow.policy import FlowPolicy
from rlflow.parallel import shards
from rlflow.rl.tape import CannotRecordError, Recording, Tape
from rlflow.types import Tree

SMALL = 10_000_000
"""Numbers of a small network."""
ACTIONS = 2
"""Axes of a sample at most: the chunk's and the action's."""
AGREE = 1e-3
"""Of the norm, by which two ways of one call may differ: a CPU gives the same bits, a GPU may add in any order."""


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, functions run as they are: for who watches the networks' own calls."""
    before, Recorded.on = Recorded.on, False
    try:
        yield
    finally:
        Recorded.on = before


def small(policy: FlowPolicy, parameters: Sequence[Tensor]) -> bool:
    """True where operations are so short that recording them is worth its while: of actions, not of pictures."""
    whole = not any(shards.is_sharded(p) for p in parameters)
    return whole and len(policy.event_shape) <= ACTIONS and sum(p.numel() for p in parameters) <= SMALL


class Recorded:
    """`fn(*arguments)`, each a tensor or a dict of them, to nested tuples, lists and dicts of tensors without a graph.

    It must be pure but for the counters of `policy`, which are kept. Parameters it differentiates by are `moving`.
    Numbers that are attributes of `owners` may change between iterations; the function is then recorded anew.
    """

    on = True

    def __init__(
        self, fn: Callable[..., Any], policy: FlowPolicy, moving: Sequence[Tensor], owners: Sequence[Any] = ()
    ):
        self.fn, self.policy, self.moving, self.owners = fn, policy, list(moving), (policy, policy.kernel, *owners)
        self.numbers = self._numbers()
        self.recordings: dict[Any, Recording] = {}
        self.why_not: str | None = None

    def __call__(self, *arguments: Tree) -> Any:
        """What `fn` gives."""
        if self.why_not is not None or not self.on:
            return self.fn(*arguments)
        given = _tensors(arguments)
        key = tuple((v.shape, v.dtype, v.device) for v in given)
        found = self.recordings.get(key)
        if found is None:
            return self._record(key, arguments, given)
        if not found.proven:
            return self._proven(found, arguments, given)
        self.policy.count(found.counts)
        return found(given)

    def renew(self) -> None:
        """Before an iteration: compute again what is held."""
        before, self.numbers = self.numbers, self._numbers()
        same = before == self.numbers
        self.recordings = {key: found for key, found in self.recordings.items() if same and found.renew()}

    def _numbers(self) -> list[Any]:
        plain = (bool, int, float, str)
        counts = ("network_rows", "graph_rows", "encoder_rows")
        return [(n, v) for o in self.owners for n, v in vars(o).items() if isinstance(v, plain) and n not in counts]

    def _record(self, key: Any, arguments: tuple[Tree, ...], given: list[Tensor]) -> Any:
        before, tape = self.policy.counts, Tape(given, self.moving)
        with tape:
            out = self.fn(*arguments)
        counts = [b - a for a, b in zip(before, self.policy.counts, strict=True)]
        try:
            self.recordings[key] = tape.recording(out, counts)
        except CannotRecordError as reason:
            self.why_not = str(reason)
        return out

    def _proven(self, found: Recording, arguments: tuple[Tree, ...], given: list[Tensor]) -> Any:
        """The second call, made both ways."""
        found.proven, plain = True, self.fn(*arguments)
        for a, b in zip(_tensors(found(given)), _tensors(plain), strict=True):
            apart = (a - b).nan_to_num().norm() > AGREE * b.nan_to_num().norm()
            if apart or not torch.equal(a.isnan(), b.isnan()):
                self.why_not = "its second call did other operations than the first"
        return plain


def _tensors(tree: Any) -> list[Tensor]:
    """Leaves, in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in _tensors(part)]
