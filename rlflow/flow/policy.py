"""FlowPolicy: a velocity field made into a Markov chain with a Gaussian step.

`transition` is the only function that turns a velocity, noise and time into a distribution; sampling
iterates it and scoring calls it again on the stored pairs, so at unchanged weights the log-ratio is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.field import FEW_ROWS, VelocityField
from rlflow.flow.gaussian import Gaussian
from rlflow.flow.grid import NEAR, TimeGrid, Uniform
from rlflow.flow.kernels import Kernel
from rlflow.flow.noise import Key, noise
from rlflow.flow.path import at_start, expand
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
        self.network_rows += len(x) * field.calls
        self.graph_rows += len(x) * field.graph_calls * torch.is_grad_enabled()
        num, dtype = len(x), x.dtype
        if (fill := _filled_up(x, min(self.multiple, field.row_multiple))) is not None:
            x, t, dt, cond = x[fill], t[fill], dt[fill], cond.index(fill)
        with self._precision():
            v = asked(x, t, dt, cond).to(dtype)
        return v if fill is None else v[:num]

    def _step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, cond: Cond) -> Gaussian:
        """The kernel's answer; it may hold a network too."""
        num = len(x)
        if (fill := _filled_up(x, self.multiple)) is not None:
            x, v, t, t_next, cond = x[fill], v[fill], t[fill], t_next[fill], cond.index(fill)
        dist = self.kernel(x, v, t, t_next, cond["pooled"])
        return dist if fill is None else Gaussian(dist.mean[:num], dist.std[:num])

    def _kernel_dt(self, t: Tensor, t_next: Tensor) -> Tensor:
        return t_next - t if self.kernel.velocity == "step" else torch.zeros_like(t)

    def transition(self, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond) -> Gaussian:
        """p(x_next | x, cond) for x (N, *D), t, t_next (N,)."""
        v = self.velocity(x, t, self._kernel_dt(t, t_next), cond)
        return self._step(x, v, t, t_next, cond)

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
        run = _Run(self, plan, key, row_ids, keep_path, step_noise)
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


class _Run:
    """The state of one `sample` call: x, solver memory, and the pairs recorded so far."""

    def __init__(
        self, policy: FlowPolicy, plan: Plan, key: Key, row_ids: Tensor, keep_path: bool, step_noise: Tensor | None
    ):
        self.policy, self.plan, self.key, self.row_ids, self.given = policy, plan, key, row_ids, step_noise
        self.device, self.dtype = policy.device, policy.dtype  # each asks the first parameter: once per chain
        self.times = plan.t.to(self.dtype).to(self.device, non_blocking=True)  # a copy that waits for no GPU
        self.noisy = plan.noisy.to(self.device, non_blocking=True)
        self.velocity: Velocity = policy.with_spread if policy.solver.needs_spread else policy.velocity
        self.memory: object = None
        self.pairs: list[tuple[Tensor, ...]] = []
        self.path: list[tuple[Tensor, Tensor]] | None = [] if keep_path else None

    def noise(self, purpose: str, k: int, row_ids: Tensor) -> Tensor:
        if self.given is not None and purpose == "step":
            return self.given[k]
        key = self.key._replace(purpose=f"{self.key.purpose}/{purpose}", k=k)
        return noise(key, row_ids, self.policy.event_shape, self.dtype, self.device)

    def time(self, k: int, num: int) -> Tensor:
        return self.times[k].expand(num) if self.times.ndim == 1 else self.times[:, k]

    def advance(self, x: Tensor, cond: Cond, ks: range) -> None:
        """Run the steps `ks` from x."""
        self.x = x
        for k in ks:
            t, t_next = self.time(k, len(self.x)), self.time(k + 1, len(self.x))
            if self.plan.noisy[..., k].any():
                self.x = self._stored(self.x)  # both ends of a pair are kept
            self._remember(t)
            if self.plan.noisy.ndim == 2:
                self._mixed(k, t, t_next, cond)
            elif self.plan.noisy[k]:
                self._stochastic(k, t, t_next, cond)
            else:
                self.x, self.memory = self.policy.solver(self.velocity, self.x, t, t_next, cond, self.memory)
        self.end = self.time(self.plan.num_steps, len(self.x))

    def _remember(self, t: Tensor) -> None:
        if self.path is not None:
            self.path.append((self.x, t))

    def _stored(self, x: Tensor) -> Tensor:
        """Rounded to the storage dtype: the chain continues from the value that will be scored."""
        storage = self.policy.storage_dtype
        return x if storage is None else x.to(storage).to(x.dtype)

    def _stochastic(self, k: int, t: Tensor, t_next: Tensor, cond: Cond) -> None:
        dist = self.policy.transition(self.x, t, t_next, cond)
        x_next = self._stored(dist.sample(self.noise("step", k, self.row_ids)))
        self.pairs.append((self.x, x_next, t, t_next, dist.mean, dist.std))
        self.x, self.memory = x_next, None

    def _mixed(self, k: int, t: Tensor, t_next: Tensor, cond: Cond) -> None:
        """Noisy for some rows, Euler for the others, with one network call."""
        policy, noisy = self.policy, self.noisy[:, k]
        dt = torch.where(noisy, policy._kernel_dt(t, t_next), t_next - t)
        v = policy.velocity(self.x, t, dt, cond)
        dist = policy._step(self.x, v, t, t_next, cond)
        x_next = self._stored(dist.sample(self.noise("step", k, self.row_ids)))
        self.pairs.append((self.x, x_next, t, t_next, dist.mean, dist.std))
        self.x = torch.where(expand(noisy, v), x_next, self.x + expand(t_next - t, v) * v)

    def repeat(self, copies: int) -> None:
        """One row becomes `copies` rows."""

        def again(v: Tensor) -> Tensor:
            return v.repeat_interleave(copies, 0)

        self.x, self.memory = again(self.x), tree_map(again, self.memory)
        if self.path is not None:
            self.path = [(again(x), again(t)) for x, t in self.path]

    def chain(self) -> Chain:
        """Everything recorded, with the scored columns only."""
        path = path_t = None
        if self.path is not None:
            self._remember(self.end)
            path, path_t = (torch.stack(z, 1) for z in zip(*self.path, strict=True))
        x, x_next, t, t_next, mean, std = self._columns()
        return Chain(self.x, x, x_next, t, t_next, mean, std, path, path_t)

    def _columns(self) -> list[Tensor]:
        if not self.pairs or self.plan.num_scored == 0:
            empty = self.x.new_empty((len(self.x), 0, *self.x.shape[1:]))
            return [empty, empty, empty.flatten(2)[:, :, 0], empty.flatten(2)[:, :, 0], empty, empty]
        stacked = [torch.stack(z, 1) for z in zip(*self.pairs, strict=True)]
        ran = self.plan.noisy if self.plan.noisy.ndim == 1 else torch.ones(self.plan.num_steps, dtype=torch.bool)
        if self.plan.scored.ndim == 1:
            if bool(self.plan.scored[ran].all()):
                return stacked
            return [z[:, self.plan.scored[ran].nonzero()[:, 0]] for z in stacked]
        columns = self.plan.scored[:, ran].nonzero()[:, 1].reshape(len(self.x), -1).to(self.x.device)
        rows = torch.arange(len(self.x), device=self.x.device).unsqueeze(-1)
        return [z[rows, columns] for z in stacked]
