"""A film shows the episodes that were evaluated, and is missed only where someone could have it."""

import warnings

import pytest
import torch

from rlflow.envs.base import VecEnv
from rlflow.evaluation.film import Film
from rlflow.report.video import SECONDS

NEVER = NotImplementedError("Blind draws no pictures")
NOT_HERE = RuntimeError("no picture can be drawn without a screen: `apt-get install libosmesa6`")


class Watched(VecEnv):
    """Three rows whose picture is the number of steps made; `error` in place of a picture."""

    num_envs = 3

    def __init__(self, error: Exception | None = None):
        self.error, self.steps = error, 0

    def render(self, row, size=(192, 192)):
        if self.error is not None:
            raise self.error
        return torch.full((2, 2, 3), self.steps % 256, dtype=torch.uint8)

    def step_all(self, num: int) -> None:
        for _ in range(num):
            self.steps += 1
            if self.watch is not None:
                self.watch()


def said(error: Exception, num: int | None) -> list[str]:
    """What is warned of while `num` rows of an environment that fails so are filmed for three steps."""
    env = Watched(error)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with Film(env, num) as film:
            env.step_all(3)
    assert film.frames == []
    assert env.watch is None
    return [str(w.message) for w in found]


@pytest.mark.parametrize("num", [None, 1])
def test_a_machine_that_cannot_draw_is_told_once_what_to_install(num):
    (line,) = said(NOT_HERE, num)
    assert "apt-get install libosmesa6" in line


def test_an_environment_that_never_draws_is_mentioned_to_those_who_asked():
    assert said(NEVER, None) == []
    assert said(NEVER, 0) == []
    assert said(NEVER, 2) == ["no film of the evaluation: Blind draws no pictures"]


def test_every_row_is_filmed_until_its_first_end():
    """Row 0 ends after two steps and begins anew, row 1 goes on; by default two rows are filmed."""
    env = Watched()
    with Film(env, None) as film:
        env.step_all(2)
        film.cut(torch.tensor([True, False, False]))
        env.step_all(3)
        film.cut(torch.tensor([False, True, True]))
    env.step_all(1)
    assert [[int(frame[0, 0, 0]) for frame in row] for row in film.frames] == [[1, 2], [1, 2, 3, 4, 5]]


def test_no_film_is_longer_than_it_says():
    """Of steps of .1 s, each is a frame; of 10 ms every fourth is, and 25 of them are a second."""
    for seconds, num in ((0.1, SECONDS / 0.1), (0.01, SECONDS * 25)):
        env = Watched()
        env.step_seconds = seconds
        with Film(env, 1) as film:
            env.step_all(2000)
        assert len(film.frames[0]) == num
        assert len(film.frames[0]) / film.fps == pytest.approx(SECONDS)
