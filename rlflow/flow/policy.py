"""FlowPolicy: a velocity field made into a Markov chain with a Gaussian step.

`transition` is the only function that turns a velocity, noise and time into a distribution; sampling
iterates it (chain.py) and scoring calls it again on the stored pairs, so at unchanged weights the log-ratio is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.chain import Sampling
from rlflow.flow.field import FEW_ROWS, VelocityField
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import NEAR, TimeGrid, Uniform
from rlflow.flow.guidance import CONSTANT
from rlflow.flow.kernels import Kernel
from rlflow.flow.noise import Key
from rlflow.flow.path import at_start
from rlflow.flow.select import Select
from rlflow.flow.solvers import Euler, Solver, Velocity
from rlflow.flow.squash import Squash
from rlflow.flow.steps import Plan, Steps, deterministic
from rlflow.flow.weights import WeightSets
from rlflow.types import Chain, Cond, Tree, num_rows, tree_leaves, tree_map


def _filled_up(x: Tensor, multiple: int) -> Tensor | None:
    """Row numbers that repeat the last row up to a multiple of this; None where nothing is to be done."""
    num = len(x)
    if x.device.type != "cpu" or num % multiple == 0:
        return None
    return torch.arange(num + -num % multiple).clamp(max=num - 1)


class FlowPolicy(nn.Module):
    """Field + kernel + solver + grid + squash; the chain and its densities live before the squash.

    All its modules are put into evaluation mode: with dropout, say, sampling and scoring would be two networks.
    """

    def __init__(
        self,
        field: VelocityField,
        kernel: Kernel,
        solver: Solver | None = None,
        grid: TimeGrid | None = None,
        num_steps: int = 10,
        squash: Squash | None = None,
        autocast: torch.dtype | None = None,
        storage_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.field, self.kernel = field, kernel
        self.solver, self.grid, self.num_steps = solver or Euler(), grid or Uniform(), num_steps
        self.squash = squash or Squash()
        self.select = Select()  # of deployment; a rollout refuses a choice among samples
        self.autocast, self.storage_dtype = autocast, storage_dtype
        self.network_rows, self.graph_rows = 0, 0  # rows evaluated; those of them with a graph
        self.encoder_rows = 0
        self.multiple = FEW_ROWS  # a pass on the CPU is filled up to; a trace of what a GPU would do sets 1
        self._check_velocity()
        self.weights = WeightSets(self)
        self.eval()

    def _check_velocity(self) -> None:
        name = type(self.field).__name__
        self.check_solver(self.solver)
        if self.field.has_instantaneous:
            return
        if self.kernel.velocity == "instantaneous":
            raise ValueError(
                f"{type(self.kernel).__name__} needs the instantaneous velocity, but {name} has no dt = 0 branch: "
                "use kernel=ancestral or kernel=learned_noise"
            )
        if self.solver.needs_instantaneous:
            raise ValueError(f"{type(self.solver).__name__} needs a dt = 0 branch, {name} has none: use solver=euler")

    def check_solver(self, solver: Solver) -> None:
        """ValueError for a solver that asks what the field does not know."""
        if solver.needs_spread and not self.field.has_spread:
            raise ValueError(
                f"{type(solver).__name__} needs a spread head, {type(self.field).__name__} has none: fit one by "
                "rlflow pretrain robot_spread"
            )

    # -- where things live ------------------------------------------------------------------------

    @property
    def event_shape(self) -> tuple[int, ...]:
        """*D of one sample."""
        return self.field.event_shape

    @property
    def device(self) -> torch.device:
        """Device of the field's parameters."""
        return next(self.field.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the chain: at least float32."""
        return torch.promote_types(next(self.field.parameters()).dtype, torch.float32)

    @property
    def encoder_trains(self) -> bool:
        """False when encodings made during the rollout stay valid."""
        return any(p.requires_grad for p in self.field.encoder_parameters())

    @property
    def network_cost(self) -> int:
        """Forward-equivalents so far; a backward pass counts as two forwards."""
        return self.network_rows + 2 * self.graph_rows

    @property
    def counts(self) -> tuple[int, int, int]:
        """Rows evaluated, those of them with a graph, rows encoded."""
        return self.network_rows, self.graph_rows, self.encoder_rows

    def count(self, rows: Sequence[int]) -> None:
        """Add to `counts` what was evaluated in another way than by this policy's methods."""
        self.network_rows += rows[0]
        self.graph_rows += rows[1]
        self.encoder_rows += rows[2]

    @contextmanager
    def using(self, name: str) -> Iterator[FlowPolicy]:
        """Run with the weight set 'live', 'ref', 'old' or 'ema' in place; restored on exit."""
        with self.weights.using(name):
            yield self

    # -- the chain --------------------------------------------------------------------------------

    def encode(self, obs: Tree) -> Cond:
        """Raw observations (N, ...) to a Cond (N)."""
        obs, num = tree_map(lambda v: v.to(self.device), obs), num_rows(obs)
        if (fill := _filled_up(tree_leaves(obs)[0], self.multiple)) is not None:
            obs = tree_map(lambda v: v[fill], obs)
        with self._precision():
            cond = self.field.encode(obs)
        self.encoder_rows += num
        return cond if fill is None else Cond({name: cond[name][:num] for name in cond.data})

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def velocity(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond, *, guided: bool = True) -> Tensor:
        """The field's velocity (N, *D) in the chain's dtype, for matching losses without guidance; counts rows."""
        field = self.field if guided else self.field.unguided
        return self._passed(field, field, x, t, dt, cond)

    def with_spread(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """The field's velocity, flat, and log spread (N, D + 1) in the chain's dtype; counts rows."""
        return self._passed(self.field, self.field.with_spread, x, t, dt, cond)

    def _passed(self, field: VelocityField, asked: Velocity, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        self.network_rows += len(x) * (field.graph_calls if CONSTANT in cond.data else field.calls)
        self.graph_rows += len(x) * field.graph_calls * torch.is_grad_enabled()
        num, dtype = len(x), x.dtype
        if (fill := _filled_up(x, min(self.multiple, field.row_multiple))) is not None:
            x, t, dt, cond = x[fill], t[fill], dt[fill], cond.index(fill)
        with self._precision():
            v = asked(x, t, dt, cond).to(dtype)
        return v if fill is None else v[:num]

    def kernel_step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, cond: Cond) -> Gaussian:
        """The kernel's answer to a velocity (N, *D); it may hold a network too."""
        num = len(x)
        if (fill := _filled_up(x, self.multiple)) is not None:
            x, v, t, t_next, cond = x[fill], v[fill], t[fill], t_next[fill], cond.index(fill)
        dist = self.kernel(x, v, t, t_next, cond["pooled"])
        return dist if fill is None else Gaussian(dist.mean[:num], dist.std[:num])

    def kernel_dt(self, t: Tensor, t_next: Tensor) -> Tensor:
        """The dt (N,) for which the kernel asks the velocity."""
        return t_next - t if self.kernel.velocity == "step" else torch.zeros_like(t)

    def transition(self, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond) -> Gaussian:
        """p(x_next | x, cond) for x (N, *D), t, t_next (N,)."""
        v = self.velocity(x, t, self.kernel_dt(t, t_next), cond)
        return self.kernel_step(x, v, t, t_next, cond)

    def plan(self, num_steps: int | None = None) -> Plan:
        """The deployment plan: no noise."""
        return deterministic(self.times(num_steps or self.num_steps))

    def times(self, num_steps: int) -> Tensor:
        """The grid (K + 1,); ValueError where it starts before what the network knows."""
        t, first = self.grid(num_steps), self.field.first_time
        if first and t[0] < first - NEAR:
            raise ValueError(
                f"policy.grid starts at {float(t[0]):.3g}, and this model at {first:.3g}: use grid=scheduler"
            )
        return t

    def sample(
        self,
        cond: Cond,
        plan: Plan | None = None,
        *,
        key: Key | None = None,
        row_ids: Tensor | None = None,
        copies: int = 1,
        shared_noise: bool = False,
        x_0: Tensor | None = None,
        step_noise: Tensor | None = None,
        keep_path: bool = False,
    ) -> Chain:
        """One chain for each of `copies` samples of each row of `cond`; gradients are the caller's choice.

        With `shared_noise` the copies of a row start from one x_0, and the steps before the first noisy
        one run once per row and are then repeated. Noise is a function of (key, row_ids) only. A given `x_0` is the
        state where `plan` begins; of a field that knows nothing of t = 0 it is noise, scaled to what it has there.
        A given `step_noise` (K', N * copies, *D) is that of the steps.
        """
        plan, key = plan or self.plan(), key or Key(0, "sample")
        num = len(cond) * copies
        row_ids = torch.arange(num) if row_ids is None else row_ids.cpu()
        self._check_rows(plan, num, row_ids)
        run = Sampling(self, plan, key, row_ids, keep_path, step_noise)
        if x_0 is None:
            x_0 = run.noise("x_0", 0, row_ids[::copies] if shared_noise else row_ids)
        if self.field.first_time:
            x_0 = at_start(x_0, float(plan.t.flatten()[0]))
        split = plan.first_noisy() if shared_noise and not plan.per_row and copies > 1 else 0
        if split:
            run.advance(x_0, cond, range(split))
            run.repeat(copies)
        elif shared_noise and copies > 1 and len(x_0) < num:
            x_0 = x_0.repeat_interleave(copies, 0)
        run.advance(run.x if split else x_0, cond.repeat(copies), range(split, plan.num_steps))
        return run.chain()

    # -- checks -----------------------------------------------------------------------------------

    def _check_rows(self, plan: Plan, num: int, row_ids: Tensor) -> None:
        if len(row_ids) != num:
            raise ValueError(f"{len(row_ids)} row_ids for {num} samples: pass one id per sample, copies included")
        if plan.noisy.ndim == 2 and not isinstance(self.solver, Euler):
            raise ValueError("a plan whose rows differ in noise needs one network call per step: use solver=euler")

    @torch.no_grad()
    def kappa(self, t: Tensor, t_next: Tensor) -> Tensor:
        """|dmean/dv| / std (K,) of steps, in float64 on the CPU, with the noise at the end of the kernel's schedule."""
        kernel = copy.deepcopy(self.kernel).to("cpu", torch.float64)
        kernel.set_progress(1.0)
        return kernel.kappa(t, t_next)

    def check_steps(self, steps: Steps, max_kappa: float = 5.0) -> None:
        """ValueError unless every step that `steps` can score has a usable density on this policy's grid."""
        name = type(self.kernel).__name__
        if steps.mixed_rows and not isinstance(self.solver, Euler):
            raise ValueError(
                f"{type(steps).__name__} mixes noisy and ODE rows in one step, which needs one network call: "
                "use solver=euler"
            )
        grid = self.times(self.num_steps)
        t, t_next = grid[:-1], grid[1:]
        kappa = self.kappa(t, t_next)
        possible = list(steps.possible(self.num_steps))
        if possible and self.solver.needs_spread:
            raise ValueError(
                f"{type(self.solver).__name__} gives every row times of its own, which cannot be scored: use "
                "steps=none, or set it as eval.solver"
            )
        if late := [k for k in possible if k >= self.num_steps - self.field.unscored(grid)]:
            raise ValueError(
                f"steps {late} of {self.num_steps} end too near the data to be scored on this model's grid: set "
                f"steps.skip_last={self.field.unscored(grid)}"
            )
        silent = [k for k in possible if torch.isinf(kappa[k])]
        if silent:
            raise ValueError(f"{name} has zero std at step {silent} of {self.num_steps}: use steps=all_but_last")
        steep = [k for k in possible if not kappa[k] <= max_kappa]
        if steep:
            raise ValueError(
                f"{name} has kappa = |dmean/dv| / std of {[round(float(kappa[k]), 1) for k in steep]} at steps "
                f"{steep}, above {max_kappa}: network rounding would swamp the ratio; exclude them "
                "(steps.skip_last) or raise policy.max_kappa"
            )
