"""EO-1 (arXiv:2508.21112), whose batches hold the pictures of all rows in one list, as tensors that lead with rows.

Its language model reads prompt and actions in one row of tokens, so what a velocity depends on reads the prefix too:
it trains through the tokens of actions alone, and prefixes are made anew at every update unless it is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlflow.models.lerobot.processors import PolicyProcessors
from rlflow.types import Tree

TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")
LISTS = ("pixel_values", "image_grid_thw")
"""(patches of all pictures, numbers of a patch), (all pictures, 3)."""
NUMBERS = ("state_token_id", "action_token_id")
ROOM = 64
"""Tokens that an instruction may have."""


def as_list(batch: Tree) -> dict[str, Any]:
    """A batch that leads with rows as EO-1 takes it; that of any other policy as it is."""
    found = dict(batch)
    for name in LISTS:
        if name in found:
            found[name] = found[name].flatten(0, 1)
    return found | {name: int(found[name][0]) for name in NUMBERS if name in found}


def by_rows(made: dict[str, Any], words: int, pad: int) -> dict[str, Tensor]:
    """The inverse, of what EO-1's preprocessor made: every row looks at pictures of the same sizes.

    Tokens are filled up on the left with `pad`, which is masked, to `words` beside those of the pictures, so that
    conditions of different calls can be put together. ValueError where there are more.
    """
    num = len(made["input_ids"])
    spare = words + int(made["mm_token_type_ids"][0].eq(1).sum()) - made["input_ids"].shape[1]
    if spare < 0:
        raise ValueError(f"an instruction has {-spare} tokens more than the {ROOM} for which EO-1's prompt has room")
    fill = {"input_ids": pad}
    found = {n: F.pad(made[n], (spare, 0), value=fill.get(n, 0)) for n in TOKENS}
    found |= {n: made[n].unflatten(0, (num, -1)) for n in LISTS}
    found |= {n: torch.full((num,), made[n]) for n in NUMBERS}
    return found | {"observation.state": made["observation.state"]}


class EO1Processors(PolicyProcessors):
    """Those of a checkpoint of EO-1's."""

    words: int | None = None

    def chosen(self, made: dict[str, Any]) -> dict[str, Tensor]:
        """What the policy reads of what the pipeline made."""
        (step,) = [step for step in self._before.steps if type(step).__name__ == "EO1QwenProcessorStep"]
        if self.words is None:  # made first of the example, which has no words
            self.words = made["input_ids"].shape[1] - int(made["mm_token_type_ids"][0].eq(1).sum()) + ROOM
        return by_rows(made, self.words, step._processor.tokenizer.pad_token_id or 0)
