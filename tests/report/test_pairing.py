"""Only the same questions are paired, in whatever order they were asked."""

import math

import numpy as np
import pytest

from rlflow.report.pairing import pair, sample_keys, unlike
from rlflow.report.stats import paired_bootstrap

CAPTIONS = np.arange(20) // 2


def scores(better: float = 0.0, *, asked: list | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    value = np.random.default_rng(seed).random(20, dtype=np.float32) + np.float32(better)
    return {"m": value, "caption_id": CAPTIONS, "key": sample_keys(asked or range(20))}


def without(values: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in values.items() if k != name}


def test_rows_are_matched_by_key_not_by_place() -> None:
    a, b = scores(), scores(0.5, seed=1)
    expected = paired_bootstrap(a["m"], b["m"], CAPTIONS)
    order = np.random.default_rng(2).permutation(20)
    shuffled = {name: value[order] for name, value in b.items()}
    for other in (b, shuffled):
        found = pair(a, other, "m")
        assert found.difference == expected
        assert (found.reason, found.num_rows, found.num_prompts) == (None, 20, 10)


def test_one_other_question_and_nothing_is_paired() -> None:
    """Equal caption numbers do not make equal captions: a replaced prompt file gave a confident interval."""
    a, b = scores(), scores(asked=[*range(19), "another"])
    found = pair(a, b, "m")
    assert found.reason == "other samples were evaluated"
    assert all(math.isnan(v) for v in found.difference)
    assert unlike(a, {name: value[:10] for name, value in scores().items()}) == "other samples were evaluated"


def test_with_keys_it_does_not_matter_what_the_settings_are_called() -> None:
    """The same prompts under another path are the same prompts."""
    assert pair(scores(), scores(), "m", ["env.prompts"]).reason is None
    old = without(scores(), "key")
    assert pair(old, scores(), "m", ["env.prompts"]).reason == "evaluated with another env.prompts"


def test_evaluations_of_earlier_versions_are_paired_by_caption_numbers() -> None:
    old = without(scores(), "key")
    assert pair(old, scores(0.5), "m").difference.value == pytest.approx(0.5)
    assert pair(old, old | {"caption_id": CAPTIONS + 1}, "m").reason == "the prompts differ"
    assert pair({}, old, "m").reason == pair(old, old, "n").reason == "the scores of single samples were not kept"


def test_a_key_is_of_all_that_was_asked() -> None:
    """The whole row of the table, which judges read, in any order of its columns; the seed; the number."""
    row = {"prompt": "a sign", "text": "A"}
    asked = [[row, 0, 0], [row | {"text": "B"}, 0, 0], [row, 1, 0], [row, 0, 1]]
    keys = sample_keys(asked)
    assert len(np.unique(keys)) == 4
    assert np.array_equal(sample_keys([[{"text": "A", "prompt": "a sign"}, 0, 0]]), keys[:1])
