"""Names to components: every registered one exists, settings are checked, foreign code needs trust."""

import importlib
import inspect
from pathlib import Path

import pytest

from rlflow import registry
from rlflow.registry import TABLE, build, find, nearest, validate
from rlflow.trust import UntrustedCodeError

MODULES = [(kind, name) for kind, table in TABLE.items() if kind != "policy" for name in table]


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_every_registered_name_is_a_documented_typed_component(kind: str, name: str) -> None:
    component = find(kind, name)
    assert inspect.getdoc(component)
    module, _, attribute = TABLE[kind][name].partition(":")
    assert component.__module__ == module, "registered where it is defined"
    assert component.__name__ == attribute
    for parameter in registry.settings(component).values():
        assert parameter.annotation is not parameter.empty
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def test_unknown_names_say_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^unknown kernel 'flow_sed'; did you mean 'flow_sde'\?$"):
        find("kernel", "flow_sed")
    with pytest.raises(
        ValueError, match=r"unknown solver 'x'; known: adaptive, dpm2m, euler, fireflow, heun, midpoint, unipc"
    ):
        find("solver", "x")
    assert nearest("strid", ["stride", "size"]) == "; did you mean 'stride'?"


def test_settings_are_checked_with_their_path() -> None:
    """A misspelt, missing, wrongly typed or program-supplied setting is refused by its full path."""
    bad = [
        ({"name": "window", "strid": 1}, r"^here\.strid: window has no such setting; did you mean 'stride'\?$"),
        ({"name": "window", "size": "four"}, r"^here\.size: Input should be a valid integer.*got 'four'$"),
        ({"name": "window", "size": True}, r"^here\.size: Input should be a valid integer"),
        ({"name": "window", "strategy": "decoy"}, r"^here\.strategy: Input should be 'progressive'"),
        ({"size": 4}, r"^here: write a name, or name"),
        ("windo", r"^here: unknown steps 'windo'; did you mean 'window'\?$"),
    ]
    for spec, message in bad:
        with pytest.raises(ValueError, match=message):
            validate("steps", "here", spec)
    with pytest.raises(ValueError, match=r"^here\.scale: cfg needs this setting$"):
        validate("guidance", "here", "cfg", ["field"])
    with pytest.raises(ValueError, match=r"^here\.field: cfg has no such setting"):
        validate("guidance", "here", {"name": "cfg", "scale": 2.0, "field": 1}, ["field"])


def test_build_passes_settings_and_what_the_program_supplies() -> None:
    window = build("steps", "steps", {"name": "window", "size": 2, "every": 3})
    assert (window.size, window.every, window.stride) == (2, 3, 1)
    kernel = build("kernel", "k", "learned_noise", {"num_features": 5, "event_shape": (2, 3)})
    assert kernel.event_shape == (2, 3)
    assert build("kernel", "k", {"name": "cps", "eta": 1}, {"num_features": 5}).angle == pytest.approx(1.5707963)


def test_a_components_own_objection_carries_the_path() -> None:
    with pytest.raises(ValueError, match=r"^policy\.kernel: CPS needs 0 < eta <= 1, got 1\.8"):
        build("kernel", "policy.kernel", {"name": "cps", "eta": 1.8})


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module outside the package; importing it leaves a mark."""
    (tmp_path / "rlflow_tests_own.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n\n\n"
        "from rlflow.flow.kernels import FlowSDE\n\n\nclass Mine(FlowSDE):\n"
        "    def __init__(self, strength: float = 1.0):\n        super().__init__()\n"
        "        self.strength = strength\n\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return "rlflow_tests_own"


def test_foreign_code_runs_only_when_trusted(own_module: str, tmp_path: Path) -> None:
    """Without trust it is not even imported; with it, its settings are checked like ours."""
    with pytest.raises(UntrustedCodeError, match=r"^k: kernel 'rlflow_tests_own:Mine' is code outside.*--trust-code"):
        build("kernel", "k", f"{own_module}:Mine")
    assert not (tmp_path / "ran").exists()
    made = build("kernel", "k", {"name": f"{own_module}:Mine", "strength": 2}, {"num_features": 1}, trust_code=True)
    assert made.strength == 2
    assert (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"k\.strenth: .* has no such setting; did you mean 'strength'"):
        build("kernel", "k", {"name": f"{own_module}:Mine", "strenth": 2}, trust_code=True)


def test_what_is_not_there_is_said(own_module: str) -> None:
    with pytest.raises(ValueError, match=r"module rlflow_tests_own has no 'Yours'"):
        find("kernel", f"{own_module}:Yours", trust_code=True)
    with pytest.raises(ValueError, match=r"cannot be imported: No module named 'rlflow_tests_absent'"):
        find("kernel", "rlflow_tests_absent:Thing", trust_code=True)
