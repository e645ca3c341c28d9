"""Files that are whole or not there, readable as the user's umask says, and known by their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

WHOLE = 64 * 2**20
"""Bytes up to which a file counts wholly in `digest`."""
PIECE, PIECES = 2**18, 64


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    work = path.with_name(f".{path.name}")
    work.write_text(text, encoding="utf-8")
    sync(work)
    os.replace(work, path)


def sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is as readable as any other new file: safetensors makes its own for the owner."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)


def as_readable(folder: Path) -> None:
    """Give the weights that a library wrote into a folder, for their owner alone, the mode of any other new file."""
    new = folder / ".new"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; OSError as the system says it, ValueError for a damaged file."""
    from safetensors.torch import load_file

    with _said(path):
        return load_file(path)


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The same as NumPy's, without PyTorch: whoever reads a finished run needs none. ValueError for bfloat16, too."""
    from safetensors.numpy import load_file

    with _said(path):
        try:
            return load_file(path)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds numbers of a kind that NumPy has not: {error}") from None


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """What is wrong with a safetensors file, in words."""
    from safetensors import SafetensorError

    with path.open("rb"):  # safetensors calls a file that may not be read one that is not there
        pass
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def digest(path: Path) -> str:
    """sha256 of a file, or of the names, sizes and contents of a folder's files; hidden ones do not count.

    Of a file above 64 MiB its size, both ends and 64 pieces spread evenly count: weights that were trained further
    differ everywhere.
    """
    if path.is_file():
        return _of_file(path).hexdigest()
    found = hashlib.sha256()
    for file in sorted(_files(path)):
        name = file.relative_to(path).as_posix()
        found.update(f"{name}\0{file.stat().st_size}\0{_of_file(file).hexdigest()}\n".encode())
    return found.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _of_file(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256")
        found = hashlib.sha256(str(size).encode())
        for i in range(PIECES):
            file.seek((size - PIECE) * i // (PIECES - 1))
            found.update(file.read(PIECE))
        return found
