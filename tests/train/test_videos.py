"""A run of a model of videos: rewards get its frames, evaluations leave strips and films, and every command takes it."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import rlflow as rf
from rlflow import cli
from rlflow.deploy.runs import Asked, evaluator_of
from rlflow.doctor.doctor import doctor
from rlflow.train.trainer import Trainer

SEEN: list[tuple[int, ...]] = []
FEW = (
    *("policy.field.resolution=32", "policy.field.width=48", "policy.field.frames=5", "policy.field.lora=2"),
    *("policy.field.max_sequence_length=16", "policy.num_steps=6", "env.num_groups=2", "env.group_size=4"),
    *("algorithm.num_minibatches=2", "eval.num=3", "eval.num_steps=2", "train.tensorboard=false"),
    *("reward.settings={}", "eval.metrics={bright: brightness}", "reward.frames=[0, -1]"),
)


def motion(frames: Tensor, prompt: list[str]) -> Tensor:
    """How much neighbours in time differ."""
    SEEN.append(tuple(frames.shape))
    return (frames[:, 1:] - frames[:, :-1]).abs().mean((1, 2, 3, 4))


@pytest.fixture(scope="module")
def settings(tiny_pipeline, tmp_path_factory) -> list[str]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("".join(f"{i} cats\n" for i in range(12)))
    weights = "reward.weights={brightness: 1, 'tests.train.test_videos:motion': 1}"
    return [f"policy.field.checkpoint={tiny_pipeline('wan')}", f"env.prompts={prompts}", *FEW, weights]


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "run"
    made = Trainer("wan_mixgrpo", folder, overrides=[*settings, "train.iterations=1"], quiet=True, trust_code=True)
    made.fit()
    return folder


def test_rewards_of_videos_get_all_frames(run):
    """Of a group or more at a time, in [0, 1], channels before rows."""
    assert {shape[1:] for shape in SEEN} == {(5, 3, 32, 48)}
    assert sum(shape[0] for shape in SEEN) == 8


def test_an_evaluation_leaves_strips_and_films(run):
    kept = load_file(run / "samples" / "images_000001.safetensors")
    assert kept["images"].shape == (3, 3, 32, 5 * 48)
    names = sorted(path.stem for path in (run / "samples").glob("film_*"))
    assert names == [f"film_{i:06d}_{row}" for i in (0, 1) for row in range(3)]
    with Image.open(run / "samples" / "eval_000001.png") as picture:
        assert picture.width > 5 * 48


def test_the_report_plays_them_before_and_after(run):
    html = (run / "report.html").read_text()
    assert html.count('src="data:video/mp4') + html.count('src="data:image/gif') == 6
    assert "Left before, right after training: same prompts, same starting noise" in html


def test_the_frames_that_judge_are_those_of_the_run(run):
    """Of its model too: the first and the last, whose mean the metric is."""
    videos = evaluator_of(run / "model", Asked(trust_code=True))()
    assert videos.images.shape == (3, 5, 3, 32, 48)
    bright = videos.images[:, [0, -1]].mean((1, 2, 3, 4))
    torch.testing.assert_close(videos.scores["bright"], bright, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["png", "mp4", "gif"])
def test_sample_writes_strips_or_a_film(run, kind, tmp_path, capsys):
    out = tmp_path / f"x.{kind}"
    cli.main(["sample", str(run), "--prompt", "2 cats", "--num", "2", "--out", str(out), "--trust-code"])
    assert f"2 videos in {out}" in capsys.readouterr().out
    if kind == "gif":
        with Image.open(out) as film:
            assert film.n_frames == 10, "one video after the other"
    assert out.stat().st_size > 500


def test_the_best_of_several_is_chosen_by_its_frames(run):
    found = []
    for num in (1, 3):
        policy = rf.load(run, select={"name": "best_of", "num": num, "scorer": "brightness"}, trust_code=True)
        found.append(rf.sample(policy, ["2 cats", "3 cats"])[:, [0, -1]].mean((1, 2, 3, 4)))
    assert (found[1] >= found[0] - 1e-6).all()


def test_frames_that_there_are_not_are_refused(settings, tmp_path):
    more = ["train.iterations=1", "reward.frames=[5]", "eval.every=0"]
    with pytest.raises(ValueError, match=r"^reward\.frames: 5 is no frame of 5"):
        Trainer("wan_mixgrpo", tmp_path / "run", overrides=[*settings, *more], quiet=True, trust_code=True)


@pytest.mark.slow
def test_doctor_passes(settings):
    from rlflow.config import recipes

    checks = doctor(recipes.load("wan_mixgrpo", [*settings, "train.iterations=1"], trust_code=True), trust_code=True)
    assert [(c.name, c.value, c.limit) for c in checks if c.passed is False] == []
