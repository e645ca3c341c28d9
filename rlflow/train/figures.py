"""Pictures of a run: captioned grids of images (PIL) and learning curves (matplotlib, loaded on first use).

Small images are enlarged by whole factors without smoothing, so that every pixel stays what the model made.
Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; right and wrong also differ
in shape (tick, cross).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Color = tuple[int, int, int]
PAPER: Color = (255, 255, 255)
INK: Color = (38, 42, 48)
FAINT: Color = (120, 126, 134)
EDGE: Color = (214, 218, 224)
RIGHT: Color = (0, 158, 115)
WRONG: Color = (213, 94, 0)
TILE = 128  # pixels that an enlarged tile has at least
LINES = 3  # of a caption
