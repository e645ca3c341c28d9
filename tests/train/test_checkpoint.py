"""Checkpoints are written completely or not at all, come back bit for bit, and survive a kill at any point."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlflow.rl.groups import Groups
from rlflow.train import checkpoint
from rlflow.train.checkpoint import STATE, TENSORS, Checkpoints, deal, pack, rng_state, set_rng_state, unpack


def state(number: float = 1.0) -> dict:
    return {
        "policy": {"w": torch.full((3,), number), "b": torch.arange(2, dtype=torch.bfloat16)},
        "moments": {"0/step": torch.tensor(4.0), "0/exp_avg": torch.randn(2, 2, dtype=torch.float64)},
        "trainer": {"iteration": 4, "seconds": 0.1 + 0.2, "last_eval": {}, "none": None, "list": [1, [2.5, "x"]]},
        "empty": {},
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Dtypes, empty dicts, None, nested lists and the order of keys included."""
    saved = state()
    Checkpoints(tmp_path).save(4, saved)
    iteration, loaded = Checkpoints(tmp_path).load("last")
    assert iteration == 4
    assert same(saved, loaded)


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    """The live weights and a view of them: safetensors alone refuses this."""
    whole = torch.arange(6.0)
    Checkpoints(tmp_path).save(0, {"a": whole, "b": whole[:3], "c": whole.view(2, 3).T})
    _, loaded = Checkpoints(tmp_path).load()
    assert torch.equal(loaded["c"], whole.view(2, 3).T)
    loaded["a"].zero_()
    assert torch.equal(loaded["b"], torch.arange(3.0))


def test_pack_holds_no_objects() -> None:
    """What is not a tensor is JSON: no pickle anywhere."""
    tensors, values = pack(state())
    assert same(state()["trainer"], unpack(tensors, json.loads(json.dumps(values)))["trainer"])
    with pytest.raises(TypeError):
        json.dumps(pack({"module": torch.nn.Linear(1, 1)})[1])


def episodes(first: int, num: int) -> dict:
    """What a process with the rows `first`, `first` + 1, ... saves."""
    rows = torch.arange(first, first + num)
    return {"env": {"env": {"sim": {"x": rows}}, "own": {"count": torch.tensor(7.0)}}, "obs": rows.float().view(-1, 1)}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2)])
def test_episodes_are_dealt_in_global_order(before: int, after: int) -> None:
    """Whatever the two numbers of processes, row i of the run stays row i; what all share goes to each."""
    states = [episodes(6 // before * rank, 6 // before) for rank in range(before)]
    for rank in range(after):
        mine = deal(states, Groups(3 * 2, 1, rank, after))
        assert same(mine, episodes(6 // after * rank, 6 // after))


@pytest.mark.parametrize("odd", [torch.zeros(5, dtype=torch.uint8), {"of": [1, 2]}, 3, "text"])
def test_what_has_no_rows_is_not_dealt_but_comes_back_to_as_many_processes(odd: object) -> None:
    """A generator's state, say: two processes with one of it would draw the same."""
    states = [episodes(0, 3) | {"rng": odd}, episodes(3, 3) | {"rng": odd}]
    assert deal(states, Groups(6, 1, 1, 2)) is states[1]
    with pytest.raises(
        ValueError, match=r"^rng\S* of 2 processes cannot be shared by 3: .* as many processes as befor"
    ):
        deal(states, Groups(6, 1, 1, 3))


def test_what_all_share_is_one_number() -> None:
    states = [episodes(0, 3), episodes(3, 3)]
    states[1]["env"]["own"]["count"] = torch.tensor(8.0)
    with pytest.raises(ValueError, match="^env/own/count of 2 processes"):
        deal(states, Groups(6, 1))


def test_rng_state_restores_the_stream() -> None:
    saved = rng_state()
    first = torch.rand(4)
    set_rng_state(saved)
    assert torch.equal(first, torch.rand(4))


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for iteration, score in [(1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, 0.9)]:
        kept.save(iteration, state(iteration), score)
    assert [p.name for p in kept.all()] == ["000002", "000004", "000005"]
    assert kept.load("last")[0] == 5
    assert kept.load("best")[0] == 2, "an equal score does not move `best`"
    assert kept.load(4)[1]["policy"]["w"][0] == 4
    assert kept.load(kept.folder / "000004")[0] == 4
    assert not list(kept.folder.glob(".*-*"))


def test_saved_twice_the_second_brings_the_evaluation(tmp_path: Path) -> None:
    """An iteration is saved on schedule, then evaluated, then saved again: its score must not be lost."""
    kept = Checkpoints(tmp_path)
    saved = state()
    kept.save(4, saved)
    assert kept.best_score() is None
    saved["trainer"]["last_eval"] = {"eval/heldout/strict": 0.5}
    kept.save(4, saved, 0.5)
    assert kept.best_score() == 0.5
    assert kept.load("best")[1]["trainer"]["last_eval"] == {"eval/heldout/strict": 0.5}


def test_unknown_checkpoint_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint 'last'.*none"):
        Checkpoints(tmp_path).load("last")
    Checkpoints(tmp_path).save(3, state())
    with pytest.raises(ValueError, match=r"no checkpoint '7'.*000003"):
        Checkpoints(tmp_path).load(7)


@pytest.mark.parametrize("where", ["tensors", "state", "sync", "link"])
def test_full_disk_leaves_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """ENOSPC while writing the tensors, the numbers, at the flush or the link: one clear error, nothing lost."""
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1.0), 0.1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"tensors": "save_tensors", "state": "write_text", "sync": "sync"}.get(where)
    with monkeypatch.context() as patch:
        if target is None:
            patch.setattr(Checkpoints, "_link", full)
        else:
            patch.setattr(checkpoint, target, full)
        with pytest.raises(OSError, match=r"iteration 2.*No space left.*earlier checkpoints are intact"):
            kept.save(2, state(2.0), 0.2)
    assert kept.load("last")[1]["policy"]["w"][0] in (1, 2)
    assert kept.load("best")[0] == 1
    assert where == "link" or kept.load("last")[0] == 1
    assert not list(kept.folder.glob(".writing-*"))
    kept.save(2, state(2.0), 0.2)
    assert kept.load("best")[0] == kept.load("last")[0] == 2


def test_half_folders_are_ignored_and_swept(tmp_path: Path) -> None:
    """What a killed writer can leave: a folder under construction, one half deleted, links to nowhere."""
    kept = Checkpoints(tmp_path)
    for iteration in (1, 2, 3):
        kept.save(iteration, state(iteration))
    (kept.folder / ".writing-000004").mkdir()
    (kept.folder / ".removing-000000").mkdir()
    (kept.folder / "000003" / TENSORS).unlink()
    shutil.copytree(kept.folder / "000001", kept.folder / "000009")
    (kept.folder / "000009" / STATE).unlink()
    assert [p.name for p in kept.all()] == ["000001", "000002"]
    assert kept.load("last")[0] == 2, "a link to a broken folder falls back to the newest complete one"
    kept.save(5, state())
    assert not list(kept.folder.glob(".writing-*"))
    assert not list(kept.folder.glob(".removing-*"))


@pytest.mark.parametrize("name", [STATE, TENSORS])
def test_damaged_content_is_an_error_that_names_the_others(tmp_path: Path, name: str) -> None:
    """Bit rot is never taken for a checkpoint, nor silently skipped."""
    kept = Checkpoints(tmp_path)
    kept.save(1, state())
    kept.save(2, state())
    content = (kept.folder / "000002" / name).read_bytes()
    (kept.folder / "000002" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"damaged.*\['000001'\]"):
        kept.load("last")
    assert kept.load(1)[0] == 1


def test_cut_forgets_the_future_and_mends_the_links(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=9)
    for iteration, score in [(1, 0.3), (2, 0.2), (3, 0.9), (4, None)]:
        kept.save(iteration, state(), score)
    kept.cut(2)
    assert [p.name for p in kept.all()] == ["000001", "000002"]
    assert kept.load("last")[0] == 2
    assert kept.load("best")[0] == 1


class Killed(BaseException):
    """Stands for kill -9: no handler may run after it."""


@pytest.mark.parametrize("operation", ["save", "cut"])
def test_a_kill_at_any_system_call_leaves_a_loadable_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Stop before the n-th change of the disk, for every n: `last` still loads and is whole."""
    changes = {"replace": os.replace, "unlink": os.unlink, "rmdir": os.rmdir, "mkdir": os.mkdir, "symlink": os.symlink}
    survived, finished = 0, False
    while not finished:
        run = tmp_path / str(survived)
        kept = Checkpoints(run, keep=1)
        for iteration in (1, 2):
            kept.save(iteration, state(iteration), 1 / iteration)
        left = survived

        def counted(real, *args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            for name, real in changes.items():
                patch.setattr(os, name, lambda *a, real=real, **k: counted(real, *a, **k))
            patch.setattr(shutil, "rmtree", lambda path, **_: [os.unlink(p) for p in path.iterdir()] + [os.rmdir(path)])
            try:
                kept.save(3, state(3), 0.1) if operation == "save" else kept.cut(1)
                finished = True
            except Killed:
                survived += 1
        iteration, loaded = Checkpoints(run).load("last")
        assert loaded["policy"]["w"][0] == iteration
        assert iteration in ((2, 3) if operation == "save" else (1, 2))
        Checkpoints(run, keep=1).save(4, state(4))
        assert Checkpoints(run).load("last")[0] == 4
    assert survived >= 4, "the test has to stop the writer in between"


def edited(path: Path, change: Callable[[dict], object]) -> None:
    """Change state.json as an editor would."""
    head = json.loads((path / STATE).read_text())
    change(head)
    (path / STATE).write_text(json.dumps(head))


def flipped(path: Path) -> None:
    """One bit of the last number of the tensors."""
    content = bytearray((path / TENSORS).read_bytes())
    content[-1] ^= 1
    (path / TENSORS).write_bytes(content)


EDITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a number": (lambda p: edited(p, lambda h: h["state"]["trainer"].update(seconds=0)), "state.json was edited"),
    "a score": (lambda p: edited(p, lambda h: h.update(score=9.0)), "state.json was edited"),
    "a config": (lambda p: edited(p, lambda h: h["config"]["train"].update(seed=1)), "state.json was edited"),
    "a key less": (lambda p: edited(p, lambda h: h.pop("state")), "state.json lacks 'state'"),
    "no sum": (lambda p: edited(p, lambda h: h.pop("sha256")), "state.json lacks 'sha256'"),
    "no JSON": (lambda p: (p / STATE).write_text("{"), "state.json is not JSON"),
    "nothing": (lambda p: (p / STATE).write_text(""), "state.json is not JSON"),
    "a list": (lambda p: (p / STATE).write_text("[1]"), "state.json is no table"),
    "a bit": (flipped, "state.safetensors is not what was saved"),
    "half": (lambda p: os.truncate(p / TENSORS, 40), "state.safetensors is not what was saved"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_edited_or_torn_is_named(tmp_path: Path, edit: str) -> None:
    change, said = EDITS[edit]
    path = Checkpoints(tmp_path, config={"train": {"seed": 0}}).save(4, state())
    change(path)
    with pytest.raises(ValueError, match="^checkpoint .*000004 is damaged") as refused:
        Checkpoints(tmp_path).load(4)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("edit", [name for name, (_, said) in EDITS.items() if "JSON" in said or "half" in name])
def test_without_a_seal_what_cannot_be_read_is_named_too(tmp_path: Path, edit: str) -> None:
    """Checkpoints of earlier versions have neither config nor sums, and load as they are."""
    saved = state()
    path = Checkpoints(tmp_path).save(4, saved)
    edited(path, lambda head: [head.pop(key) for key in ("config", "tensors", "sha256")])
    assert same(Checkpoints(tmp_path).load("last")[1], saved)
    EDITS[edit][0](path)
    with pytest.raises(ValueError, match=r"^checkpoint .*000004 is damaged \(.*state\.(json|safetensors)"):
        Checkpoints(tmp_path).load(4)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(4, state())
    edited(path, lambda head: [head.pop(key) for key in ("config", "tensors", "sha256")])
    edited(path, lambda head: head["state"]["policy"].update(w={"$tensor": "policy/v"}))
    with pytest.raises(ValueError, match="lacks 'policy/v', which state.json names"):
        Checkpoints(tmp_path).load("last")


def test_a_checkpoint_of_another_run_is_refused_by_the_setting_that_differs(tmp_path: Path) -> None:
    """Its own config says whose it is, or the run it lies in; budgets and the like may differ."""
    theirs = {"train": {"seed": 1, "iterations": 5}, "policy": {"field": "words"}}
    path = Checkpoints(tmp_path / "theirs", config=theirs).save(4, state())
    mine = Checkpoints(tmp_path / "mine", config=theirs | {"train": {"seed": 0, "iterations": 9}})
    with pytest.raises(ValueError, match=r"^checkpoint .*theirs.*000004 is of another run: train\.seed: 1 -> 0$"):
        mine.load(path)
    assert Checkpoints(tmp_path / "mine", config=theirs | {"train": {"seed": 1}}).load(path)[0] == 4
    edited(path, lambda head: [head.pop(key) for key in ("config", "tensors", "sha256")])
    assert mine.load(path)[0] == 4, "of an earlier version, in no run: nobody can tell"
    (tmp_path / "theirs/config.yaml").write_text("train: {seed: 1}\npolicy: {field: words}\n")
    with pytest.raises(ValueError, match=r"is of another run: train\.seed: 1 -> 0$"):
        mine.load(path)


@pytest.mark.parametrize("where", ["policy", "weight_sets", "algorithm"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    """Of the live set and of every other, critics too, when they are saved and when they are loaded."""
    spoilt = state() | {"other": torch.tensor([torch.inf])}
    Checkpoints(tmp_path).save(1, spoilt)
    assert Checkpoints(tmp_path).load("last")[0] == 1
    spoilt |= {where: {"ema/w": torch.tensor([1.0, value])}}
    with pytest.raises(ValueError, match=rf"of iteration 2 was not written: '{where}/ema/w' has values that are not f"):
        Checkpoints(tmp_path).save(2, spoilt)
    assert Checkpoints(tmp_path).load("last")[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr("rlflow.train.checkpoint.learnt", lambda tensors: {})
        Checkpoints(tmp_path).save(2, spoilt)
    with pytest.raises(ValueError, match=rf"'{where}/ema/w' has values that are not finite.*\['000001'\]"):
        Checkpoints(tmp_path).load("last")
