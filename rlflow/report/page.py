"""Pieces of a self-contained HTML page: everything inline, no script, and a policy that forbids to load anything.

Functions that take text escape it; those whose argument is called `html` take markup.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlflow.report import curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 320  # pixels of an image in a page
CSS = """
:root { --ink: #262a30; --soft: #5b626c; --faint: #8a919b; --line: #e3e6ea; --blue: #0072b2; --green: #00795a;
  --red: #b84e00; --amber: #8a6100; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0 0 10px; } p:last-child { margin-bottom: 0; }
.kicker { color: var(--blue); font-weight: 600; font-size: 13px; letter-spacing: .04em; text-transform: uppercase; }
.soft { color: var(--soft); } .small { font-size: 13px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 16px; }
.verdict { font-size: 19px; line-height: 1.45; }
.pill { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 13px; font-weight: 600;
  margin-right: 6px; background: #eceef1; color: var(--soft); vertical-align: 2px; }
.good { background: #dff3ec; color: var(--green); } .bad { background: #fbe6d8; color: var(--red); }
.watch { background: #fdf1cf; color: var(--amber); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 14px; }
.fact { border: 1px solid var(--line); border-radius: 8px; padding: 9px 12px; }
.fact b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; line-height: 1.35; }
.fact span { color: var(--soft); font-size: 12.5px; display: block; line-height: 1.35; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(232px, 1fr)); gap: 16px 14px;
  margin-top: 12px; }
.pairs.single { grid-template-columns: repeat(auto-fill, minmax(116px, 1fr)); }
figure { margin: 0; }
.two { display: grid; grid-template-columns: 1fr 14px 1fr; gap: 2px; align-items: center; }
.two > span { color: var(--faint); text-align: center; }
.one { display: grid; grid-template-columns: 1fr; }
figcaption { font-size: 12.5px; line-height: 1.35; color: var(--soft); margin-top: 5px; text-align: center;
  overflow-wrap: anywhere; }
.tile { position: relative; border: 3px solid var(--line); border-radius: 6px; overflow: hidden; background: #fff; }
.pairs.films { grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); }
.tile img, .tile video { display: block; width: 100%; height: auto; } .px { image-rendering: pixelated; }
.tile.right { border-color: #009e73; } .tile.wrong { border-color: #d55e00; }
.tile i { position: absolute; right: 0; top: 0; width: 20px; height: 20px; font: bold 14px/19px system-ui, sans-serif;
  color: #fff; text-align: center; border-bottom-left-radius: 6px; }
.right i { background: #009e73; } .wrong i { background: #d55e00; }
.wide { width: 100%; height: auto; display: block; margin-top: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin-top: 8px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; padding-right: 16px; }
td.num { white-space: nowrap; }
tr.head td { background: #f5f6f8; font-weight: 600; padding: 5px 8px; border: 0; }
tr:last-child td { border-bottom: 0; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td code { color: var(--faint); font-size: 11.5px; display: block; }
pre { background: #f5f6f8; border-radius: 6px; padding: 10px 12px; margin: 8px 0 0; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; } details + details { margin-top: 10px; }
.bar { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin: 10px 0 6px; background: #eceef1; }
.bar span { display: block; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 0; }
.legend span { margin-right: 16px; white-space: nowrap; }
svg.spark { display: block; margin-top: 3px; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def page(title: str, html: Iterable[str]) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in html if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, html: str, note: str = "") -> str:
    """A card with a heading and, under it, a line of explanation; "" where there is nothing to show."""
    said = f'<p class="soft small">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{html}</section>" if html else ""


def pill(text: str, kind: str = "") -> str:
    """A small coloured label; kind is '', 'good', 'bad' or 'watch'."""
    return f'<span class="pill {kind}">{escape(text)}</span>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Tiles of (value, what it is)."""
    tiles = "".join(f'<div class="fact"><b>{escape(v)}</b><span>{escape(what)}</span></div>' for v, what in pairs)
    return f'<div class="facts">{tiles}</div>' if tiles else ""


def table(header: Sequence[str], html_rows: Iterable[Sequence[str]], numeric: Collection[int] = ()) -> str:
    """A table of markup cells; `numeric` columns are set to the right, a row of one cell is a heading."""
    kinds = [' class="num"' if i in numeric else "" for i in range(len(header))]
    head = "".join(f"<th{kind}>{escape(h)}</th>" for h, kind in zip(header, kinds, strict=True))
    body = []
    for row in html_rows:
        if len(row) == 1:
            body.append(f'<tr class="head"><td colspan="{len(header)}">{row[0]}</td></tr>')
        else:
            cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True))
            body.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def details(title: str, text: str, is_open: bool = False) -> str:
    """Preformatted text behind a heading that opens it."""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def shares(parts: Sequence[tuple[str, float, str]]) -> str:
    """A bar of (label, amount, amount in words), with its legend."""
    total = sum(amount for _, amount, _ in parts)
    if not total > 0:
        return ""
    colored = list(zip(parts, curves.COLORS, strict=False))
    bar = "".join(f'<span style="width:{100 * a / total:.2f}%;background:{c}"></span>' for (_, a, _), c in colored)
    legend = "".join(
        f'<span><i class="key" style="background:{c}"></i>{escape(f"{label} {words} ({100 * a / total:.0f} %)")}</span>'
        for (label, a, words), c in colored
    )
    return f'<div class="bar">{bar}</div><p class="legend small soft">{legend}</p>'


def spark(ys: NDArray[np.float64], width: int = 88, height: int = 20) -> str:
    """A curve the size of a word."""
    if len(ys) < 2:
        return ""
    ys = np.interp(np.linspace(0, len(ys) - 1, min(len(ys), 60)), np.arange(len(ys)), ys)
    low, high = ys.min(), ys.max()
    heights = np.full(len(ys), 0.5) if high == low else (ys - low) / (high - low)
    points = " ".join(
        f"{x:.1f},{height - 2 - (height - 4) * y:.1f}"
        for x, y in zip(np.linspace(1, width - 1, len(ys)), heights, strict=True)
    )
    return (
        f'<svg class="spark" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<polyline points="{points}" fill="none" stroke="#0072b2" stroke-width="1.4"/></svg>'
    )


def picture(image: NDArray[np.uint8], alt: str) -> str:
    """<img> of an image (3, H, W) uint8, at most 320 pixels wide; a small one is enlarged without blur."""
    made = Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0))
    small = made.width <= 128
    if made.width > LARGEST:
        made = made.resize((LARGEST, round(made.height * LARGEST / made.width)), Image.Resampling.LANCZOS)
    file, kind = io.BytesIO(), "png" if small else "jpeg"
    made.save(file, format=kind, quality=88)  # PNG has no quality and takes no notice
    return _img(f"image/{kind}", file.getvalue(), alt, "px" if small else "", made.size)


def grid_picture(png: bytes, alt: str) -> str:
    """<img> of a PNG file as wide as the page."""
    with Image.open(io.BytesIO(png)) as image:
        size = image.size
    return _img("image/png", png, alt, "wide", size)


def figure(figure: Figure, alt: str) -> str:
    """<img> of a matplotlib figure, as vectors."""
    file = io.BytesIO()
    curves.save(figure, file, "svg")
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return _img("image/svg+xml", file.getvalue(), alt, "wide", (width, height))


def _img(kind: str, data: bytes, alt: str, css: str, size: tuple[int, int]) -> str:
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    width, height = size
    return (
        f'<img class="{css}" alt="{escape(alt)}" width="{width}" height="{height}" loading="lazy" decoding="async" '
        f'src="{source}">'
    )
