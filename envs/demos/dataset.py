"""Demonstrations on disk: a folder of safetensors shards, read through memory maps, and dataset.json.

dataset.json holds "env" (name and settings), "made_by" (command, seed, versions), "episodes" (one row each:
start, length, return, success, terminated, truncated), "moments" (count, mean, squared deviations of each number
observed) and "shards" (file, rows). A shard holds whole episodes, one behind the other:

    obs (n, D) float32, or obs.NAME each, pixels as uint8 | action (n, *A) as the environment takes it | reward (n,)

Row i holds what was seen, what was done then, and what that earned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlflow import registry
from rlflow.envs.captions.files import read_text
from rlflow.envs.demos.columns import check_like, column, numbers
from rlflow.envs.demos.identity import check_env
from rlflow.files import save_tensors
from rlflow.parallel.moments import merge, no_moments
from rlflow.types import Tree, tree_map

FORMAT = 1
SHARD_BYTES = 2**27
"""At which a shard is written although it has few rows: pictures would fill the memory."""
KEYS = ("format", "env", "made_by", "episodes", "moments", "shards")


@dataclass(frozen=True)
class Episode:
    """One demonstration of L steps, tensors or arrays; `truncated` is an end by time, `terminated` one by the task."""

    obs: Tree  # (L, ...)
    action: Tensor  # (L, *A)
    reward: Tensor  # (L,)
    terminated: bool
    truncated: bool
    success: bool | None = None

    def columns(self) -> dict[str, Tensor]:
        """Tensors by their names in a shard."""
        obs = {f"obs.{n}": v for n, v in self.obs.items()} if isinstance(self.obs, dict) else {"obs": self.obs}
        if nested := [name for name, value in obs.items() if isinstance(value, dict)]:
            raise ValueError(f"{nested} are dictionaries: flatten them, as in the environment")
        found = {name: column(value) for name, value in obs.items()}
        return found | {"action": column(self.action).float(), "reward": column(self.reward).float()}

    def row(self, start: int, reward: Tensor) -> dict[str, Any]:
        """Its row of the table; `reward` (L,)."""
        success = None if self.success is None else bool(self.success)
        ends = {"terminated": bool(self.terminated), "truncated": bool(self.truncated), "success": success}
        return {"start": start, "length": len(reward), "return": float(reward.double().sum())} | ends


@dataclass
class _Writer:
    """A dataset while it is being written."""

    folder: Path
    bound: float | None
    episodes: list[dict[str, Any]] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)
    moments: Tensor | None = None
    waiting: list[dict[str, Tensor]] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0

    def add(self, episode: Episode) -> None:
        with registry.located(f"episode {len(self.episodes)}"):
            columns = episode.columns()
            self.first = self.first or columns
            check_like(columns, self.first, self.bound)
        self.episodes.append(episode.row(self.rows, columns["reward"]))
        self.rows += len(columns["reward"])
        self.waiting.append(columns)
        seen = numbers(columns)
        moments = no_moments(seen.shape[1:]) if self.moments is None else self.moments
        self.moments = merge(moments, seen, torch.ones(len(seen), dtype=torch.bool))

    def is_full(self, rows: int) -> bool:
        """Whether the waiting episodes make a shard of `rows` steps, or of enough bytes."""
        size = sum(value.nbytes for columns in self.waiting for value in columns.values())
        return size >= SHARD_BYTES or sum(len(columns["action"]) for columns in self.waiting) >= rows

    def flush(self) -> None:
        """Write the waiting episodes as one shard."""
        if self.waiting:
            shard = {name: torch.cat([w[name] for w in self.waiting]).contiguous() for name in self.waiting[0]}
            name = f"{len(self.shards):05}.safetensors"
            save_tensors(shard, self.folder / name)
            self.shards.append({"file": name, "rows": len(shard["action"])})
            self.waiting = []


def write_demos(
    folder: Path | str,
    episodes: Iterable[Episode],
    env: dict[str, Any],
    made_by: dict[str, Any],
    shard_rows: int = 200_000,
    bound: float | None = 1.0,
) -> Demos:
    """Write a dataset, at least `shard_rows` steps or 128 MiB a shard but the last; FileExistsError if there is one.

    `env` is {"name", "settings"} as in a config. No action is beyond `bound`; None where the environment has none.
    ValueError names the episode and the column that is wrong.
    """
    check_env(env)
    writer = _Writer(Path(folder), bound)
    if (writer.folder / "dataset.json").exists():
        raise FileExistsError(f"{folder} holds demonstrations: give another folder")
    writer.folder.mkdir(parents=True, exist_ok=True)
    for episode in episodes:
        writer.add(episode)
        if writer.is_full(shard_rows):
            writer.flush()
    writer.flush()
    if writer.moments is None:
        raise ValueError(f"no episodes to write into {folder}")
    moments = dict(zip(("count", "mean", "deviations"), writer.moments.tolist(), strict=True))
    about = {"format": FORMAT, "env": env, "made_by": made_by, "moments": moments, "shards": writer.shards}
    about["episodes"] = writer.episodes
    text = json.dumps(about, indent=1)
    (writer.folder / "dataset.json").write_text(text + "\n", encoding="utf-8")
    return Demos.open(folder)


@dataclass(frozen=True)
class Demos:
    """Demonstrations, all or some of the episodes of a folder; tensors are read when they are asked for."""

    folder: Path
    about: dict[str, Any]  # dataset.json
    shards: list[dict[str, Tensor]]
    episodes: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path | str) -> Demos:
        """The dataset of a folder; ValueError says what is wrong with a broken one."""
        folder = Path(folder)
        about = _read_about(folder)
        shards = [_read_shard(folder / s["file"], s["rows"]) for s in about["shards"]]
        rows, length = sum(s["rows"] for s in about["shards"]), sum(e["length"] for e in about["episodes"])
        if rows != length:
            raise ValueError(f"{folder}: the episodes have {length} steps, the shards {rows}: make it again")
        return cls(folder, about, shards, about["episodes"])

    @property
    def env(self) -> dict[str, Any]:
        """Name and settings of the environment."""
        return self.about["env"]

    @property
    def moments(self) -> Tensor:
        """(3, D) statistics of all episodes for a Normalizer: numbers of observations in the order of their names."""
        kept = self.about["moments"]
        return torch.tensor([kept["count"], kept["mean"], kept["deviations"]], dtype=torch.float64)

    @property
    def obs_spec(self) -> Tree:
        """One row's observation as meta tensors."""
        return tree_map(lambda v: v[0].to("meta"), self.observations(torch.zeros(1, dtype=torch.long)))

    def check(self) -> None:
        """ValueError where a number is not finite; reads everything once."""
        for number, shard in enumerate(self.shards):
            for name, value in shard.items():
                if not bool(value.isfinite().all()):
                    row = int((~value.isfinite()).nonzero()[0, 0])
                    raise ValueError(f"{self.folder}: {name} is not finite in row {row} of shard {number}")

    @property
    def action_shape(self) -> tuple[int, ...]:
        """*A of one primitive action."""
        return tuple(self.shards[0]["action"].shape[1:])

    @property
    def mean_return(self) -> float:
        """Mean undiscounted return of the episodes."""
        return sum(e["return"] for e in self.episodes) / len(self.episodes)

    @property
    def success(self) -> float | None:
        """Share of successful episodes, of those that tell; None where none does."""
        told = [e["success"] for e in self.episodes if e["success"] is not None]
        return sum(told) / len(told) if told else None

    @property
    def figures(self) -> dict[str, float]:
        """How many episodes, their mean return, and the share of success where it is told."""
        told = {} if self.success is None else {"success": round(self.success, 3)}
        return {"mean_return": round(self.mean_return, 1), "episodes": len(self.episodes), **told}

    @property
    def summary(self) -> str:
        """The figures in words."""
        return ", ".join(f"{name} {value}" for name, value in self.figures.items())

    def split(self, every: int = 10) -> tuple[Demos, Demos]:
        """(training, held out): every `every`-th episode is held out, and at least one."""
        if len(self.episodes) < 2:
            raise ValueError(f"{self.folder} has {len(self.episodes)} episode: two are needed to hold one out")
        every = min(every, len(self.episodes))
        kept = [e for i, e in enumerate(self.episodes) if i % every != every - 1]
        held = self.episodes[every - 1 :: every]
        return Demos(self.folder, self.about, self.shards, kept), Demos(self.folder, self.about, self.shards, held)

    def observations(self, index: Tensor) -> Tree:
        """What was seen (N, ...) before the steps `index` (N,), numbered through all episodes of the folder."""
        found = self._gather(index, [name for name in self.shards[0] if name.startswith("obs")])
        return found["obs"] if "obs" in found else {n.removeprefix("obs."): v for n, v in found.items()}

    def actions(self, index: Tensor) -> Tensor:
        """What was done (N, *A) in the steps `index` (N,)."""
        return self._gather(index, ["action"])["action"]

    def rewards(self, index: Tensor) -> Tensor:
        """What was earned (N,) in the steps `index` (N,)."""
        return self._gather(index, ["reward"])["reward"]

    def returns_to_go(self) -> Tensor:
        """What every step of the folder and those behind it in its episode earned (n,), undiscounted."""
        last = self.about["episodes"][-1]
        reward = self.rewards(torch.arange(last["start"] + last["length"])).double()
        ends = torch.tensor([e["start"] + e["length"] for e in self.about["episodes"]])
        earned = torch.cat([torch.zeros(1, dtype=torch.float64), reward.cumsum(0)])
        lengths = torch.tensor([e["length"] for e in self.about["episodes"]])
        return (earned[ends].repeat_interleave(lengths) - earned[:-1]).float()

    def _gather(self, index: Tensor, names: list[str]) -> dict[str, Tensor]:
        found = {
            n: torch.empty(len(index), *v.shape[1:], dtype=v.dtype) for n, v in self.shards[0].items() if n in names
        }
        first = 0
        for shard in self.shards:
            inside = (index >= first) & (index < first + len(shard["action"]))
            for name in names:
                found[name][inside] = shard[name][index[inside] - first]
            first += len(shard["action"])
        return found

    def chunks(self, num: int) -> Chunks:
        """Every run of `num` consecutive actions inside one episode, with the observation before it."""
        last = [(e["start"], e["start"] + e["length"] - num + 1) for e in self.episodes]
        starts = [torch.arange(first, end) for first, end in last if end > first]
        if not starts:
            longest = max(e["length"] for e in self.episodes)
            raise ValueError(
                f"{self.folder}: of {len(self.episodes)} episodes none fills a chunk of {num} steps, the longest has "
                f"{longest}: take shorter chunks"
            )
        return Chunks(self, torch.cat(starts), num)


@dataclass(frozen=True)
class Chunks:
    """(observation, action chunk) pairs of demonstrations."""

    demos: Demos
    starts: Tensor  # (M,) first step of each
    num: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Tensor) -> tuple[Tree, Tensor]:
        """Observations (N, ...) and actions (N, H, *A) of the pairs `index` (N,)."""
        first = self.starts[index]
        steps = first.unsqueeze(1) + torch.arange(self.num)
        return self.demos.observations(first), self.demos.actions(steps.flatten()).unflatten(0, steps.shape)

    def batches(self, rows: int, rng: torch.Generator) -> Iterator[tuple[Tensor, Tree]]:
        """Endless random (actions (rows, H, *A), observations), as `pretrain` takes them."""
        while True:
            obs, action = self[torch.randint(len(self), (rows,), generator=rng)]
            yield action, obs


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise ValueError(f"no demonstrations in {folder}: there is no dataset.json (scripts/make_demos.py makes them)")
    try:
        about = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    missing = [key for key in KEYS if key not in about]
    if missing:
        raise ValueError(f"{path} lacks {missing}: make it again")
    with registry.located(str(path)):
        check_env(about["env"])
    if about["format"] != FORMAT:
        raise ValueError(f"{path} has format {about['format']}, this version reads {FORMAT}")
    return about


def _read_shard(path: Path, rows: int) -> dict[str, Tensor]:
    """Memory-mapped tensors."""
    try:
        with path.open("rb"), safe_open(path, "pt") as shard:  # safetensors takes what may not be read for missing
            found = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    wrong = {n: len(v) for n, v in found.items() if len(v) != rows}
    if wrong or "action" not in found or not any(n.startswith("obs") for n in found):
        raise ValueError(f"{path} should hold {rows} rows of obs and action, it holds {sorted(found)} {wrong or ''}")
    return found
