"""Sizes of passes: the fewest rows of the best throughput within the bound; the choice changes no number but rounding."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlflow.assembly.parts import make_parts
from rlflow.config import recipes
from rlflow.report.metrics_file import read_metrics
from rlflow.rl.learners import passes
from rlflow.train.trainer import Trainer
from tests.interrupted import assert_equal_runs

Make = Callable[..., Trainer]


class TestFastest:
    @staticmethod
    def law(fixed: float, each: float) -> Callable[[int], float]:
        """Seconds of a pass that costs `fixed` and `each` a row."""
        return lambda rows: fixed + each * rows

    def test_takes_the_least_rows_whose_fixed_cost_has_faded(self) -> None:
        """fixed + each n <= 1.02 (fixed + each N) n / N: of powers of two, with both costs 1, the first n >= N / (.02 N + 1.02)."""
        sizes, most = passes.multiples(1, 256), 256
        found = passes.fastest(self.law(1.0, 1.0), sizes, most)
        assert found == next(n for n in sizes if (1 + n) / n <= 1.02 * (1 + most) / most)
        assert passes.fastest(self.law(0.0, 1.0), sizes, most) == 1

    def test_goes_no_further_than_the_bound_and_always_takes_one(self) -> None:
        assert passes.fastest(self.law(100.0, 0.01), [4, 8, 16, 32], 17.5) == 16
        assert passes.fastest(self.law(100.0, 0.01), [4, 8], 1.0) == 4

    def test_stops_where_larger_passes_are_slower(self) -> None:
        asked = []

        def seconds(rows: int) -> float:
            asked.append(rows)
            return rows * (1.0 if rows < 8 else 2.0)

        assert passes.fastest(seconds, passes.multiples(1, 64), 64) == 1
        assert asked == [1, 2, 4, 8]

    def test_memory_that_runs_out_ends_the_search(self) -> None:
        assert passes.fastest(lambda n: float("inf") if n > 4 else 10 + n, [1, 2, 4, 8, 16], 100) == 4


def test_sizes_are_of_whole_groups_and_whole_rows_where_they_must_be(scenes_field: str) -> None:
    small = [f"policy.field={scenes_field}", "env.num_groups=3", "env.group_size=4", "policy.num_steps=6"]
    small += ["algorithm.num_minibatches=1"]
    for more, smallest in (([], 1), (["likelihood.joint=true"], 5)):
        parts = make_parts(recipes.load("t2i_flow_grpo", [*small, *more]))
        sizes: Any = passes.pair_sizes(parts.collector, parts.algorithm)  # type: ignore[arg-type]
        assert sizes[0] == smallest
        assert {n for n in sizes if n >= 5} == {5, 10, 20, 40, 60}
        assert passes.multiples(parts.collector.copies, 12) == [4, 8, 12]


AUTO, PARTS = "train.passes=auto", ["algorithm.kl.beta=0.1", "algorithm.num_minibatches=2", "algorithm.epochs=2"]


def chosen(run: Path) -> dict[str, int]:
    return json.loads((run / "run.json").read_text())["passes"]


def test_the_run_is_that_of_given_sizes_and_resumes_with_them(
    tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: measuring leaves weights, noise and prompts, and a resume makes no other choice."""
    trainer(tmp_path / "auto", AUTO, *PARTS).fit()
    found = chosen(tmp_path / "auto")
    sizes = f"env.rows_per_call={found['rows_per_call']}", f"algorithm.micro_batch={found['micro_batch']}"
    trainer(tmp_path / "given", *sizes, *PARTS, callbacks=[lambda run, *_: run.stop()]).fit()
    trainer(tmp_path / "given", *sizes, *PARTS, resume="last").fit()
    assert_equal_runs(tmp_path / "auto", tmp_path / "given")
    rows = [row for row in read_metrics(tmp_path / "auto") if row["kind"] == "train"]
    assert all(row["policy/first_log_ratio_max"] == 0 for row in rows)

    monkeypatch.setattr(passes, "choose", lambda *_: found)
    trainer(tmp_path / "parted", AUTO, *PARTS, callbacks=[lambda run, *_: run.stop()]).fit()
    monkeypatch.setattr(passes, "choose", lambda *_: {"rows_per_call": 4, "micro_batch": 2})
    trainer(tmp_path / "parted", AUTO, *PARTS, resume="last").fit()
    assert chosen(tmp_path / "parted") == found != {"rows_per_call": 4, "micro_batch": 2}
    assert_equal_runs(tmp_path / "auto", tmp_path / "parted")


def test_the_bound_is_of_what_a_pass_keeps(scenes_field: str) -> None:
    """Bytes that autograd holds of n rows are n times those of one row: more than half the bound is never taken."""
    parts = make_parts(recipes.load("t2i_flow_grpo", [f"policy.field={scenes_field}", "env.num_groups=4"]))
    trial = passes._Trial(parts.collector, parts.algorithm)  # type: ignore[arg-type]
    each = trial.bytes_per_row()
    kept: dict[int, int] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        kept.setdefault(value.data_ptr(), value.untyped_storage().nbytes())
        held.append(value)
        return value

    held: list[torch.Tensor] = []
    weights = sum(p.untyped_storage().nbytes() for p in parts.policy.parameters())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        trial.velocity(32)
    assert sum(kept.values()) <= 32 * each + weights
    found = passes.choose(parts.collector, parts.algorithm, 20 * each / 2**30)  # type: ignore[arg-type]
    assert found["micro_batch"] <= 20
    assert found["rows_per_call"] in (parts.collector.copies, 20)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.passes_gib=2"], r"^train\.passes_gib: is of train\.passes=auto"),
        ([AUTO, "train.sharding=full"], r"^train\.passes: a pass alone waits"),
    ],
)
def test_is_refused_where_it_cannot_be(settings: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipes.load("t2i_flow_grpo", settings)


def test_is_refused_by_learners_that_score_nothing_apart() -> None:
    with pytest.raises(ValueError, match=r"^train\.passes: auto sizes sampling and scoring"):
        recipes.load("robot_sac_gaussian", [AUTO])
