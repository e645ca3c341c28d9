"""The Hugging Face hub: asked once whether it answers at all, for its library repeats each request for half a minute;
and its libraries kept quiet while they load."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 5.0
"""Within which the hub has to answer at all."""


def is_hub_id(name: str) -> bool:
    """True for what reads as owner/model and is nothing on this disk."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def online() -> bool:
    """Whether the hub answers; without it only the cache is left (`local_files_only`)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of which class depends on the version of the library; any answer at all is none of them
        return False
    return True


def why_not(error: Exception, reachable: bool) -> str:
    """One line for what the hub's libraries could not read."""
    from huggingface_hub import constants

    if reachable:
        return " ".join(str(error).split())[:300]
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache does not hold it: download it first, or unset HF_HUB_OFFLINE"
    return (
        f"no network: {constants.ENDPOINT} does not answer, and the cache does not hold it. Give a folder, or download "
        "it where there is a network; HF_HUB_OFFLINE=1 uses what is in the cache without asking"
    )


def one_file(repository: str, name: str) -> Path:
    """A file of a repository, from the cache or the hub."""
    from huggingface_hub import hf_hub_download

    reachable = online()
    try:
        return Path(hf_hub_download(repository, name, local_files_only=not reachable))
    except OSError as error:
        why = why_not(error, reachable)
        raise ValueError(f"no checkpoint {repository!r}, neither a folder nor a readable hub id: {why}") from error


def adapter_folder(repository: str) -> Path:
    """The files of a LoRA, from the cache or the hub."""
    from huggingface_hub import snapshot_download

    reachable, wanted = online(), ["*.safetensors", "adapter_config.json"]
    try:
        found = snapshot_download(
            repository, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=not reachable
        )
    except OSError as error:
        raise ValueError(f"neither a folder nor a readable hub id: {why_not(error, reachable)}") from error
    return Path(found)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the libraries that load draw no bars and give no advice; downloads show theirs, errors come through."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    libraries, downloads = (of_diffusers, of_transformers), not are_progress_bars_disabled()
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        if downloads:
            enable_progress_bars()  # those of transformers took the hub's along
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
