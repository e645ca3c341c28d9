"""DiT: a small text-conditional flow transformer over pixels, with its own word-level tokenizer.

Text and image tokens share one stream (as SD3's, Esser et al. 2024) with adaLN modulation from time and the
mean text token (Peebles & Xie 2023). Three choices make it learn in minutes on one core: fixed-frequency 2-D
positions, a depthwise 3x3 convolution per block, and predicting the clean image, from which the velocity is

    v = (x1_pred - x) / max(1 - t, 0.05)

With `average_from` the blocks from there on and the output are told the end of the step in the place of its beginning
(Decoupled MeanFlow, 2025): no new parameter, and at dt = 0 the network is the one it was, bit for bit.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlflow.flow.field import FEW_TOKENS, VelocityField
from rlflow.flow.path import at_least_float, expand
from rlflow.models.layers import Linear
from rlflow.ranges import Natural, Size
from rlflow.types import Cond

PAD, NULL = 0, 1
"""Token ids before the vocabulary: filler, and the caption that says nothing."""
MIN_REMAINING = 0.05
"""Floor of 1 - t where a predicted image becomes a velocity: bounds the error's gain near the data."""


class DiT(VelocityField):
    """Velocity of images (N, channels, size, size) in [-1, 1] given a caption of at most `context` tokens."""

    row_multiple = FEW_TOKENS

    def __init__(
        self,
        vocab: Sequence[str],
        context: Size = 8,
        size: Size = 32,
        channels: Size = 3,
        patch: Size = 4,
        width: Size = 128,
        depth: Size = 6,
        heads: Size = 4,
        grad_checkpointing: bool = False,
        average_from: Natural | None = None,
    ) -> None:
        super().__init__()
        if average_from is not None and average_from > depth:
            raise ValueError(f"average_from {average_from} is beyond the {depth} blocks")
        if size % patch or width % heads or width % 4:
            raise ValueError(
                f"size {size} must be a multiple of patch {patch}, width {width} of heads {heads} and of 4"
            )
        if len(set(vocab)) != len(vocab):
            raise ValueError("the vocabulary names a word twice")
        self.args = {"vocab": list(vocab), "context": context, "size": size, "channels": channels}
        self.args |= {"patch": patch, "width": width, "depth": depth, "heads": heads}
        self.args |= {} if average_from is None else {"average_from": average_from}
        self.uses_dt, self.average_from = average_from is not None, depth if average_from is None else average_from
        self.event_shape = (channels, size, size)
        self.num_features = width
        self.vocab = {word: i for i, word in enumerate(vocab, start=NULL + 1)}
        self.context, self.patch, self.grid = context, patch, size // patch
        self.width, self.grad_checkpointing = width, grad_checkpointing
        self.word = nn.Embedding(len(vocab) + NULL + 1, width)
        self.word_position = nn.Parameter(torch.randn(context, width) * 0.3)
        self.position = nn.Parameter(sincos_2d(width, self.grid))
        self.patch_in = Linear(channels * patch * patch, width)
        self.time = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.pool = Linear(width, width)
        self.modulation = Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width, heads, self.grid) for _ in range(depth))
        self.modulation_out = Linear(width, 2 * width)
        self.patch_out = Linear(width, channels * patch * patch)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.word.weight, std=0.3)
        for layer in (self.modulation, self.modulation_out, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.modulation.bias.view(6, -1)[2:4] = 0.5  # both gates half open
        nn.init.constant_(self.patch_out.bias, -0.8)  # begin at a dark image

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids (N, context); quoted text is spelt letter by letter. ValueError for an unknown word."""
        rows = [[self._token(word) for word in split_words(text)] for text in captions]
        for text, row in zip(captions, rows, strict=True):
            if len(row) > self.context:
                raise ValueError(f"prompt of {len(row)} tokens, this model reads {self.context}: {text!r}")
        return torch.tensor([row + [PAD] * (self.context - len(row)) for row in rows]).view(-1, self.context)

    def _token(self, word: str) -> int:
        if word not in self.vocab:
            near = difflib.get_close_matches(word, self.vocab, n=1, cutoff=0.0)
            raise ValueError(f"unknown word {word!r}; the nearest this model knows is {near[0]!r}")
        return self.vocab[word]

    def encode(self, obs: Tensor | Sequence[str]) -> Cond:
        """Captions (N of them) or their token ids (N, context) to "tokens" (N, context, width), "pooled"."""
        if not isinstance(obs, Tensor):
            obs = self.tokenize(obs)
        tokens = self.word(obs.to(self.word.weight.device)) + self.word_position
        return Cond({"tokens": tokens, "pooled": tokens.mean(1)})

    def null(self, cond: Cond) -> Cond:
        """The caption that says nothing, for as many rows as `cond` has; stored once."""
        device = self.word.weight.device
        once = self.encode(torch.full((1, self.context), NULL, device=device))
        return once.index(torch.zeros(len(cond), dtype=torch.long, device=device))

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The word embeddings and their positions."""
        return [*self.word.parameters(), self.word_position]

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights of the blocks' linear layers, which Muon trains."""
        layers = [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]
        return [p for layer in layers for p in layer.parameters() if p.ndim == 2]

    def forward(self, x: Tensor, t: Tensor, dt: Tensor, cond: Cond) -> Tensor:
        """Velocity (N, *D), in at least float32, at x (N, *D) and t (N,); dt is read with `average_from`."""
        x, t = at_least_float(x), at_least_float(t).to(x.dtype)
        beginning = self._told(t, cond)
        clock, end = self._told(t + dt.to(t), cond) if self.uses_dt else beginning
        # image tokens first: the convolution then reads them without a copy
        h = torch.cat([self.patch_in(self._patches(x)) + self.position, cond["tokens"]], 1)
        for i, block in enumerate(self.blocks):
            modulation = beginning[1] if i < self.average_from else end
            if self.grad_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, modulation, use_reentrant=False)
            else:
                h = block(h, modulation)
        shift, scale = self.modulation_out(clock).unsqueeze(1).chunk(2, -1)
        h = modulate(h[:, : self.grid**2], shift, scale)
        x_1 = at_least_float(self._image(self.patch_out(h)))
        return (x_1 - x) / expand(1 - t, x).clamp(min=MIN_REMAINING)

    def _told(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """What the output (N, width) and the blocks (N, 6, width) are told of times t (N,) and the caption."""
        clock = self.time(sinusoid(t * 1000, self.width).to(self.position.dtype)) + self.pool(cond["pooled"])
        clock = F.silu(clock)
        return clock, self.modulation(clock).view(-1, 6, self.width)

    def decode(self, x: Tensor) -> Tensor:
        """Latent (N, *D) in [-1, 1] to an image in [0, 1]."""
        return ((x + 1) / 2).clamp(0, 1)

    def _patches(self, x: Tensor) -> Tensor:
        n, c, p, g = len(x), x.shape[1], self.patch, self.grid
        patches = x.view(n, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, -1)
        return patches.to(self.position.dtype)

    def _image(self, patches: Tensor) -> Tensor:
        n, c, p, g = len(patches), self.event_shape[0], self.patch, self.grid
        return patches.view(n, g, g, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, c, g * p, g * p)


class Block(nn.Module):
    """Attention, depthwise convolution on the image tokens, MLP; gates and shifts come from adaLN."""

    def __init__(self, width: int, heads: int, grid: int) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv = Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.attend = Linear(width, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """Tokens (N, L, width), the image's first, under the common modulation (N, 6, width)."""
        m = (modulation + self.modulation).unsqueeze(2).unbind(1)
        h = h + m[2] * self.attention(modulate(h, m[0], m[1]))
        h = h + self.mixed(h)
        return h + m[3] * self.down(F.gelu(self.up(modulate(h, m[4], m[5]))))

    def attention(self, h: Tensor) -> Tensor:
        """Full self-attention with normalised queries and keys."""
        n, length, width = h.shape
        q, k, v = self.qkv(h).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if h.is_cuda:
            out = F.scaled_dot_product_attention(q, k, v)
        else:  # the backward of CPU flash attention takes twice as long at this length
            weight = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            out = weight.softmax(-1).to(v.dtype) @ v
        return self.attend(out.transpose(1, 2).reshape(n, length, width))

    def mixed(self, h: Tensor) -> Tensor:
        """The convolution of the image tokens, zero at the text tokens."""
        n, length, width = h.shape
        tokens = self.grid**2
        image = h[:, :tokens].transpose(1, 2).reshape(n, width, self.grid, self.grid)
        return F.pad(self.conv(image).flatten(2).transpose(1, 2), (0, 0, 0, length - tokens))


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, then scale and shift (N, 1, width)."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), 1 + scale)


def split_words(text: str) -> list[str]:
    """Lower-case words of a caption, and the letters of its quoted parts."""
    pieces = re.findall(r'"[^"]*"|\S+', text)
    return [w for p in pieces for w in (list(p[1:-1]) if p.startswith('"') else [p.lower()])]


def sinusoid(angle: Tensor, width: int) -> Tensor:
    """Sines and cosines (N, width) of angle (N,) at geometric frequencies 1 ... 1e-4."""
    steps = torch.arange(width // 2, device=angle.device, dtype=angle.dtype)
    phase = angle[:, None] * torch.exp(-math.log(1e4) * 2 / width * steps)
    return torch.cat([phase.cos(), phase.sin()], -1)


def sincos_2d(width: int, grid: int) -> Tensor:
    """Row and column positions (grid * grid, width) at frequencies 1 ... 1e-2."""
    frequency = torch.exp(-math.log(100.0) * 4 / width * torch.arange(width // 4))
    phase = torch.arange(grid)[:, None] * frequency
    line = torch.cat([phase.sin(), phase.cos()], 1)
    rows, columns = line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width)
