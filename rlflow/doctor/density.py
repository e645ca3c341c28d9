"""The exact density of a noise-free policy: its Euler chain is a change of variables from the start noise.

    x_{k+1} = x_k + dt_k v(x_k, t_k)  =>  log p(x_K) = log N(x_0; 0, I) - sum_k log |det(I + dt_k dv/dx(x_k))|

A chain is run backwards by solving each step for x_k with Newton's method. One backward pass per event dimension and
iteration: a measuring instrument for small actions, not something to train with. It holds where every step is one to
one, as it is for a smooth field and small enough dt; where Newton does not converge the answer is nan.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlflow.flow.path import at_start
from rlflow.flow.policy import FlowPolicy
from rlflow.types import Cond


def euler_log_prob(policy: FlowPolicy, x_1: Tensor, cond: Cond, iterations: int = 12, tol: float = 1e-3) -> Tensor:
    """Log-density (N,) in nats, before the squash, of samples x_1 (N, *D) of the deployment chain; nan if not found."""
    grid = policy.grid(policy.num_steps).to(x_1)
    y, log_det = x_1.flatten(1), torch.zeros(len(x_1)).to(x_1)
    for k in reversed(range(policy.num_steps)):
        y, step = _step_back(policy, y, grid[k], grid[k + 1], cond, iterations, tol)
        log_det = log_det + step
    spread = at_start(torch.ones(y.shape[1]).to(y), float(grid[0]))
    return (-0.5 * ((y / spread).square() + math.log(2 * math.pi)) - spread.log()).sum(1) - log_det


def _step_back(
    policy: FlowPolicy, x_next: Tensor, t: Tensor, t_next: Tensor, cond: Cond, iterations: int, tol: float
) -> tuple[Tensor, Tensor]:
    """(x before the step (N, D), log |det| of the step (N,))."""
    x, dt = x_next, t_next - t
    identity = torch.eye(x.shape[1]).to(x)
    for _ in range(iterations):
        v, jacobian = _velocity(policy, x, t, dt, cond)
        error, matrix = x + dt * v - x_next, identity + dt * jacobian
        x = x - torch.linalg.solve(matrix, error)
    v, jacobian = _velocity(policy, x, t, dt, cond)
    found = (x + dt * v - x_next).abs().amax(1) < tol
    return x, torch.where(found, torch.linalg.slogdet(identity + dt * jacobian).logabsdet, torch.nan)


def _velocity(policy: FlowPolicy, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """Velocity (N, D) of the step and its Jacobian (N, D, D)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = policy.velocity(x.unflatten(1, policy.event_shape), t.expand(len(x)), dt.expand(len(x)), cond).flatten(1)
        rows = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return v.detach(), torch.stack(rows, 1)
