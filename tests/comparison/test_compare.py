"""compare: what each run gained, and differences to the first that are paired only where they may be."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from rlflow.cli import main
from rlflow.comparison.compare import compare, run_tables
from rlflow.comparison.report import figure
from rlflow.report.curves import NETWORK_ROWS, SECONDS
from rlflow.report.stats import paired_bootstrap
from rlflow.train.logger import RunLogger

STRICT = "eval/heldout/strict"
NUM = 120


def fake_run(
    folder: Path,
    after: torch.Tensor,
    *,
    scores: bool = True,
    train: dict | None = None,
    env: dict | None = None,
    **settings,
) -> Path:
    """A run of one iteration, evaluated before (a third right) and after on the same captions."""
    folder.mkdir(parents=True)
    evaluation = {"num": NUM, "seed": 0, "prompts": None} | settings
    config = {"train": {"seed": 3} | (train or {}), "eval": evaluation, "env": {"prompts": "scenes"} | (env or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"recipe": "t2i_cps", "weights": "ema"}))
    (folder / "samples").mkdir()
    with RunLogger(folder, total_iterations=1, minutes=None, tensorboard=False, quiet=True) as log:
        for iteration, value in ((0, first()), (1, after)):
            cost = {SECONDS: 7.0 * iteration, NETWORK_ROWS: 100.0 * iteration}
            if iteration:
                log.log(1, "train", cost)
            log.log(iteration, "eval", cost | {STRICT: float(value.nanmean())})
            if scores:
                tensors = {"strict": value, "caption_id": torch.arange(NUM) // 4}
                save_file(tensors, folder / f"samples/eval_{iteration:06d}.safetensors")
    return folder


def first() -> torch.Tensor:
    return (torch.arange(NUM) % 3 == 0).float()


def better(share: float, seed: int = 0) -> torch.Tensor:
    """The first evaluation with some wrong ones made right."""
    rng = torch.Generator().manual_seed(seed)
    return torch.maximum(first(), (torch.rand(NUM, generator=rng) < share).float())


def test_gain_and_difference_are_the_paired_bootstrap(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", better(0.2))
    b = fake_run(tmp_path / "b", better(0.8, seed=1))
    result = compare([a, b])
    captions = (torch.arange(NUM) // 4).numpy()
    gain = paired_bootstrap(first().numpy(), better(0.2).numpy(), captions)
    assert result["runs"][0]["gain"][STRICT] == {"value": gain.value, "low": gain.low, "high": gain.high}
    difference = paired_bootstrap(better(0.2).numpy(), better(0.8, seed=1).numpy(), captions)
    (against,) = result["differences"]
    assert against["paired"] is True
    assert against["metrics"][STRICT]["value"] == pytest.approx(difference.value)
    assert against["metrics"][STRICT]["low"] > 0, "so much better is not chance"
    assert result["runs"][1]["eval"][STRICT] == pytest.approx(float(better(0.8, seed=1).mean()))
    assert result["runs"][1]["cost"] == {"seconds": 7.0, "network_rows": 100.0}
    assert (result["runs"][0]["recipe"], result["runs"][0]["seed"], result["runs"][0]["iteration"]) == ("t2i_cps", 3, 1)


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, better(0.5)) for name in "ab"]
    assert compare(runs)["differences"][0]["metrics"][STRICT] == {"value": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1}, "evaluated with another eval.seed"),
        ({"num": 60}, "evaluated with another eval.num"),
        ({"prompts": "mine.txt"}, "evaluated with another eval.prompts"),
        ({"scores": False}, "the scores of single samples were not kept"),
        ({"env": {"name": "walker2d"}}, "evaluated with another env.name"),
        ({"env": {"settings": {"env_id": "Ant-v5"}}}, "evaluated with another env.settings.env_id"),
    ],
)
def test_what_is_not_the_same_noise_is_not_paired(tmp_path: Path, change: dict, reason: str) -> None:
    """The difference of the means stays, without bounds, and says why."""
    a, b = fake_run(tmp_path / "a", better(0.2)), fake_run(tmp_path / "b", better(0.8), **change)
    (against,) = compare([a, b])["differences"]
    assert against["paired"] is False
    assert reason in against["reason"]
    expected = float(better(0.8).mean() - better(0.2).mean())
    assert against["metrics"][STRICT] == {"value": pytest.approx(expected), "low": None, "high": None}


def test_other_captions_are_not_paired(tmp_path: Path) -> None:
    a, b = (fake_run(tmp_path / name, better(0.2)) for name in "ab")
    path = b / "samples/eval_000001.safetensors"
    save_file({"strict": better(0.2), "caption_id": torch.arange(NUM) // 5}, path)
    assert compare([a, b])["differences"][0]["reason"] == "the prompts differ"


def test_the_answer_is_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = better(0.5)
    after[0] = math.nan
    runs = [fake_run(tmp_path / "[a]", better(0.2)), fake_run(tmp_path / "b", after, train={"permute_rewards": True})]
    result = compare(runs)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["runs"][1]["control"] is True
    for table in run_tables(result):
        table.print()
    assert "95 % paired bootstrap" in capsys.readouterr().out


def test_the_command_reaches_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs or a folder of them: tables on the terminal, in LaTeX, as JSON; a page and figures in files."""
    for name, share in (("a", 0.2), ("b", 0.8)):
        fake_run(tmp_path / name / "seed-3", better(share), train={"permute_rewards": name == "b"})
    files = [str(tmp_path / f"out/x.{kind}") for kind in ("html", "png", "pdf")]
    main(["compare", str(tmp_path), "--html", files[0], "--png", files[1], "--pdf", files[2], "--x", "time"])
    said = capsys.readouterr().out
    assert "difference to" in said
    assert "At 7.0 s of training" in said
    assert [Path(f).read_bytes()[:4] for f in files] == [b"<!do", b"\x89PNG", b"%PDF"]
    assert all(f"Written: {Path(f).resolve()}" in said for f in files)
    with pytest.raises(ValueError, match=r"--x cost: choose of iterations, .* or a held-out metric .*: strict"):
        figure([tmp_path], files[1], x="cost")
    main(["compare", str(tmp_path), "--latex"])
    said = capsys.readouterr().out
    assert r"95 \% paired bootstrap" not in said.split("\\begin")[0], "a comment needs no escape"
    assert r"\toprule" in said
    assert r"t2i\_cps" in said
    assert "→" not in said
    main(["compare", str(tmp_path), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert len(values["runs"]) == 2
    assert values["groups"]["runs"]["t2i_cps, permute_rewards=true"]["control"] is True


def test_seeds_are_one_line_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, share in ((0, 0.2), (1, 0.8)):
        fake_run(tmp_path / f"seed-{seed}", better(share, seed), train={"seed": seed})
    main(["compare", str(tmp_path)])
    said = capsys.readouterr().out
    assert "Before and after" in said
    assert said.count("t2i_cps") == len(said.split("At ")), "once in every table"


def test_one_run_is_before_and_after(tmp_path: Path) -> None:
    result = compare([fake_run(tmp_path / "a", better(0.9))])
    assert result["differences"] == []
    assert result["runs"][0]["gain"][STRICT]["low"] > 0


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run folder"):
        compare([])
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        compare([tmp_path])
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="none of these runs has been evaluated"):
        compare([tmp_path])
