"""`rlflow demos import`: a foreign dataset becomes demonstrations of an environment, or it is said why it cannot.

What could be wrong is looked for before anything is written: columns and shapes, the range of all actions, and whether
they are targets or changes as the environment takes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlflow import registry
from rlflow.datasets.acting import Acting, Options, check_actions
from rlflow.datasets.actions import bounds_of, step_env
from rlflow.datasets.observed import Observed, observed
from rlflow.datasets.open import open_source
from rlflow.datasets.source import Recorded, Source
from rlflow.envs.demos.dataset import Demos, Episode, write_demos


def import_demos(path: Path, out: Path, env: dict[str, Any] | None, options: Options, command: str) -> Demos:
    """Write the dataset at `path` into the folder `out`; `env` None: the one that the dataset names."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: give another folder")
    source = chosen(open_source(path), options)
    env = env or source.said.env
    if env is None:
        raise ValueError(f"--env NAME: {path} does not say of which environment it is")
    world = step_env(env, options.trust_code)
    seen = observed(source, world.obs_spec, options.obs, options.resize)
    acting = Acting(source, options, tuple(world.action_shape[1:]), bounds_of(world))
    notes = [*source.said.notes, *seen.notes, *check_actions(acting, seen, world)]
    if source.reward is None:
        notes.append("no column of rewards: they are 0")
    made_by = {
        "command": command,
        "source": {"format": source.format, "path": str(path), "episodes": len(source.lengths)},
        "fps": source.said.fps,
        "tasks": source.said.tasks,
        "notes": notes,
    }
    return _write(out, _episodes(source, seen, acting, options.episodes), env, made_by, acting)


def chosen(source: Source, options: Options) -> Source:
    """The source with the columns of action and reward that are asked for."""
    for flag, name in (("--action", options.action), ("--reward", options.reward)):
        if name is not None and name not in source.columns:
            raise ValueError(f"{flag} {name}: {source.path} has no such column{registry.nearest(name, source.columns)}")
    source.action, source.reward = options.action or source.action, options.reward or source.reward
    source.observed = [name for name in source.observed if name not in (source.action, source.reward)]
    return source


def _episodes(source: Source, seen: Observed, acting: Acting, num: int | None) -> Iterator[Episode]:
    wanted = seen.wanted | {n: None for n in acting.wanted if n not in seen.wanted}
    if source.reward is not None:
        wanted |= {source.reward: None}
    for found in islice(source.episodes(wanted), num):
        yield _episode(found, source.reward, seen, acting)


def _episode(found: Recorded, reward: str | None, seen: Observed, acting: Acting) -> Episode:
    action = acting.made(found.columns)
    paid = np.zeros(len(action)) if reward is None else found.columns[reward].reshape(len(action), -1)[:, 0]
    ends = (found.terminated, found.truncated, found.success)
    return Episode(seen.read(found.columns), action, torch.from_numpy(paid.astype(np.float32)), *ends)


def _write(out: Path, episodes: Iterator[Episode], env: dict[str, Any], made_by: dict[str, Any], by: Acting) -> Demos:
    """The folder is there as a whole or not at all."""
    work = out.with_name(f".{out.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    limit = 1.0 if by.bounds is None or all(np.isfinite(by.limits).ravel()) else None
    try:
        write_demos(work, episodes, env, made_by, bound=limit)
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Demos.open(out)
