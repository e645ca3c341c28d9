"""The squash's Jacobian and inverse."""

import torch

from rlflow.flow.squash import SQUASHES, Squash, Tanh


def test_log_det_is_the_log_of_the_jacobians_determinant():
    x = 2 * torch.randn(5, 2, 3, dtype=torch.float64)
    for squash in (Squash(), Tanh()):
        for row in x:
            jacobian = torch.autograd.functional.jacobian(lambda v: squash(v[None])[0].flatten(), row).flatten(1)  # noqa: B023
            torch.testing.assert_close(squash.log_det(row[None])[0], torch.linalg.slogdet(jacobian).logabsdet)


def test_it_is_finite_where_the_action_has_reached_its_bound():
    x = torch.tensor([[40.0, -90.0]], requires_grad=True)
    value = Tanh().log_det(x)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()


def test_demonstrations_go_back_and_forth():
    """Inside the limit exactly, at the bound to the limit."""
    action = torch.tensor([[-0.99, 0.3, 0.998]], dtype=torch.float64)
    torch.testing.assert_close(Tanh()(Tanh().inverse(action)), action)
    ends = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(Tanh()(Tanh().inverse(ends)), ends * Tanh.LIMIT)
    assert set(SQUASHES) == {"identity", "tanh"}
