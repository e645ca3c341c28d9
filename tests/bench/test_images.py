"""The bench counts what the methods really run: closed forms against the policy's own counter, and MixGRPO's shares."""

import statistics

import pytest
import torch

from rlflow.bench.images import _even, bench_t2i
from rlflow.bench.iterations import Real, Setting
from rlflow.bench.methods import count, forward_equivalents, methods, num_positions
from rlflow.bench.passes import listen
from rlflow.envs.captions import scenes
from rlflow.flow.steps import AllButLast, Window
from rlflow.models.dit import DiT
from rlflow.models.io import save_field

GRID = torch.linspace(0, 1, 26, dtype=torch.float64)
SLIDE = range(20)
K25 = {m.name: m for m in methods(window=4)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    net = DiT(scenes.VOCAB, width=16, depth=1, heads=1)
    return str(save_field(net, tmp_path_factory.mktemp("tiny")))


def test_flow_grpo_runs_every_step_and_trains_all_but_one() -> None:
    assert forward_equivalents(AllButLast()(0, GRID, torch.arange(1))) == 25 + 3 * 24
    assert count(K25["flow_grpo"], 25, 12, SLIDE) == 97


def test_shares_of_a_flow_grpo_iteration_over_a_full_slide() -> None:
    """The published savings, by count: each stays below the share it may take in time."""
    assert num_positions(25, 4) == len(SLIDE)
    assert count(K25["mixgrpo"], 25, 12, SLIDE) == 25 + 3 * 4
    assert count(K25["flash_star"], 25, 12, SLIDE) == 7 + 3 * 4
    after = [max(1, int((25 - (s + 3)) * 0.4) - 1) for s in SLIDE]
    assert count(K25["flash"], 25, 12, SLIDE) == statistics.fmean(
        s + 4 + n + 12 for s, n in zip(SLIDE, after, strict=True)
    )
    for method in K25.values():
        if method.aim is not None:
            assert count(method, 25, 12, SLIDE) / 97 * 1.05 < method.aim


@pytest.mark.parametrize("wanted", [1, 4, 10, 20, 50])
def test_timed_positions_stand_for_the_slide(wanted: int) -> None:
    """A subset of the window's positions is in range, distinct, and costs what the whole slide costs."""
    positions = _even(20, wanted)
    assert positions == sorted(set(positions))
    assert set(positions) <= set(SLIDE)
    assert len(positions) == min(wanted, 20)
    if wanted >= 4:
        for method in K25.values():
            assert count(method, 25, 12, positions) == pytest.approx(count(method, 25, 12, SLIDE), rel=0.02)


def test_shared_noise_runs_the_prefix_once_per_group() -> None:
    """A window that starts at s saves s (1 - 1/G) forwards a row."""
    for s in SLIDE:
        plan = Window(size=4, every=1)(s, GRID, torch.arange(1))
        assert forward_equivalents(plan, 12, shared_noise=True) == pytest.approx(37 - s * 11 / 12)


@pytest.mark.parametrize("name", K25)
def test_counts_are_what_the_policy_ran(name: str, tiny: str) -> None:
    """Forwards and backwards counted by the policy in one real iteration, at a window in the middle."""
    method = K25[name]
    real = Real(Setting(tiny, rows=4, group_size=2, num_steps=25, micro_batch=9), method)
    for iteration in (0, 7):
        before = real.parts.policy.network_cost
        real(iteration)
        ran = (real.parts.policy.network_cost - before) / 4
        assert ran == pytest.approx(count(method, 25, 2, [iteration]))


def test_bare_passes_are_those_of_an_iteration(tiny: str) -> None:
    """What is run bare has the rows, and the backwards, of the iteration it is compared with."""
    real = Real(Setting(tiny, rows=8, group_size=4, num_steps=5, micro_batch=9), methods(window=2)[0])
    real.parts.policy.multiple = 1  # nothing is filled up
    before = real.parts.policy.network_rows, real.parts.policy.graph_rows
    bare = real.bare(0)
    passes = bare.passes
    rows, graph = real.parts.policy.network_rows - before[0], real.parts.policy.graph_rows - before[1]
    assert sum(n for n, _ in passes) == rows == 8 * (5 + 4)
    assert sum(n for n, backward in passes if backward) == graph == 8 * 4
    assert listen(real.parts.policy.field, lambda: bare(0)) == passes


@pytest.mark.slow
def test_result_is_complete() -> None:
    """Every number that others rely on is there, and rows must be whole groups."""
    with pytest.raises(ValueError, match="multiple of group_size"):
        bench_t2i(rows=5, group_size=2)
    result = bench_t2i(iterations=1, rows=2, num_steps=5, window=2, repeats=1, group_size=2)
    assert result["first_log_ratio_max"] == 0
    assert result["network_share"] > 0
    for key in ("s_per_iteration", "bare_s", "overhead", "images_per_s", "single_file_ratio"):
        assert result[key] > 0
    assert set(result["methods"]) == set(K25)
