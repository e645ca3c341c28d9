"""RunLogger: what is written can be read whatever happens in between, and every number shown says what it is."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pty
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from rlflow.config.schema import WandbConfig
from rlflow.report.metrics_file import METRICS, MetricsFile, encode_row, read_metrics
from rlflow.report.video import write_video
from rlflow.train import terminal
from rlflow.train.budget import Budget
from rlflow.train.logger import RunLogger


def make(folder: Path, **options) -> RunLogger:
    settings = {"total_iterations": 10, "minutes": None, "tensorboard": False, "quiet": True} | options
    return RunLogger(folder, **settings)


def write(folder: Path, iterations: range, **options) -> None:
    with make(folder, **options) as log:
        for i in iterations:
            log.log(i, "train", {"reward/mean": i / 10})


def at(folder: Path) -> list[int]:
    return [row["iteration"] for row in read_metrics(folder)]


# -- metrics.jsonl --------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    """Numbers survive exactly, tensors too; nan and inf are null in the file (strict JSON) and nan when read."""
    with make(tmp_path) as log:
        log.log(1, "train", {"a": 0.1 + 0.2, "b": math.nan, "c": torch.tensor(2.0), "d": math.inf})
        log.log(1, "eval", {"e": 1})
    rows = read_metrics(tmp_path)
    assert rows[0] | {"b": 0, "d": 0} == {"iteration": 1, "kind": "train", "a": 0.1 + 0.2, "b": 0, "c": 2.0, "d": 0}
    assert math.isnan(rows[0]["b"])
    assert math.isnan(rows[0]["d"])
    assert rows[1] == {"iteration": 1, "kind": "eval", "e": 1.0}
    first = (tmp_path / METRICS).read_text().splitlines()[0]
    assert json.loads(first, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["b"] is None


def test_every_row_is_on_disk_at_once(tmp_path):
    """kill -9 after log() loses nothing: the row is in the file before log() returns."""
    with make(tmp_path) as log:
        log.log(1, "train", {"a": 1.0})
        assert at(tmp_path) == [1]


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 40])
@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_torn_line_of_any_length_is_cut_off_by_reading_the_end_of_the_file(tmp_path, monkeypatch, lines, length):
    monkeypatch.setattr("rlflow.report.metrics_file.TAIL", 7)
    path, whole = tmp_path / "metrics.jsonl", b"".join(encode_row(i, "train", {"a": i}) for i in range(lines))
    path.write_bytes(whole + b"x" * length)
    monkeypatch.setattr(Path, "read_bytes", None)  # the whole of it is never held
    MetricsFile(path).close()
    with path.open("rb") as file:
        assert file.read() == whole


@pytest.mark.parametrize("torn", ['{"iteration": 3, "kin', '{"iteration": 3, "kind": "train"}', "\0\0\0\0"])
def test_a_torn_last_line_is_not_a_row(tmp_path, torn):
    """Without its newline a line is not read, even where it parses; the next logger writes over it."""
    write(tmp_path, range(1, 3))
    with (tmp_path / METRICS).open("a") as file:
        file.write(torn)
    assert at(tmp_path) == [1, 2]
    write(tmp_path, range(5, 6))
    assert at(tmp_path) == [1, 2, 5]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    """It names the line: silently skipping it would hide a defect."""
    write(tmp_path, range(1, 3))
    path = tmp_path / METRICS
    path.write_text(path.read_text().replace("{", "", 1))
    with pytest.raises(ValueError, match="line 1 "):
        read_metrics(tmp_path)


def test_no_file_has_no_rows(tmp_path):
    """A run that has not begun can be read."""
    assert read_metrics(tmp_path) == []


def test_cut_keeps_what_the_checkpoint_knows(tmp_path):
    """Rows after the iteration go, a torn line goes, the rest is byte for byte the same; logging goes on."""
    write(tmp_path, range(1, 6))
    kept = "".join((tmp_path / METRICS).read_text().splitlines(keepends=True)[:3])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"iteration": 2, "ki')
    with make(tmp_path) as log:
        log.cut(3)
        assert (tmp_path / METRICS).read_text() == kept
        log.log(4, "train", {"reward/mean": 9.0})
    assert at(tmp_path) == [1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS]


def test_cut_drops_an_evaluation_that_the_checkpoint_does_not_know(tmp_path):
    """It will be made again: the row must not be there twice."""
    with make(tmp_path) as log:
        for i in (2, 4):
            log.log(i, "train", {"a": 1.0})
            log.log(i, "eval", {"b": 1.0})
        log.cut(4, evaluated=2)
    assert [(row["iteration"], row["kind"]) for row in read_metrics(tmp_path)] == [
        (2, "train"),
        (2, "eval"),
        (4, "train"),
    ]


def test_cut_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    """Killed before the replacement, the old file is whole."""
    write(tmp_path, range(1, 6))
    before = (tmp_path / METRICS).read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    log = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        log.cut(2)
    assert (tmp_path / METRICS).read_bytes() == before


FULL_DISK = """
import resource, sys
from rlflow.train.logger import RunLogger
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # bytes: the fifth line fits only in part
log = RunLogger(sys.argv[1], total_iterations=None, minutes=None, tensorboard=False, quiet=True)
for i in range(100):
    log.log(i, "train", {"reward/mean": 0.5})
"""


def test_a_full_disk_stops_with_a_clear_error_and_whole_lines(tmp_path):
    """A line of which only a part fits is taken back."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "make room and resume the run" in done.stderr
    content = (tmp_path / METRICS).read_bytes()
    assert content.endswith(b"}\n")
    assert at(tmp_path) == list(range(len(content) // len(content.splitlines(keepends=True)[0])))
    assert 1 <= len(at(tmp_path)) < 100


def test_names_and_kinds_are_checked(tmp_path):
    """A metric may not overwrite the iteration, and there are two kinds of rows."""
    with make(tmp_path) as log:
        with pytest.raises(ValueError, match="cannot be the name"):
            log.log(1, "train", {"iteration": 2.0})
        with pytest.raises(ValueError, match="'train' or 'eval'"):
            log.log(1, "test", {})
    assert at(tmp_path) == []


def test_a_rank_without_a_folder_writes_nothing(tmp_path, monkeypatch, capsys):
    """Every rank runs the same code; only rank 0 has a folder."""
    monkeypatch.chdir(tmp_path)
    with make(None) as log:
        log.cut(0)
        log.log(1, "eval", {"a": 1.0})
        log.progress(1, {}, 1.0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# -- tensorboard and wandb ------------------------------------------------------------------------


def _scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, round(e.value, 5)) for e in events.Scalars(name)]


def test_tensorboard_forgets_what_was_cut(tmp_path):
    """After a resume from iteration 3 the steps 4 and 5 of the first life are hidden."""
    write(tmp_path, range(1, 6), tensorboard=True)
    with make(tmp_path, tensorboard=True) as log:
        log.cut(3)
        log.log(4, "train", {"reward/mean": 7.0})
    assert _scalars(tmp_path, "reward/mean") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 7.0)]


def test_tensorboard_gets_the_config_pictures_and_films(tmp_path):
    """A picture byte for byte, a film as a GIF that moves, the config as text."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pytest.importorskip("imageio_ffmpeg")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "eval.png")
    write_video([torch.full((32, 48, 3), shade, dtype=torch.uint8) for shade in (0, 120, 240)], tmp_path / "f.mp4", 5)
    with make(tmp_path, tensorboard=True, config="train: {seed: 3}\n") as log:
        log.show(7, {"eval/pictures": tmp_path / "eval.png", "eval/film_0": tmp_path / "f.mp4"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,), (film,) = (events.Images(name) for name in ("eval/pictures", "eval/film_0"))
    assert (picture.step, picture.width, picture.height) == (7, 30, 20)
    assert picture.encoded_image_string == (tmp_path / "eval.png").read_bytes()
    moving = Image.open(io.BytesIO(film.encoded_image_string))
    assert (moving.format, moving.size) == ("GIF", (48, 32))
    assert moving.n_frames > 1
    (text,) = events.Tensors("config/text_summary")
    assert b"seed: 3" in text.tensor_proto.string_val[0]


def test_a_sink_that_fails_does_not_end_the_run(tmp_path):
    """metrics.jsonl goes on, and the failure is told once."""

    class Broken:
        def log(self, iteration, metrics):
            raise OSError("no space left")

        def show(self, iteration, files): ...

        def cut(self, iteration): ...

        def close(self): ...

    with make(tmp_path) as log:
        log.sinks.append(Broken())
        with pytest.warns(UserWarning, match="Broken logging stopped"):
            log.log(1, "train", {"a": 1.0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log.log(2, "train", {"a": 1.0})
    assert at(tmp_path) == [1, 2]


def test_wandb_missing_is_said_at_the_start(tmp_path, monkeypatch):
    """Before anything is trained, with what to do."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        make(tmp_path, wandb=WandbConfig())


class Wandb(types.ModuleType):
    """The package as far as we use it, writing down what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.config, self.logged = [], [], []

    def init(self, **options):
        self.inits.append(options)
        return types.SimpleNamespace(
            config=types.SimpleNamespace(update=lambda values, **more: self.config.append((values, more))),
            define_metric=lambda *args, **options: None,
            log=self.logged.append,
            finish=lambda: None,
        )

    def Image(self, path):
        return "image", path

    def Video(self, path, format):
        assert format == "mp4"
        return "video", path


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_finite_numbers_and_resumes_the_same_run(tmp_path, wandb):
    """A second logger of the folder continues the same wandb run."""
    for i in (1, 2):
        with make(tmp_path, wandb=WandbConfig()) as log:
            log.log(i, "train", {"a": 0.5, "reward/brightness/mean": 0.25, "b": math.nan})
    row = {"a": 0.5, "reward/brightness/mean": 0.25}
    assert wandb.logged == [{"iteration": 1, **row}, {"iteration": 2, **row}]
    assert wandb.inits[0] == wandb.inits[1]
    assert wandb.inits[0]["name"] == tmp_path.name
    assert wandb.inits[0]["project"] == "rlflow"


def test_wandb_gets_its_place_the_config_pictures_and_films(tmp_path, wandb):
    """As the config says; a budget that changed on resume is no error."""
    where = WandbConfig(project="mine", entity="us", group="g", tags=["a", "b"], name="first")
    with make(tmp_path, wandb=where, config="train: {iterations: 3}") as log:
        log.show(3, {"eval/pictures": tmp_path / "eval.png", "eval/film_0": tmp_path / "film.mp4"})
    (said,) = wandb.inits
    assert {k: said[k] for k in ("project", "entity", "group", "tags", "name")} == dataclasses.asdict(where)
    assert wandb.config == [({"train": {"iterations": 3}}, {"allow_val_change": True})]
    shown = {
        "eval/pictures": ("image", str(tmp_path / "eval.png")),
        "eval/film_0": ("video", str(tmp_path / "film.mp4")),
    }
    assert wandb.logged == [{"iteration": 3, **shown}]


def test_nothing_heavy_is_loaded_before_it_is_used():
    """What is drawn, shown or compiled loads on first use; an optimiser steps without PyTorch's compiler."""
    heavy = ("matplotlib", "rich", "tensorboard", "wandb", "scipy", "sympy", "torch._dynamo")
    code = (
        "import sys, torch, rlflow.train.trainer, rlflow.report.report;"
        "from rlflow.rl.optim import AdamW, Optimizer;"
        "weight = torch.nn.Parameter(torch.ones(2));"
        "optimizer = Optimizer([weight], AdamW());"
        "weight.grad = torch.ones(2);"
        "optimizer.step();"
        "optimizer.load_state_dict(optimizer.state_dict());"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# -- terminal -------------------------------------------------------------------------------------

METRICS_SHOWN = {"reward/mean": 0.5, "kl/ref": 0.01, "policy/clip_frac": 0.1, "perf/samples_per_s": 42.0}


def test_plain_lines_name_every_number(tmp_path, capsys):
    """Not a terminal: one plain line, no escape codes, each number with what it is and the time left."""
    with make(tmp_path, quiet=False, total_iterations=20) as log:
        log.progress(5, METRICS_SHOWN, 50.0)
    assert capsys.readouterr().out == (
        "iteration 5 of 20, 2 min 30 s left: reward 0.500, KL to reference 0.010, clip fraction 0.100, images/s 42\n"
    )


def test_what_should_be_zero_is_shown_where_it_is_not(tmp_path, capsys):
    """Samples without a score, skipped steps."""
    with make(tmp_path, quiet=False, total_iterations=20) as log:
        log.progress(1, {"reward/masked_frac": 0.0, "optim/skipped_steps": 0.0}, 1.0)
    assert capsys.readouterr().out == "iteration 1 of 20, 19 s left\n"
    with make(tmp_path, quiet=False, total_iterations=20) as log:
        log.progress(1, {"reward/mean": math.nan, "reward/masked_frac": 0.25, "optim/skipped_steps": 2.0}, 1.0)
    assert "reward nan, without a score 0.250, skipped steps 2" in capsys.readouterr().out


def test_plain_lines_are_rare(tmp_path, capsys, monkeypatch):
    """At most one in ten seconds; the last one is never swallowed."""
    clock = iter(range(1000))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock) / 4)  # a quarter of a second per look
    with make(tmp_path, quiet=False, total_iterations=None) as log:
        for i in range(1, 101):
            log.progress(i, {}, float(i))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("iteration 1")
    assert lines[-1].startswith("iteration 100")
    assert 3 <= len(lines) <= 5


def test_an_evaluation_is_printed_at_once_and_compared_with_the_start(tmp_path, capsys):
    """Also after a resume, when the start is only in the file."""
    with make(tmp_path) as log:
        log.log(0, "eval", {"eval/heldout/strict": 0.4})
    with make(tmp_path, quiet=False) as log:
        assert capsys.readouterr().out == ""
        log.log(5, "eval", {"eval/heldout/strict": 0.5, "eval/heldout/judge": math.nan, "time/eval": 3.0})
        out = capsys.readouterr().out
    assert out == (
        "evaluation after iteration 5: strict accuracy 0.500 (start 0.400), held-out judge nan, evaluation took 3.0 s\n"
    )


@pytest.mark.parametrize("name", ["pickscore", "ocr", "anything"])
def test_every_metric_of_an_evaluation_is_shown(tmp_path, capsys, name):
    """Whatever it is called, and the one that counts beside the bar."""
    rows = [{"eval/heldout/base_distance": 0.0, f"eval/heldout/{name}": value} for value in (0.5, 0.75)]
    with make(tmp_path, quiet=False) as log:
        for i, row in enumerate(rows):
            log.log(i, "eval", row)
    said = f"held-out {name} 0.750 (start 0.500)"
    assert said in capsys.readouterr().out.splitlines()[-1]
    seen = terminal.Evaluations()
    for row in rows:
        seen.add(row)
    assert seen.headline() == [(f"held-out {name}", "0.750 (start 0.500)")]


def test_time_left_follows_the_budget_that_ends_first():
    """By minutes it is what is left of them; by iterations the pace so far."""
    assert Budget(None, 5).left(10, 60.0) == 240
    assert Budget(100, None).left(10, 60.0) == pytest.approx(540)
    assert Budget(100, 5).left(10, 60.0) == 240
    assert math.isnan(Budget(None, None).left(10, 60.0))
    assert Budget(100, 5).done(10, 150.0) == 0.5


LIVE = """
import sys
from rlflow.train.logger import RunLogger
with RunLogger(sys.argv[1], total_iterations=20, minutes=None, tensorboard=False) as log:
    log.log(5, "eval", {"eval/heldout/strict": 0.5})
    log.progress(5, {"reward/mean": 0.123}, 50.0)
    raise RuntimeError("stop here")
"""


def _read_to_end(handle: int) -> str:
    """What a pseudo-terminal shows until its process ends (reading then fails)."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(handle, 4096):
            parts.append(part)
    os.close(handle)
    return b"".join(parts).decode()


def test_a_terminal_gets_a_live_view_and_its_cursor_back(tmp_path):
    """On a terminal: bar, numbers with their names, and the cursor shown again even after an error."""
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(tmp_path)], stdout=other, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(other)
    out = _read_to_end(main)
    process.wait(60)
    for part in ("evaluation after iteration 5: strict accuracy 0.500", "2 min 30 s left", "reward", "0.123", "━"):
        assert part in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")
