"""Whether a task is done, read from what Gymnasium environments tell besides: `info`, under the names in use for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SPELLINGS = ("is_success", "success", "goal_achieved")
"""gymnasium-robotics, PushT, LeRobot and stable-baselines3; MetaWorld, OGBench and ManiSkill; D4RL's hands."""


class Success:
    """1 or 0 for each row, nan where nothing tells; `name` is the entry to read, and without it the usual ones are.

    Some environments speak of success only when it has come. So silence means 0 where an entry was named, and
    without a name from the first word heard on.
    """

    def __init__(self, name: str | None = None):
        self.names = SPELLINGS if name is None else (name,)
        self.heard = name is not None

    def of_row(self, info: dict[str, Any]) -> float:
        """From the info of one environment."""
        told = _numbers(next((info[name] for name in self.names if name in info), None)).reshape(-1)
        return self._settled(told if len(told) == 1 else np.full(1, np.nan)).item()

    def of_rows(self, info: dict[str, Any], num: int) -> NDArray[np.float32]:
        """(num,) from the info of a VectorEnv, and from final_info of rows that were reset in the same step."""
        found = np.full(num, np.nan, np.float32)
        final = info.get("final_info", {})
        if not isinstance(final, dict):  # one for each row, or None
            found[:] = [np.nan if told is None else self.of_row(told) for told in final]
            final = {}
        for told in (info, final):
            for name in [name for name in self.names if name in told][:1]:
                values, rows = _numbers(told[name]), told.get(f"_{name}", np.ones(num, bool))
                if values.shape == (num,):
                    found = np.where(rows, values, found)
        return self._settled(found)

    def _settled(self, found: NDArray[np.float32]) -> NDArray[np.float32]:
        self.heard |= not np.isnan(found).all()
        return np.nan_to_num(found, nan=0.0) if self.heard else found


def _numbers(value: Any) -> NDArray[np.float32]:
    """`value` as numbers, nan for None and for what is no number."""
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError):
        return np.array(np.nan, np.float32)
