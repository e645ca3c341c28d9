"""Before and after, side by side in a report: images of the same prompts, films of the same episodes."""

from __future__ import annotations

from html import escape
from typing import Any

from rlflow.report import page
from rlflow.report.glossary import show
from rlflow.report.pairing import NOT_KEPT, Scores, unlike
from rlflow.report.record import Pictures, RunRecord
from rlflow.report.video import SECONDS, html_video

PAIRS = 32  # images shown at most


def before_after(run: RunRecord) -> tuple[str, str]:
    """(markup, note): films of episodes, pairs of images, or the pictures of both evaluations as they are."""
    at = [row["iteration"] for row in run.evals]
    if not at:
        return "", ""
    like = unlike(run.scores(at[0]), run.scores(at[-1])) in (None, NOT_KEPT)
    if not run.is_images:
        return _films(run, at[0] if like else at[-1], at[-1])
    first, last = run.pictures(at[0]), run.pictures(at[-1])
    if (filmed := _videos(run, [*dict.fromkeys((at[0], at[-1]))] if like else [at[-1]])) is not None:
        return filmed
    if first is None or last is None or not like or _shape(first) != _shape(last):
        shown = [(i, run.grid(i)) for i in dict.fromkeys((at[0], at[-1]))]
        return "".join(f"<p>After iteration {i}:</p>{page.grid_picture(png, '')}" for i, png in shown if png), ""
    if at[0] == at[-1]:
        return _single(last), f"After iteration {at[-1]}. Fixed prompts and fixed noise."
    note = "Left before, right after training: same prompts, same starting noise; not chosen by result."
    return _pairs(first, last), note + _right_words(first, last)


def _videos(run: RunRecord, at: list[int]) -> tuple[str, str] | None:
    """Films of what the same prompts gave, where a model makes videos."""
    last, rows = run.pictures(at[-1]), list(zip(*(run.films(i) for i in at), strict=False))
    if last is None or not rows:
        return None
    cells = []
    for films, caption in zip(rows, last.captions, strict=False):
        shown = [f'<figure><div class="tile">{html_video(film)}</div></figure>' for film in films]
        pair = f'<div class="{"two" if len(films) == 2 else "one"}">{"<span>&rarr;</span>".join(shown)}</div>'
        cells.append(f"<figure>{pair}<figcaption>{escape(caption)}</figcaption></figure>")
    note = "Left before, right after training: " if len(at) == 2 else f"After iteration {at[0]}: "
    note += f"same prompts, same starting noise; the first {len(cells)}, not chosen by result."
    return f'<div class="pairs films">{"".join(cells)}</div>', note


def _shape(shown: Pictures) -> tuple[list[str], Any]:
    """What pictures have in common that stand side by side."""
    return shown.captions, shown.images.shape


def _right_words(first: Pictures, last: Pictures) -> str:
    marked = [(a, b) for a, b in zip(first.marks, last.marks, strict=True) if a is not None and b is not None]
    if not marked:
        return ""
    before, after = (sum(column) for column in zip(*marked, strict=True))
    return f" Right by the strict verifier: {before} of these {len(marked)} before, {after} after."


def _pairs(first: Pictures, last: Pictures) -> str:
    columns = zip(first.images, last.images, first.marks, last.marks, first.captions, strict=True)
    cells = [
        f'<figure><div class="two">{_tile(a, right_a, "before")}<span>&rarr;</span>{_tile(b, right_b, "after")}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for a, b, right_a, right_b, caption in list(columns)[:PAIRS]
    ]
    return f'<div class="pairs">{"".join(cells)}</div>'


def _single(shown: Pictures) -> str:
    cells = [
        f'<figure><div class="one">{_tile(image, mark, "")}</div><figcaption>{escape(caption)}</figcaption></figure>'
        for image, mark, caption in list(zip(shown.images, shown.marks, shown.captions, strict=True))[:PAIRS]
    ]
    return f'<div class="pairs single">{"".join(cells)}</div>'


def _tile(image: Any, mark: bool | None, when: str) -> str:
    kind = "" if mark is None else "right" if mark else "wrong"
    sign = "" if mark is None else f"<i>{'&#10003;' if mark else '&#10007;'}</i>"
    return f'<div class="tile {kind}">{page.picture(image, f"{when} {kind}".strip())}{sign}</div>'


def _films(run: RunRecord, first: int, last: int) -> tuple[str, str]:
    """The same episodes, which start alike, at the first and the last evaluation."""
    at = list(dict.fromkeys((first, last)))
    rows = list(zip(*(run.films(i) for i in at), strict=False))
    if not rows:
        return "", ""
    scores = [run.scores(i) for i in at]
    when = ["before", "after"] if len(at) == 2 else [f"after iteration {at[0]}"]
    cells = []
    for row, films in enumerate(rows):
        told = [f"{name}: {episode_words(score, row) or NOT_KEPT}" for name, score in zip(when, scores, strict=True)]
        shown = [
            f'<figure><div class="tile">{html_video(film)}</div><figcaption>{words}</figcaption></figure>'
            for film, words in zip(films, told, strict=True)
        ]
        kind = "two" if len(films) == 2 else "one"
        cells.append(f'<div class="{kind}">{"<span>&rarr;</span>".join(shown)}</div>')
    note = "Left before, right after training: " if len(at) == 2 else ""
    note += f"the first {len(rows)} of the evaluated episodes, not chosen by result; the starts of both are the same."
    note += f" At most {SECONDS:g} seconds of an episode are shown; a film ends where its episode does."
    return f'<div class="pairs films">{"".join(cells)}</div>', note


def episode_words(scores: Scores, row: int) -> str:
    """Of one episode: return, length in primitive steps and, where the simulator knows it, success."""
    words = [f"return {show(float(scores['return'][row]))}"] if "return" in scores else []
    words += [f"{float(scores['length'][row]):,.0f} steps"] if "length" in scores else []
    words += ["success" if float(scores["success"][row]) > 0 else "no success"] if "success" in scores else []
    return ", ".join(words)
