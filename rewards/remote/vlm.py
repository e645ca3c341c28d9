"""A vision-language model as judge, behind any server that speaks OpenAI's chat API (vLLM, SGLang, llama.cpp, ...).

    score = (s - low) / (high - low)        s: the number under "score" in the model's JSON answer

The picture goes as PNG beside the question, one request an image, several at the same time. An answer without exactly
one score in [low, high] is no score: the row is masked and counted, never a zero.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlflow.registry import SettingError
from rlflow.rewards.base import Elsewhere, to_uint8
from rlflow.rewards.remote.ask import Asker, NoAnswer, Patience, Request, check_url, parse_json, read_token
from rlflow.rewards.remote.breaker import Breaker
from rlflow.rewards.scores import SomeRows

QUESTION = """The picture was made from this description: {prompt}
How well does it show what the description says: every object, number, colour, position and text? Ignore beauty.
Answer with JSON alone, {"score": S}, where S is a number from {low} (nothing of it) to {high} (everything)."""

OBJECT = re.compile(r"\{[^{}]*\}")


class Unread(Exception):
    """An answer of the model that holds no score, or more than one."""


class VLMJudge(Elsewhere):
    """How well the image shows the prompt, in [0, 1], as a vision-language model on a server says."""

    def __init__(
        self,
        url: str,
        model: str,
        question: str = QUESTION,
        low: float = 0.0,
        high: float = 10.0,
        max_tokens: int = 128,
        json_mode: bool = True,
        request_s: float = 30.0,
        total_s: float = 50.0,
        tries: int = 3,
        parallel: int = 8,
        backoff_s: float = 0.5,
        failures: int = 12,
        rest_s: float = 30.0,
        key_env: str = "OPENAI_API_KEY",
    ):
        if not -math.inf < low < high < math.inf:
            raise SettingError("low", f"must be below high, got {low:g} and {high:g}")
        if "{prompt}" not in question:
            raise SettingError("question", "must hold {prompt}, where the description stands")
        url = check_url(url)
        patience = Patience(request_s, total_s, tries, backoff_s, parallel)
        self.asker = Asker(f"{url}/chat/completions", read_token(key_env, url), patience, Breaker(failures, rest_s))
        self.question, self.low, self.high = question, low, high
        self.body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        if json_mode:
            self.body["response_format"] = {"type": "json_object"}

    def __call__(self, images: Tensor, prompt: Sequence[str]) -> Tensor:
        """(N,) in [0, 1]; SomeRows where some answers did not come or hold no score."""
        pairs = zip(to_uint8(images), prompt, strict=True)
        answers = self.asker.ask([self._request(pixels, text) for pixels, text in pairs])
        failures = [said for said in answers if isinstance(said, Exception)]
        scores = torch.tensor([torch.nan if isinstance(said, Exception) else float(said) for said in answers])
        if failures:
            reasons = f"{sum(isinstance(f, NoAnswer) for f in failures)} without an answer"
            raise SomeRows(scores, f"{len(failures)} of {len(answers)} rows, {reasons}: {failures[0]}")
        return scores

    def _request(self, pixels: NDArray[np.uint8], prompt: str) -> Request:
        quoted = json.dumps(prompt, ensure_ascii=False)
        words = {"{prompt}": quoted, "{low}": f"{self.low:g}", "{high}": f"{self.high:g}"}
        text = re.sub(r"\{(?:prompt|low|high)\}", lambda found: words[found[0]], self.question)
        content = [{"type": "image_url", "image_url": {"url": data_url(pixels)}}, {"type": "text", "text": text}]
        body = self.body | {"messages": [{"role": "user", "content": content}]}
        return Request(json.dumps(body).encode(), "application/json", self._read)

    def _read(self, said: Any) -> float | Unread:
        """The score of an answer of the API; ValueError where it is none, Unread where the model did not comply."""
        try:
            text = said["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError("it has no choices[0].message.content") from None
        try:
            return (read_score(text, self.low, self.high) - self.low) / (self.high - self.low)
        except ValueError as error:
            return Unread(str(error))


def data_url(pixels: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) as a PNG inside a URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_score(text: Any, low: float, high: float) -> float:
    """The one number under "score" in the JSON objects of a text; ValueError without one, or outside [low, high]."""
    found: set[float] = set()
    for part in OBJECT.findall(text) if isinstance(text, str) else []:
        try:
            value = parse_json(part).get("score")
        except ValueError:
            continue
        if value is not None:
            found.add(float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan)
    if len(found) != 1 or math.nan in found:
        raise ValueError(f"not one score in {str(text)[:80]!r}")
    (score,) = found
    if not low <= score <= high:
        raise ValueError(f"the score {score:g} is outside {low:g} to {high:g}")
    return score
