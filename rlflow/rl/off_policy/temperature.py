"""Temperature of SAC's entropy term, tuned until the entropy meets its target (Haarnoja et al. 2018).

    L(alpha) = -log alpha E[ log p + H_target ]

Where the entropy -E[log p] is below the target, log p + H_target is positive and alpha rises; above it, alpha falls.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.rl.optim import AdamW, Deferred


class Temperature:
    """alpha = exp(log); a learning rate of 0 keeps it fixed."""

    def __init__(self, target: float, initial: float, lr: float, device: torch.device):
        if initial <= 0:
            raise ValueError(f"the temperature must be positive, got {initial}: a small one hardly counts")
        self.target, self.lr = target, lr
        self.log = nn.Parameter(torch.tensor(math.log(initial), device=device))
        self.optimizer = Deferred([self.log], AdamW(lr=lr, betas=(0.9, 0.999), max_grad_norm=0.0), "algorithm.alpha_lr")

    @property
    def value(self) -> Tensor:
        """alpha, without gradient."""
        return self.log.detach().exp()

    def fit(self, log_prob: Tensor) -> None:
        """One step from the mean log-probability."""
        if self.lr == 0:
            return
        self.optimizer.advance([-(log_prob.detach() + self.target).to(self.log)])

    def state_dict(self) -> dict[str, Any]:
        """log alpha and its optimiser."""
        return {"log": self.log.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        with torch.no_grad():
            self.log.copy_(state["log"])
        self.optimizer.load_state_dict(state["optimizer"])
