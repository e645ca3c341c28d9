"""The critic as a function of observations."""

import torch

from rlflow.rl.critic import Critic
from rlflow.types import Cond


def test_observations_that_differ_in_mean_or_length_alone_have_values_of_their_own() -> None:
    """A norm over the raw features would map c x + b to one value for all c > 0 and b."""
    torch.manual_seed(0)
    critic = Critic(4, width=64)
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)  # all of one mean and length
    scale, shift = torch.rand(2, 512, 1, generator=torch.Generator().manual_seed(1)) * 2
    obs, target = scale * x + shift, (scale + shift).squeeze(1)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (critic(Cond({"pooled": obs})) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * float(target.var())
