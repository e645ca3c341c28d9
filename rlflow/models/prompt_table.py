"""Texts by number, and their encodings: a frozen text encoder sees each distinct text once.

A condition then holds numbers (N,) in place of megabytes per row; the values are looked up where a network needs them.
Texts may have as many tokens as they need: those of a batch are padded to its longest, and "mask" says where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Encoded = Mapping[str, Tensor | Sequence[Tensor]]
"""Of N texts: (N, ...), or N tensors whose first sizes differ."""
Encoding = dict[str, Tensor]
TOKENS, MASK = "tokens", "mask"
"""Names of what may be ragged, (N, L, W), and of (N, L), True where it is a text's own."""
BATCH = 8
"""Texts of one encoder pass, always: a pass of another size rounds differently, and a resumed run would too."""


class PromptTable:
    """`encode(texts)` gives named tensors (len(texts), ...), kept in host memory; the `capacity` last used stay."""

    def __init__(self, encode: Callable[[list[str]], Encoded], capacity: int = 1024):
        if capacity < 1:
            raise ValueError(f"a table of {capacity} encoded prompts holds none: give cache >= 1")
        self._encode: Callable[[list[str]], Encoded] | None = encode
        self.capacity = capacity
        self.texts: list[str] = []
        self._number: dict[str, int] = {}
        self._rows: dict[int, Encoding] = {}
        self._last: tuple[list[int], torch.device, Encoding] | None = None
        self.encoded = 0
        """Texts that went through the encoders."""

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """(N,) long; unknown texts are entered. ValueError once the encoders are gone."""
        for text in dict.fromkeys(texts):
            if text not in self._number:
                if self._encode is None:
                    raise ValueError("the text encoders were released and this prompt is not among those encoded")
                self._number[text] = len(self.texts)
                self.texts.append(text)
        return torch.tensor([self._number[text] for text in texts], dtype=torch.long)

    def close(self) -> None:
        """Encode all texts entered so far and take no more: the caller may let go of the encoders."""
        self.capacity = max(self.capacity, len(self.texts))
        self.fill(range(len(self.texts)))
        self._encode = None

    def fill(self, numbers: Sequence[int]) -> None:
        """Encode those of `numbers` that are not at hand; the least recently used make room."""
        wanted = list(dict.fromkeys(numbers))
        missing = [n for n in wanted if n not in self._rows]
        for part in (missing[i : i + BATCH] for i in range(0, len(missing), BATCH)):
            assert self._encode is not None
            texts = [self.texts[n] for n in part]
            encoding = self._encode(texts + texts[-1:] * (BATCH - len(texts)))
            self.encoded += len(texts)
            for i, n in enumerate(part):
                self._rows[n] = {name: value[i].detach().cpu().clone() for name, value in encoding.items()}
        for n in wanted:
            self._rows[n] = self._rows.pop(n)
        while len(self._rows) > max(self.capacity, len(wanted)):
            del self._rows[next(iter(self._rows))]

    def __call__(self, numbers: Tensor) -> Encoding:
        """Encodings of numbers (N,) on their device; rows of one text are moved there once.

        With "mask" where their texts have different numbers of tokens.
        """
        unique, inverse = numbers.unique(return_inverse=True)
        wanted = unique.tolist()
        if self._last is None or self._last[:2] != (wanted, numbers.device):
            self.fill(wanted)
            stacked = _stack([self._rows[n] for n in wanted])
            self._last = wanted, numbers.device, {name: value.to(numbers.device) for name, value in stacked.items()}
        return {name: value[inverse] for name, value in self._last[2].items()}


def _stack(rows: Sequence[Encoding]) -> Encoding:
    """Encodings of single texts as one, padded with zeros to the longest."""
    found = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}
    lengths = torch.tensor([len(row.get(TOKENS, ())) for row in rows])
    if len(lengths.unique()) > 1:
        found[MASK] = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return found
