"""Deadlines: threads are reused, bounded, and never keep a process alive."""

import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from rlflow.rewards.calls import MAX_LATE, Deadline

HANGS = """
import time
from rlflow.rewards.base import Reward, RewardSet
rewards = RewardSet([Reward("r", lambda prompt: time.sleep(3600), timeout_s=0.05)])
print(rewards.compute({"prompt": ["a"]}, 1)["r"].isnan().all().item())
"""


def test_a_hanging_reward_does_not_keep_the_process_alive():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.strip() == "True"


def test_one_thread_serves_all_calls():
    names = [Deadline("r", lambda: threading.current_thread(), 5.0)] * 5
    assert len({call({}) for call in names}) == 1
    assert names[0]({}).daemon


def test_no_limit_means_no_thread():
    assert Deadline("r", threading.current_thread, float("inf"))({}) is threading.current_thread()


def test_late_calls_are_bounded_and_forgiven_when_they_end():
    release, calls = threading.Event(), []

    def waits(fast):
        calls.append(fast)
        return fast if fast else release.wait(60)

    deadline = Deadline("r", waits, 0.2)
    for _ in range(MAX_LATE + 3):
        with pytest.raises(TimeoutError):
            deadline({"fast": 0})
    assert len(calls) == MAX_LATE
    release.set()
    for thread in deadline._late:
        thread.join(5)
    deadline.seconds = 5.0
    assert deadline({"fast": 7}) == 7


def test_the_error_of_the_function_reaches_the_caller():
    def fails():
        raise KeyError("missing")

    with pytest.raises(KeyError, match="missing"):
        Deadline("r", fails, 5.0)({})


def test_a_batch_is_let_go_after_its_call():
    deadline = Deadline("r", lambda images: None, 5.0)
    images = torch.zeros(3)
    gone = weakref.ref(images)
    deadline({"images": images})
    del images
    patience = time.monotonic() + 10
    while gone() is not None and time.monotonic() < patience:
        time.sleep(0.01)  # the worker lets go a moment after it has answered
    assert gone() is None
