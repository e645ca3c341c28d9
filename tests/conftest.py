"""Settings every test runs under: one thread, no hub, no display, reproducible hypothesis draws; and processes
played by threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads, and for the processes that tests start
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import gc
import importlib.util
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from torch import Tensor

from rlflow.config import recipes
from rlflow.envs.captions import scenes, words
from rlflow.models.dit import DiT
from rlflow.models.io import save_field
from rlflow.rewards.colour import brightness
from rlflow.rewards.remote.wire import answer, unpack
from rlflow.train.trainer import Trainer

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: processes that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("rlflow", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("rlflow")


OF_EXTRAS = {"cube_": "ogbench", "pusht": "gym_pusht", "warp_": "mujoco_warp", "metaworld": "envpool"}
OF_EXTRAS |= {"puzzle_": "ogbench", "lerobot": "lerobot"}  # the latter of Python 3.12, in an environment of its own
"""Beginnings of the names of environments that need more than the extra [robots], and the package they need."""

RECIPES = set(recipes.names())


@functools.cache
def missing_package(name: str) -> str | None:
    """The package that an environment, or the environment of a recipe, needs and that is not installed."""
    env = recipes.read(name).get("env", {}).get("name", "") if name in RECIPES else name
    needed = next((package for start, package in OF_EXTRAS.items() if env.startswith(start)), None)
    return None if needed is None or importlib.util.find_spec(needed) else needed


def pytest_collection_finish() -> None:
    """What was imported stays: the collector of garbage need not look at it again, which is a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is parametrised by the name of an environment, or of a recipe, whose package is not installed."""
    for item in items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for package in {missing_package(value) for value in params if isinstance(value, str)} - {None}:
            item.add_marker(pytest.mark.skip(reason=f"{package} is not installed"))


@pytest.fixture(autouse=True)
def _defaults_restored():
    """A test may change the seed, default dtype or thread count; the next one starts as if it had not."""
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """load_script("make_demos") -> that file of scripts/ as a module, without starting it."""
    loaded = []

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"script_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look their annotations up
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        sys.modules.pop(name, None)  # once, though a file may be loaded twice


class ThreadWorld:
    """Stands in for torch.distributed: every rank a thread, collectives by barrier, so a missing call is an error."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, size: int):
        self.size, self.local = size, threading.local()
        self.meet = threading.Barrier(size, timeout=20)
        self.box: list[Any] = [None] * size

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.size

    def get_rank(self) -> int:
        return self.local.rank

    def barrier(self) -> None:
        self.meet.wait()

    def _everyone(self, value: Tensor) -> list[Tensor]:
        self.box[self.get_rank()] = value.detach().clone()
        self.meet.wait()
        found = list(self.box)
        self.meet.wait()
        return found

    def all_reduce(self, value: Tensor, op: Any = None) -> None:
        found = torch.stack(self._everyone(value))
        value.copy_(found.amax(0) if op == self.ReduceOp.MAX else found.sum(0))

    def all_gather(self, parts: list[Tensor], value: Tensor) -> None:
        for part, found in zip(parts, self._everyone(value), strict=True):
            part.copy_(found)

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """fn(rank) on every rank at once; raises what a rank raised."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = fn(rank)
            except BaseException as error:
                errors.append(error)
                self.meet.abort()

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return results


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[int], Any]], list[Any]]:
    """ranks(size, fn) -> [fn(0), fn(1), ...], each in a process of its own as far as rlflow.parallel.dist can tell."""

    def run(size: int, fn: Callable[[int], Any]) -> list[Any]:
        with monkeypatch.context() as patch:
            world = ThreadWorld(size)
            patch.setattr("rlflow.parallel.dist.dist", world)
            return world.run(fn)

    return run


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """tiny_pipeline("sd3" | "flux", **scheduler) -> the folder of a random checkpoint in the real format.

    Made once, for all workers.
    """
    from rlflow.models.pretrained.tiny import make_tiny

    mine = tmp_path_factory.getbasetemp()
    shared = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "pipelines"
    shared.mkdir(exist_ok=True)

    def make(kind: str, **scheduler: Any) -> Path:
        made = shared / "-".join([kind, *(f"{key}={value}" for key, value in sorted(scheduler.items()))])
        with FileLock(f"{made}.lock"):
            if made.exists():
                return made
            if not scheduler:
                return make_tiny(kind, made)
            shutil.copytree(make(kind), made)
            config = made / "scheduler" / "scheduler_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
            return made

    return make


TINY_OF = {"flux": "flux", "klein": "klein", "zimage": "z_image", "qwen": "qwen_image", "sd15": "sd15", "sdxl": "sdxl"}
TINY_OF |= {"wan": "wan"}
"""By how the name of a recipe begins, the kind of its checkpoint; all others are of Stable Diffusion 3."""


@pytest.fixture(scope="session")
def tiny_of(tiny_pipeline: Callable[..., Path]) -> Callable[[str], Path]:
    """tiny_of(recipe) -> the folder of a random checkpoint of its family."""
    return lambda name: tiny_pipeline(next((TINY_OF[start] for start in TINY_OF if name.startswith(start)), "sd3"))


class Half(BaseHTTPRequestHandler):
    """A reward server that never answers a request with a prompt that says so, and others with their brightness."""

    def log_message(self, *_: object) -> None: ...

    def reply(self, said: dict[str, Any]) -> None:
        content = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.reply({"protocol": 1, "columns": ["images", "hide"]})

    def do_POST(self) -> None:
        batch = unpack(self.rfile.read(int(self.headers["content-length"])))
        if any(batch.columns["hide"]):
            self.server.done.wait(400)  # type: ignore[attr-defined]
        else:
            self.reply(answer(batch, brightness(batch.columns["images"])))


@pytest.fixture(scope="session")
def half_silent() -> Iterator[str]:
    """The address of such a server."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Half)
    server.done, server.handle_error = threading.Event(), lambda *_: None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.done.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def served() -> Callable[..., Any]:
    """served(fn, **limits) -> a context: a real server of a reward, as its URL, its Service and the uvicorn server."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from rlflow.rewards.remote.server import Service, listen

    @contextmanager
    def serve(fn: Callable[..., Any], **limits: Any) -> Iterator[tuple[str, Service, Any]]:
        service = Service("r", fn, **limits)
        server, listener = listen(service, "127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", service, server
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

    return serve


# -- a network of 20k weights that trains in milliseconds, and runs made of it --------------------

TINY = (
    *("env.num_groups=2", "env.group_size=4", "env.rows_per_call=8", "eval.num=6"),
    *("train.tensorboard=false", "train.report=false"),
    *("policy.precision=float32", "policy.num_steps=6", "reward.weights={brightness: 1}"),
    "eval.metrics={brightness: brightness, base_distance: base_distance}",
)


def random_field(folder: Path, vocab: list[str]) -> str:
    """A checkpoint folder of random weights whose samples depend on the caption."""
    torch.manual_seed(0)
    field = DiT(vocab, size=16, patch=4, width=16, depth=1, heads=2)
    torch.nn.init.normal_(field.patch_out.weight, std=0.2)
    torch.nn.init.normal_(field.modulation.weight, std=0.2)
    return str(save_field(field, folder))


@pytest.fixture(scope="session")
def scenes_field(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A field that knows the words of the scenes."""
    return random_field(tmp_path_factory.mktemp("scenes"), scenes.VOCAB)


@pytest.fixture(scope="session")
def words_field(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A field that knows letters."""
    return random_field(tmp_path_factory.mktemp("words"), words.VOCAB)


@pytest.fixture
def tiny() -> list[str]:
    """Overrides that make any recipe's run small."""
    return list(TINY)


@pytest.fixture
def trainer(scenes_field: str) -> Callable[..., Trainer]:
    """Make a Trainer of a tiny run: trainer(folder, *overrides, recipe=..., **keywords of Trainer)."""

    def make(run: Path, *overrides: str, recipe: str = "t2i_flow_grpo", **more: Any) -> Trainer:
        all_overrides = [*TINY, f"policy.field={scenes_field}", "train.minutes=", "train.iterations=2", *overrides]
        return Trainer(recipe, run, overrides=all_overrides, quiet=True, **more)

    return make
