"""The documentation as a site: `make docs`. Sphinx with MyST for the pages and autodoc for the reference, all offline.

Every warning fails the build (`-W`): a broken link or anchor, a page that no menu lists, and what is added here,
a public function, class or method of a documented module that has no docstring.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import rlflow
from rlflow import registry

project, author, release = "rlflow", "the rlflow authors", rlflow.__version__
copyright = "the rlflow authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4  # as GitHub names them, so that one link serves both
highlight_language = "none"  # of what names no language: drawings, equations, commands
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = "rlflow"
html_show_sourcelink = False
html_copy_source = False
autodoc_mock_imports = [
    "envpool",
    "gym_pusht",
    "metaworld",
    "mujoco_warp",
    "ogbench",
    "warp",
]  # extras that [dev] leaves out
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

CODE = re.compile(r"(`[^`]+`)")
NAMES: dict[str, list[tuple[str, str]]] = {}  # dotted path of a component -> (kind, name in a recipe)
for kind, table in registry.TABLE.items():
    for word, path in table.items():
        NAMES.setdefault(path.replace(":", "."), []).append((kind, word))
LOGGER = logging.getLogger(__name__)


def prose(line: str) -> str:
    """A line of a docstring as reStructuredText: `code` stays code, every other character stands for itself."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        parts[i] = f"`{part}`\\ " if i % 2 else re.sub(r"([\\*|_`])", r"\\\1", part)
    return "".join(parts)


def kinship(name: str, obj: Any) -> list[str]:
    """What a class of ours derives from, and the name by which a recipe asks for a component."""
    bases = [b for b in getattr(obj, "__bases__", ()) if b.__module__.startswith("rlflow")]
    derived = [f"Derives from :py:class:`~{b.__module__}.{b.__qualname__}`." for b in bases]
    return [*derived, *(f"In a recipe: {kind} ``{word}``." for kind, word in NAMES.get(name, []))]


def to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are paragraphs of plain text; what is indented is an equation or a table and keeps its shape."""
    rst: list[str] = []
    literal = False
    for line in lines:
        if line.strip() and line.startswith(" ") != literal:
            literal = not literal
            rst += ["", "::", ""] if literal else [""]
        rst.append(f"   {line}" if literal else prose(line))
    lines[:] = [*rst, "", *kinship(name, obj), ""]


def refuse_undocumented(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> None:
    """Autodoc leaves out what has no docstring; here that is an error. An override may inherit its docstring."""
    code = inspect.isroutine(obj) or inspect.isclass(obj) or isinstance(obj, property)
    mine = getattr(inspect.unwrap(obj) if inspect.isroutine(obj) else obj, "__module__", "").startswith("rlflow")
    if code and mine and not name.startswith("_") and not inspect.getdoc(obj):
        LOGGER.warning("%s in %s has no docstring", getattr(obj, "__qualname__", name), getattr(obj, "__module__", "?"))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", to_rst)
    app.connect("autodoc-skip-member", refuse_undocumented)
