"""`rlflow demos show`: an episode as a film of its pictures (.mp4), or as curves of its numbers (.png)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlflow.datasets.out import by_name, colours_last, is_picture
from rlflow.envs.demos.dataset import Demos
from rlflow.report.video import write_video

FPS = 25.0
"""Where the demonstrations do not say."""
MOST = 12
"""Curves in a panel."""


def show(folder: Path, out: Path, episode: int = 0, name: str | None = None) -> str:
    """Draw one episode; what was drawn, in words. ValueError names the entries there are."""
    demos = Demos.open(folder)
    if not 0 <= episode < len(demos.episodes):
        raise ValueError(f"--episode {episode}: {folder} has episodes 0 to {len(demos.episodes) - 1}")
    row = demos.episodes[episode]
    steps = torch.arange(row["start"], row["start"] + row["length"])
    seen = by_name(demos.observations(steps))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".mp4":
        _film(seen, out, name, demos.about["made_by"].get("fps") or FPS)
    elif out.suffix == ".png":
        numbers = {n: v for n, v in seen.items() if not is_picture(v)}
        _curves(numbers | {"action": demos.actions(steps), "reward": demos.rewards(steps)}, out)
    else:
        raise ValueError(f"{out}: name a file that ends in .mp4 (pictures) or .png (curves)")
    told = ", ".join(f"{key} {row[key]}" for key in ("length", "return", "success") if row[key] is not None)
    return f"episode {episode} ({told}) in {out}"


def _film(seen: dict[str, Tensor], out: Path, name: str | None, fps: float) -> None:
    """Small pictures are enlarged by a whole factor."""
    pictures = [n for n, v in seen.items() if is_picture(v)]
    if not pictures or (name is not None and name not in pictures):
        there = f"its pictures are {', '.join(pictures)}" if pictures else "it has no pictures: name a .png for curves"
        raise ValueError(f"{out}: {f'no pictures {name}, ' if name else ''}{there}")
    frames = colours_last(seen[name or pictures[0]])
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
