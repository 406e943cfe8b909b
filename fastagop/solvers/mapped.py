"""Matrices in a file that is mapped into memory, of which nothing is left whatever ends the process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastagop.kernels.plan import format_bytes

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def matrices(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, folder: str | Path) -> list[torch.Tensor]:
    """Matrices of the given shapes in a file that has no name in its folder.

    Raises:
        MemoryError: the disk has no room for them.
    """
    sizes = [rows * columns for rows, columns in shapes]
    with tempfile.TemporaryFile(dir=folder, prefix="fastagop-") as file:  # unlinked before it is written
        _reserve(file.fileno(), max(1, sum(sizes)) * dtype.itemsize, folder)
        flat = np.memmap(file, _NUMPY[dtype], "w+", shape=(max(1, sum(sizes)),))
    parts = torch.from_numpy(flat)[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _reserve(file: int, size: int, place: str | Path) -> None:
    """Take a file's bytes on the disk where the system can: to write where a disk is full ends the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that does not know how
            return
        raise MemoryError(
            f"place={os.fspath(place)!r} lacks the {format_bytes(size)} that blocks of the matrix take "
            f"({error.strerror}); give a folder on a larger disk, or fewer points"
        ) from error
