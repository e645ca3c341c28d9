"""A judge behind an OpenAI-compatible server: each picture with its question, and no score where it does not comply."""

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("httpx2")

from rlflow.rewards.base import Reward, RewardSet, to_uint8
from rlflow.rewards.remote.vlm import VLMJudge, read_score

IMAGES = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 3, 6, 5)
PROMPTS = ["a cat", 'a sign "{low}" {prompt}', "two dogs", "a cat"]
QUICK: dict[str, Any] = {"request_s": 8.0, "total_s": 20.0, "tries": 2, "backoff_s": 0.01}


class Handler(BaseHTTPRequestHandler):
    """Answers a chat request with what the server's `say` makes of it."""

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.asked.append((self.path, dict(self.headers), body))
        said = server.say(body)
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def spoken(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


@contextmanager
def model(say: Callable[[Any], Any]) -> Iterator[tuple[str, list[Any]]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.say, server.asked = say, []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.asked
    finally:
        server.shutdown()
        server.server_close()


def picture(body: Any) -> np.ndarray:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def brightness(body: Any) -> dict[str, Any]:
    """Scores a picture by its first pixel, 0 to 10."""
    return spoken(json.dumps({"score": float(picture(body)[0, 0, 0]) / 25.5}))


def compute(judge: VLMJudge) -> tuple[torch.Tensor, RewardSet]:
    rewards = RewardSet([Reward("r", judge)])
    return rewards.compute({"images": IMAGES, "prompt": PROMPTS}, 4)["r"], rewards


def test_every_picture_is_judged_with_its_own_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hush")
    with model(brightness) as (url, asked):
        scores, _ = compute(VLMJudge(url, "m", **QUICK))
    assert torch.allclose(scores, torch.linspace(0, 1, 4), atol=1 / 255)
    pictures = to_uint8(IMAGES)
    for path, headers, body in asked:
        assert path == "/v1/chat/completions"
        assert headers["authorization"] == "Bearer sk-hush"
        assert (body["model"], body["temperature"], body["response_format"]) == ("m", 0, {"type": "json_object"})
        (row,) = [i for i, p in enumerate(pictures) if np.array_equal(p, picture(body))]
        question = body["messages"][0]["content"][1]["text"]
        assert json.dumps(PROMPTS[row]) in question, "the description, whatever it holds, word for word"
        assert "from 0 (nothing of it) to 10 (everything)" in question
    assert len(asked) == 4


def test_answers_that_do_not_comply_mask_their_rows_alone() -> None:
    def say(body: Any) -> dict[str, Any]:
        return spoken("I like it: 9 of 10") if picture(body)[0, 0, 0] == 85 else brightness(body)

    with model(say) as (url, asked):
        scores, rewards = compute(VLMJudge(url, "m", **QUICK))
    assert scores.isnan().tolist() == [False, True, False, False]
    assert len(asked) == 4, "the same question has the same answer"
    assert rewards.errors["r"] == 1
    assert "1 of 4 rows, 0 without an answer: not one score in 'I like it: 9 of 10'" in rewards.last_error["r"]


@pytest.mark.parametrize("said", [{"choices": []}, {"error": "no such model"}, [], b"<html>", spoken(None)])
def test_what_is_no_answer_of_the_api_masks_everything(said: Any) -> None:
    with model(lambda body: said) as (url, _):
        scores, rewards = compute(VLMJudge(url, "m", **QUICK))
    assert scores.isnan().all()
    assert rewards.masked["r"] == 4


def test_a_server_that_is_not_there_masks_everything() -> None:
    scores, rewards = compute(VLMJudge("http://127.0.0.1:9/v1", "m", **QUICK))
    assert scores.isnan().all()
    assert "4 of 4 rows, 4 without an answer" in rewards.last_error["r"]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 7.0),
        ('```json\n{"score": 2.5, "why": "two dogs"}\n```', 2.5),
        ('Let me see {"dogs": 2}. {"score": 10}', 10.0),
        ('{"score": 3} ... so {"score": 3}', 3.0),
        ('{"score": 0}', 0.0),
        ('{"score": 3} no, {"score": 4}', None),
        ('{"score": 3} or {"score": "high"}', None),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"score": 11}', None),
        ('{"score": -1}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e400}', None),
        ('{"score": [7]}', None),
        ('{"rating": 7}', None),
        ('{"score": 7', None),
        ("7", None),
        ("", None),
        (["7"], None),
    ],
)
def test_a_score_is_one_number_in_its_range(text: Any, score: float | None) -> None:
    if score is None:
        with pytest.raises(ValueError, match="score"):
            read_score(text, 0.0, 10.0)
    else:
        assert read_score(text, 0.0, 10.0) == score


def test_the_scale_and_the_question_are_settings() -> None:
    with model(lambda body: spoken('{"score": 4}')) as (url, asked):
        judge = VLMJudge(url, "m", question="Rate {prompt} {1-5}", low=1.0, high=5.0, json_mode=False, **QUICK)
        assert compute(judge)[0].tolist() == [0.75] * 4
        said = {body["messages"][0]["content"][1]["text"] for _, _, body in asked}
        assert 'Rate "two dogs" {1-5}' in said
        assert all("response_format" not in body for _, _, body in asked)
    with pytest.raises(ValueError, match="low: must be below high"):
        VLMJudge(url, "m", low=5.0, high=5.0)
    with pytest.raises(ValueError, match=re.escape("question: must hold {prompt}")):
        VLMJudge(url, "m", question="Good?")
