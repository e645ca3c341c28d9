"""A small vision-language-action model: a prefix of picture and words, and an action expert that reads its cache.

The layout of pi0 (Black et al. 2024) in 0.2 M parameters: every layer of the expert attends to the cached keys and
values of the prefix layer at its height and to its own tokens, one per action of the chunk. The prefix sees neither
the noisy actions nor the time, so it runs once per observation; frozen (`policy.frozen: ^prefix`), it never runs
again in an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from rlflow.flow.field import VelocityField
from rlflow.models.mlp import TimeFeatures, mlp
from rlflow.models.normalizer import Normalizer
from rlflow.ranges import Natural, Size
from rlflow.types import Cond, Tree


class Layer(nn.Module):
    """Pre-norm attention and MLP; `keys_values` is apart, so that another stream can read them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_up = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up = mlp([width, 2 * width, width])

    def project(self, h: Tensor) -> list[Tensor]:
        """Queries, keys and values (N, heads, L, width / heads) of tokens h (N, L, width)."""
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(h)).chunk(3, -1)]

    def forward(self, h: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens (N, L, width) after they attended to `keys`, `values` (N, heads, M, width / heads)."""
        weight = (query * query.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        h = h + self.out((weight.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return h + self.up(self.norm_up(h))


class Prefix(nn.Module):
    """Pixels, where there are any, and words to the keys and values of every layer, and one read-out vector."""

    grid: Tensor

    def __init__(self, vocab: int, context: int, pixels: int, width: int, depth: int, heads: int):
        super().__init__()
        channels = [5, 24, 48, width]  # colours and the place of the pixel; every convolution halves the side
        convolutions = [[nn.Conv2d(a, b, 3, 2, 1), nn.SiLU()] for a, b in pairwise(channels)]
        self.look = nn.Sequential(*chain.from_iterable(convolutions if pixels else []))
        line = torch.linspace(-1, 1, pixels)
        self.register_buffer("grid", torch.stack(torch.meshgrid(line, line, indexing="ij")), persistent=False)
        self.word = nn.Embedding(vocab, width)
        self.place = nn.Parameter(0.3 * torch.randn((pixels // 8) ** 2 + context + 1, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor | None, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (N, depth, heads, L, width / heads) and the read-out (N, width)."""
        words = self.word(text)
        readout, picture = torch.zeros_like(words[:, :1]), words[:, :0]
        if pixels is not None:
            colours = pixels.permute(0, 3, 1, 2).to(self.place.dtype) / 127.5 - 1
            seen = torch.cat([colours, self.grid.expand(len(colours), -1, -1, -1)], 1)
            picture = self.look(seen).flatten(2).transpose(1, 2)
        h = torch.cat([readout, picture, words], 1) + self.place
        kept = []
        for layer in cast(Iterable[Layer], self.layers):
            query, keys, values = layer.project(h)
            kept.append((keys, values))
            h = layer(h, query, keys, values)
        keys, values = (torch.stack(part, 1) for part in zip(*kept, strict=True))
        return keys, values, self.norm(h[:, 0])


class VLA(VelocityField):
    """v(x, t | pixels, words, state) of action chunks (H, A); observations as {"pixels", "text", "state"}.

    pixels (N, side, side, 3) uint8, none of them where `pixels` is 0; text (N, context) word numbers below `vocab`;
    state (N, state_dim), normalised where cloning filled `normalizer`. "pooled" is the prefix's read-out beside the
    state: what the critic and a noise head read.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        vocab: Size,
        context: Size = 5,
        pixels: Size = 24,
        state_dim: Natural = 2,
        width: Size = 64,
        depth: Size = 2,
        heads: Size = 4,
    ):
        super().__init__()
        if pixels % 8 or width % heads:
            raise ValueError(f"pixels {pixels} must be a multiple of 8 and width {width} of heads {heads}")
        self.args = {"event_shape": list(event_shape), "vocab": vocab, "context": context, "pixels": pixels}
        self.args |= {"state_dim": state_dim, "width": width, "depth": depth, "heads": heads}
        self.event_shape, self.num_features = tuple(event_shape), width + state_dim
        self.shapes: dict[str, tuple[int, ...]] = {"text": (context,), "state": (state_dim,)}
        self.shapes |= {"pixels": (pixels, pixels, 3)} if pixels else {}
        self.normalizer = Normalizer(state_dim)
        self.prefix = Prefix(vocab, context, pixels, width, depth, heads)
        self.time, self.clock = TimeFeatures(), mlp([16 + self.num_features, width, width])
        self.enter = nn.Linear(self.event_shape[1], width)
        self.place = nn.Parameter(0.3 * torch.randn(self.event_shape[0], width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        last = nn.Linear(width, self.event_shape[1])
        nn.init.zeros_(last.weight)
        self.leave = nn.Sequential(nn.LayerNorm(width), last)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The prefix."""
        return list(self.prefix.parameters())

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights of the layers, of both streams, which Muon trains."""
        found = [*self.prefix.layers.parameters(), *self.layers.parameters()]
        return [p for p in found if p.ndim == 2]

    def encode(self, obs: Tree) -> Cond:
        """Run the prefix once; ValueError where an observation is missing or has another shape."""
        found = {name: tuple(v.shape[1:]) for name, v in obs.items()} if isinstance(obs, dict) else obs.shape
        if found != self.shapes:
            raise ValueError(f"the model reads {self.shapes}, observed is {found}")
        keys, values, readout = self.prefix(obs.get("pixels"), obs["text"])
        state = self.normalizer(obs["state"]).to(readout)
        return Cond({"keys": keys, "values": values, "pooled": torch.cat([readout, state], -1)})

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, H, A) at x (N, H, A) and t (N,); dt is ignored."""
        clock = self.clock(torch.cat([self.time(t), cond["pooled"]], -1))
        h = self.enter(x) + self.place + clock.unsqueeze(1)
        keys, values = cond["keys"], cond["values"]
        for i, layer in enumerate(cast(Iterable[Layer], self.layers)):
            query, mine, my_values = layer.project(h)
            h = layer(h, query, torch.cat([keys[:, i], mine], 2), torch.cat([values[:, i], my_values], 2))
        return self.leave(h)
