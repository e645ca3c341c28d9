"""Settings every test runs under: one thread, no hub, no display, reproducible hypothesis draws."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads, and for the processes that tests start
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("rlflow", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("rlflow")


@pytest.fixture(autouse=True)
def _defaults_restored():
    """A test may change the seed, default dtype or thread count; the next one starts as if it had not."""
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
