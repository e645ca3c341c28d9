"""`rlflow bench actions`: network calls are those of the solver, and what has no simulator is refused."""

import pytest
import torch

from rlflow.bench.actions import bench_actions
from rlflow.models.io import save_field
from rlflow.models.mlp import MLPField


def saved(folder, spread: bool) -> str:
    torch.manual_seed(0)
    judged_by = {"policy": {"num_steps": 2}, "env": {"name": "toy_routes"}}
    field = MLPField(2, (2, 2), width=8, depth=1, spread=spread)
    if spread:
        torch.nn.init.zeros_(field.spread_head[-1].bias)
    return str(save_field(field, folder, {}, judged_by))


def test_calls_are_the_solvers(tmp_path):
    """A head that knows nothing tells a spread of about 1, so a step is about eta."""
    checkpoint = saved(tmp_path / "a", spread=True)
    told = bench_actions(checkpoint, eta=0.34, batches=(1, 4), calls=2, chunks=1)
    assert set(told["cpu_ms"]) == set(told["calls"]) == {"K=1", "K=2", "K=4", "adaptive 0.34"}
    assert all(set(row) == {"batch_1", "batch_4"} and min(row.values()) > 0 for row in told["cpu_ms"].values())
    assert [told["calls"][f"K={k}"] for k in (1, 2, 4)] == [1, 2, 4]
    assert told["calls"]["adaptive 0.34"] == 3
    assert bench_actions(checkpoint, eta=1e6, batches=(2,), calls=1, chunks=1)["calls"]["adaptive 1e+06"] == 1


def test_a_policy_without_a_head_takes_fixed_steps(tmp_path):
    told = bench_actions(saved(tmp_path / "b", spread=False), batches=(1,), calls=1, chunks=1)
    assert set(told["calls"]) == {"K=1", "K=2", "K=4"}


def test_a_policy_of_no_simulator_is_refused(tmp_path):
    save_field(MLPField(2, (2, 2)), tmp_path / "homeless")
    with pytest.raises(ValueError, match="does not name the simulator"):
        bench_actions(str(tmp_path / "homeless"))
