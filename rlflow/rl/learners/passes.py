"""How many rows a network pass takes: the fewest of the best throughput that a bound of memory allows, measured.

A pass of few rows costs more a row, one of many keeps more for its backward; neither changes what is learnt, but the
order in which gradients add up. So a run chooses once, at its start, and keeps to it (`train.passes=auto`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlflow.failures import is_out_of_memory
from rlflow.parallel import dist
from rlflow.rl.algorithm import Algorithm
from rlflow.rl.collector import Collector
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.types import tree_map

AS_GOOD = 1.02
"""Times the least time of a row: fewer rows that are as fast as that are preferred."""
WORSE = 1.1
"""Times the least: larger passes are not tried then."""
REPEATS = 3
SHARE = 0.5
"""Of the free memory, for what a pass keeps."""


def size_passes(
    collector: Collector, algorithm: Algorithm, noted: dict[str, int] | None = None, gib: float | None = None
) -> dict[str, int]:
    """Have both make passes of the sizes `noted` by the run, or else chosen; they are to be noted."""
    assert isinstance(algorithm, PolicyGradient)
    sizes = noted or choose(collector, algorithm, gib)
    collector.rows_per_call, algorithm.micro_batch = sizes["rows_per_call"], sizes["micro_batch"]
    return sizes


def choose(collector: Collector, algorithm: PolicyGradient, gib: float | None = None) -> dict[str, int]:
    """`rows_per_call` and `micro_batch`, the same in all processes; `gib`: what a pass may keep, else half of the free.

    Runs the network at the first iteration's observations, with and without a backward; weights and noise stay.
    """
    trial = _Trial(collector, algorithm)
    bound = free_bytes(trial.device) * SHARE if gib is None else gib * 2**30
    most = -float(dist.all_max(torch.tensor(-bound / trial.bytes_per_row(), dtype=torch.float64)))
    rows = fastest(trial.sampling, multiples(collector.copies, collector.groups.num_rows), most)
    pairs = fastest(trial.scoring, pair_sizes(collector, algorithm), most)
    return {"rows_per_call": rows, "micro_batch": pairs}


def multiples(unit: int, total: int) -> list[int]:
    """1, 2, 4, ... times `unit`, and `total`."""
    return sorted({unit * 2**i for i in range(total.bit_length()) if unit * 2**i < total} | {total})


def pair_sizes(collector: Collector, algorithm: PolicyGradient) -> list[int]:
    """Of parts of a row's R pairs, where they may be scored apart, and of whole rows up to a minibatch's."""
    likelihood, ids = algorithm.likelihood, collector.groups.row_ids()
    r = max(1, likelihood.num_columns(collector.steps(0, collector.policy.grid(collector.policy.num_steps), ids)))
    rows = max(1, len(ids) * collector.horizon // algorithm.num_minibatches)
    apart = not (likelihood.joint or algorithm.objective.whole_rows)
    return [*([n for n in multiples(1, r) if n < r] if apart else []), *multiples(r, r * rows)]


def fastest(seconds: Callable[[int], float], sizes: Sequence[int], most: float) -> int:
    """The smallest of `sizes` (ascending) whose `seconds` a row are as good as the best; above `most` none is tried."""
    found: dict[int, float] = {}
    for size in sizes:
        if found and size > most:
            break
        per_row = float(dist.all_max(torch.tensor(seconds(size) / size, dtype=torch.float64)))
        if found and per_row > WORSE * min(found.values()):
            break
        found[size] = per_row
    return next(size for size in found if found[size] <= AS_GOOD * min(found.values()))


def free_bytes(device: torch.device) -> int:
    """Of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            told = {name: rest.split() for name, _, rest in (line.partition(":") for line in file)}
        return int(told["MemAvailable"][0]) * 1024
    except (OSError, KeyError):
        return 2**32


class _Trial:
    """Passes of any number of rows at the observations that the first iteration begins with."""

    def __init__(self, collector: Collector, algorithm: PolicyGradient):
        self.policy, self.algorithm = collector.policy, algorithm
        self.device = self.policy.device
        self.obs = collector.env.reset(collector.groups.seeds(0))
        self.num = collector.groups.num_rows
        self.generator = torch.Generator().manual_seed(0)

    def velocity(self, rows: int) -> Tensor:
        """Of noise halfway, `rows` of them."""
        x = torch.randn((rows, *self.policy.event_shape), generator=self.generator)
        x, t = x.to(self.device, self.policy.dtype), torch.full((rows,), 0.5, device=self.device)
        cond = self.policy.encode(tree_map(lambda v: v[torch.arange(rows) % self.num], self.obs))
        return self.policy.velocity(x, t, torch.zeros_like(t), cond)

    def scored(self, rows: int) -> None:
        """Forward and backward."""
        self.velocity(rows).square().mean().backward()

    @torch.no_grad()
    def sampled(self, rows: int) -> None:
        """Forward."""
        self.velocity(rows)

    def sampling(self, rows: int) -> float:
        """Seconds of a pass."""
        return self._seconds(self.sampled, rows)

    def scoring(self, pairs: int) -> float:
        """Seconds of a pass and its backward."""
        return self._seconds(self.scored, pairs)

    def _seconds(self, run: Callable[[int], None], rows: int) -> float:
        """The least of a few; inf where the GPU has not the memory."""
        spent = []
        try:
            for _ in range(1 + REPEATS):
                begin = time.perf_counter()
                run(rows)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                spent.append(time.perf_counter() - begin)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        finally:
            self.algorithm.optimizer.zero_grad()
        return min(spent[1:])

    def bytes_per_row(self) -> float:
        """What a pass keeps for its backward, and a decoded sample for its own: more than sampling ever holds."""
        own = {p.untyped_storage()._cdata for p in self.policy.parameters()}
        rows = min(self.num, self.policy.multiple)
        kept: dict[int, int] = {}
        alive: list[Tensor] = []  # while they live, their storages are their own

        def note(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            alive.append(value)
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            v = self.velocity(rows)
            self.policy.field.decode(v.detach().requires_grad_())
        return max(1.0, sum(kept.values()) / rows)
