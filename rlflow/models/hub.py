"""The Hugging Face hub as those see it who load from it: is there a network at all, and what to say where there is not.

The libraries try again for half a minute per file before they give up. Here the hub is asked once for a connection; if
there is none, only what lies on this disk is loaded, and what does not is said at once with its reason.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROBE_S = 5.0


@functools.cache
def unreachable() -> str | None:
    """Why the hub cannot be asked, None where it can; asked once per process, in PROBE_S seconds and a lookup's."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the network is not asked, for HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_S)
    except Exception as error:  # of the client that the hub's library has, httpx or requests: any means that it fails
        return f"there is no network to {constants.ENDPOINT} ({type(error).__name__})"
    return None


def only_here(source: str) -> bool:
    """`local_files_only` for a folder or a name on the hub: whether to look on this disk alone."""
    return not Path(source).is_dir() and unreachable() is not None


def is_hub_id(name: str) -> bool:
    """True for what reads as owner/model and is nothing on this disk."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def one_file(repository: str, name: str) -> Path:
    """A file of a repository, from the cache or the hub; ValueError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, local_files_only=only_here(repository)))
    except OSError as error:
        raise ValueError(f"no folder, and {why_not(repository, name, error)}") from error


def adapter_folder(repository: str) -> Path:
    """The files of a LoRA, from the cache or the hub; ValueError."""
    from huggingface_hub import snapshot_download

    wanted = {"allow_patterns": ["*.safetensors", "adapter_config.json"], "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(repository, local_files_only=only_here(repository), **wanted))
    except OSError as error:
        raise ValueError(f"no folder, and {why_not(repository, 'a LoRA', error)}") from error


def why_not(source: str, holds: str, error: Exception) -> str:
    """One line on why a folder or a name on the hub did not load, and what to do; `holds`: what it has to hold."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(source).is_dir():
        return f"the folder {source!r} holds no {holds} that can be loaded ({first})"
    if reason := unreachable():
        return (
            f"{source!r} is not on this machine and {reason}: give a folder with {holds}, or load it once where there "
            "is a network (afterwards HF_HUB_OFFLINE=1 keeps to this disk)"
        )
    return f"{source!r} has no {holds} that can be loaded ({first})"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the libraries that load draw no bars and give no advice; downloads show theirs, errors come through."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    loaded = [name for name in ("transformers", "diffusers") if name in sys.modules]
    logs = [importlib.import_module(f"{name}.utils.logging") for name in loaded]
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    downloads = not are_progress_bars_disabled()
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        if downloads:
            enable_progress_bars()  # those of transformers took the hub's along
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, verbosity, bar in before:
            log.set_verbosity(verbosity)
            log.enable_progress_bar() if bar else log.disable_progress_bar()
