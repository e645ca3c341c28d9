"""A table of words, for every place that shows one: the terminal, markdown, LaTeX (booktabs) and a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from rlflow.console import terminal
from rlflow.report import page

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{RIGHTWARDS ARROW}": r"$\rightarrow$",
    "\N{EN DASH}": "--",
}


SHORT = 16  # letters of a cell that is not broken


class Table(NamedTuple):
    """Rows of cells under a header, and what they are; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table alone, as GitHub draws it."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def latex(self) -> str:
        """For a paper: \\usepackage{booktabs}; the title is a comment."""
        header, *rows = (" & ".join(map(_latex, cells)) + r" \\" for cells in (self.header, *self.rows))
        columns = "l" + "r" * (len(self.header) - 1)
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *rows, r"\bottomrule"]
        return "\n".join([f"% {self.title}", *body, r"\end{tabular}"])

    def html(self) -> str:
        """For a page; columns of short cells are set to the right, long ones may break."""
        short = [i for i in range(1, len(self.header)) if all(len(row[i]) <= SHORT for row in self.rows)]
        return page.table(self.header, ([_unbroken(escape(cell)) for cell in row] for row in self.rows), numeric=short)

    def print(self) -> None:
        """On the terminal."""
        from rich.markup import escape as plain
        from rich.table import Table as RichTable

        table = RichTable(*map(plain, self.header), title=plain(self.title), title_justify="left")
        for cells in self.rows:
            table.add_row(*map(plain, cells))
        terminal().print(table)


def _unbroken(text: str) -> str:
    """A number stays with its spread, and an arrow with what is before it."""
    return text.replace(" \N{PLUS-MINUS SIGN} ", "&nbsp;\N{PLUS-MINUS SIGN}&nbsp;").replace(
        " \N{RIGHTWARDS ARROW}", "&nbsp;\N{RIGHTWARDS ARROW}"
    )


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)
