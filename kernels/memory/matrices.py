"""Uninitialised matrices for work within a call, and memory that a fit keeps from one of its steps for the next.

The system clears what it hands out, on virtual machines at .5 GB/s: a third of an RFM's fit to 2000 points was spent
on that. Some of a fit's memory therefore stays with the process for the next fit, as that of the linear algebra's
libraries does.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

WIDE = 16  # items: pointers and strides that are multiples of it are aligned for every load of a GPU kernel
_PAGES = 2**22  # bytes from which NumPy asks the system for huge pages
_PAGE = 2**21  # bytes of a huge page
_LARGE = 2**27  # bytes of a matrix beyond which what is computed takes long, and memory is worth more
_STAYS = 2**26  # bytes that stay with the process between fits
_NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


@dataclass
class _Kept:
    """Buffers and, weakly, the arrays in them that their last users hold."""

    buffers: list[tuple[np.ndarray, weakref.ref]] = field(default_factory=list)

    def take(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """An array in a buffer of its size that nobody uses; where there is none, unused ones are given back first."""
        size = math.prod(shape) * dtype.itemsize
        buffer = next((buffer for buffer in self.unused() if len(buffer) == size), None)
        if buffer is None:
            self.buffers = [pair for pair in self.buffers if pair[1]() is not None]
            buffer = _aligned(size)
        else:
            self.buffers = [pair for pair in self.buffers if pair[0] is not buffer]
        array = buffer.view(dtype).reshape(shape)
        self.buffers.append((buffer, weakref.ref(array)))
        return array

    def unused(self) -> list[np.ndarray]:
        """The buffers that nobody uses."""
        return [buffer for buffer, user in self.buffers if user() is None]


class _OfThread(threading.local):
    """What a thread keeps. A context variable's value would go along to threads that copy the context."""

    kept: _Kept | None = None


_GONE = weakref.ref(_Kept())  # of a user that is no more
_here = _OfThread()
_spare: list[np.ndarray] = []  # what stays between fits; items come and go one at a time, whichever thread asks


@contextlib.contextmanager
def kept_matrices() -> Iterator[None]:
    """Within it, in this thread, memory of CPU matrices that are gone serves the next ones of their size."""
    if _here.kept is not None:
        yield
        return
    kept = _Kept()
    with contextlib.suppress(IndexError):
        while True:
            kept.buffers.append((_spare.pop(), _GONE))
    _here.kept = kept
    try:
        yield
    finally:
        _here.kept = None
        left = _STAYS - sum(map(len, _spare))
        for buffer in kept.unused():
            if len(buffer) <= left:
                _spare.append(buffer)
                left -= len(buffer)


def give_back() -> None:
    """Give back what stays between fits."""
    _spare.clear()


def empty_matrix(rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised matrix for work within a call, on a tensor's device.

    On the CPU a large one is NumPy's, which asks for huge pages: the system hands those out hundreds of times faster
    than small ones, and products read them faster. Elsewhere its rows lie as far apart as ``wide_rows`` says.
    """
    dtype = dtype or like.dtype
    if like.device.type != "cpu":
        return wide_rows(rows, columns, like, dtype)
    size = rows * columns * dtype.itemsize
    if size < _PAGES:
        return like.new_empty(rows, columns, dtype=dtype)
    kept = _here.kept if size <= _LARGE else None
    make = np.empty if kept is None else kept.take
    return torch.from_numpy(make((rows, columns), _NUMPY[dtype]))


def _aligned(size: int) -> np.ndarray:
    """Uninitialised bytes from the start of a huge page on, and up to a page more than that.

    What malloc hands out starts 16 bytes into a small page: wide loads meet two cache lines each, and what lies before
    the first huge page is hundreds of small ones. An RFM's fit to 2000 points takes a few hundredths less time so. Many
    blocks of one matrix would take too many pages more.
    """
    room = np.empty(size + _PAGE, np.uint8)
    start = -room.ctypes.data % _PAGE
    return room[start : start + size]


def wide_rows(rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised matrix with rows a multiple of 16 items apart, so that GPU kernels load 16 bytes at once."""
    apart = -(-columns // WIDE) * WIDE
    return like.new_empty(rows, apart, dtype=dtype or like.dtype)[:, :columns]
