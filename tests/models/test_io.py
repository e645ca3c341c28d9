"""Checkpoint folders: what does not fit is one line that names the folder; a script's own class can be found again."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlflow.models.io import load_field, read_config, save_field
from rlflow.models.mlp import MLPField


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_field(MLPField(2, (3,), width=8), tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"args": {"obs_dim": 2, "event_shape": [4]}},
            r"is not one of mlp: Error.* size mismatch for net.0.weight.*22\]\)\.$",
        ),
        ({"args": {"obs_dim": 2, "shape": [3]}}, "is not one of mlp: .* unexpected keyword argument 'shape'"),
        ({"model": "mlpp"}, "unknown model 'mlpp'; did you mean 'mlp'"),
        ({"args": None}, r"config.json lacks \['args'\]"),
    ],
)
def test_what_does_not_fit_is_said(folder: Path, change: dict, said: str) -> None:
    values = {k: v for k, v in (read_config(str(folder)) | change).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"(?s){said}"):
        load_field(str(folder))


def test_a_class_of_the_running_script_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`__main__:Mine` would be found by nobody."""
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "my_models.py")
    monkeypatch.setitem(sys.modules, "__main__", script)
    mine = type("Mine", (MLPField,), {"__module__": "__main__"})
    assert read_config(str(save_field(mine(2, (3,)), tmp_path / "a")))["model"] == "my_models:Mine"
