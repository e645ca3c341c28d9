"""`import rlflow as rf`: what a type checker, `help` and a person at a prompt see of it."""

import ast
import inspect
import pydoc
from pathlib import Path

import pytest

import rlflow as rf


def seen_by_type_checkers() -> dict[str, str]:
    """Name -> module of what is imported under TYPE_CHECKING, which is all that a type checker reads."""
    tree = ast.parse(Path(rf.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_see_what_runs():
    """The same names from the same modules, all of them public, and no name that is Any."""
    assert seen_by_type_checkers() == rf._HOMES
    assert sorted(rf.__all__) == sorted(rf._HOMES)
    outside = [n for n in ast.parse(Path(rf.__file__).read_text()).body if isinstance(n, ast.FunctionDef)]
    assert "__getattr__" not in {n.name for n in outside}, "to a type checker it makes every name Any"


@pytest.mark.parametrize("name", sorted(rf._HOMES))
def test_every_public_name_is_typed_and_explained(name):
    found = getattr(rf, name)
    assert inspect.getdoc(found)
    if inspect.isfunction(found):
        hints = inspect.get_annotations(found)
        assert set(hints) == {*inspect.signature(found).parameters, "return"}


def test_help_shows_the_interface():
    text = pydoc.plain(pydoc.render_doc(rf))
    for name in rf.__all__:
        assert f" {name}(" in text or f"class {name}" in text, name
