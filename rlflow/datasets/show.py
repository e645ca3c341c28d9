"""`rlflow demos show`: an episode as a film of its pictures (.mp4), or as curves of its numbers (.png).

Of demonstrations, or straight from another program's dataset, which is read from its beginning up to that episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlflow.datasets.open import open_source
from rlflow.datasets.out import by_name, colours_last, is_picture
from rlflow.envs.demos.dataset import Demos
from rlflow.report.video import write_video

FPS = 25.0
"""Where the demonstrations do not say."""
MOST = 12
"""Curves in a panel."""
Choose = Callable[[Mapping[str, bool]], list[str]]
"""The columns to draw of those there are, which are True where they hold pictures."""


@dataclass(frozen=True)
class Shown:
    """Columns (L, ...) of an episode, pictures per second, and what is said of it."""

    columns: dict[str, Tensor]
    fps: float
    told: dict[str, Any]


def show(path: Path, out: Path, episode: int = 0, name: str | None = None) -> str:
    """Draw one episode; what was drawn, in words. ValueError names the entries there are."""
    if out.suffix not in (".mp4", ".png"):
        raise ValueError(f"{out}: name a file that ends in .mp4 (pictures) or .png (curves)")
    read = _of_demos if (path / "dataset.json").is_file() else _of_source
    shown = read(path, episode, partial(_pictures, out, name) if out.suffix == ".mp4" else _numbers)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".mp4":
        (pictures,) = shown.columns.values()
        _film(pictures, out, shown.fps)
    else:
        _curves(shown.columns, out)
    told = ", ".join(f"{key} {value}" for key, value in shown.told.items() if value is not None)
    return f"episode {episode} ({told}) in {out}"


def _of_demos(folder: Path, episode: int, choose: Choose) -> Shown:
    demos = Demos.open(folder)
    _check_episode(folder, episode, len(demos.episodes))
    row = demos.episodes[episode]
    steps = torch.arange(row["start"], row["start"] + row["length"])
    columns = by_name(demos.observations(steps)) | {"action": demos.actions(steps), "reward": demos.rewards(steps)}
    chosen = choose({name: is_picture(value) for name, value in columns.items()})
    told = {"length": row["length"], "return": round(row["return"], 3), "success": row["success"]}
    return Shown({name: columns[name] for name in chosen}, demos.about["made_by"].get("fps") or FPS, told)


def _of_source(path: Path, episode: int, choose: Choose) -> Shown:
    """Actions in the dataset's own units."""
    source = open_source(path)
    _check_episode(path, episode, len(source.lengths))
    paid = [source.reward] if source.reward else []
    chosen = choose({name: source.columns[name].is_picture for name in [*source.observed, source.action, *paid]})
    found = next(islice(source.episodes(dict.fromkeys([*chosen, *paid])), episode, None))
    total = round(float(found.columns[source.reward].sum(dtype=float)), 3) if source.reward else None
    told = {"length": source.lengths[episode], "return": total, "success": found.success}
    return Shown({name: torch.from_numpy(found.columns[name].copy()) for name in chosen}, source.said.fps or FPS, told)


def _check_episode(path: Path, episode: int, num: int) -> None:
    if not 0 <= episode < num:
        raise ValueError(f"--episode {episode}: {path} has episodes 0 to {num - 1}")


def _numbers(columns: Mapping[str, bool]) -> list[str]:
    return [name for name, picture in columns.items() if not picture]


def _pictures(out: Path, name: str | None, columns: Mapping[str, bool]) -> list[str]:
    """Those of that name, or the first."""
    pictures = [column for column, picture in columns.items() if picture]
    if not pictures or (name is not None and name not in pictures):
        there = f"its pictures are {', '.join(pictures)}" if pictures else "it has no pictures: name a .png for curves"
        raise ValueError(f"{out}: {f'no pictures {name}, ' if name else ''}{there}")
    return [name or pictures[0]]


def _film(pictures: Tensor, out: Path, fps: float) -> None:
    """Small pictures are enlarged by a whole factor."""
    frames = colours_last(pictures)
    times = max(1, 192 // frames.shape[1])
    write_video((f.repeat_interleave(times, 0).repeat_interleave(times, 1) for f in frames), out, fps)


def _curves(columns: dict[str, Tensor], out: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 1.8 * len(columns)), layout="constrained")
        for axes, (name, value) in zip(
            figure.subplots(len(columns), squeeze=False)[:, 0], columns.items(), strict=True
        ):
            flat = value.reshape(len(value), -1)[:, :MOST].float()
            axes.plot(flat.numpy(), linewidth=0.9)
            more = value[0].numel() - MOST
            axes.set_ylabel(f"{name}\n(first {MOST})" if more > 0 else name)
        axes.set_xlabel("step")
        figure.savefig(out, dpi=110)
