"""Matrices in pinned host memory, from which a CUDA device reads without help.

PyTorch takes pinned memory in powers of two, up to twice of what is asked for: matrices share pieces of such sizes. It
keeps what is freed for tensors of the same size, and to the system that memory is taken until ``give_back``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastagop.kernels.memory import free

Shapes = Sequence[tuple[int, int]]


def matrices(shapes: Shapes, dtype: torch.dtype) -> list[torch.Tensor]:
    """Uninitialised matrices of the given shapes in pinned memory."""
    found = [torch.empty(0, device="cpu")] * len(shapes)
    for piece in _pieces(shapes):
        sizes = [shapes[i][0] * shapes[i][1] for i in piece]
        flat = torch.empty(sum(sizes), dtype=dtype, device="cpu", pin_memory=True)
        for i, part in zip(piece, flat.split(sizes), strict=True):
            found[i] = part.view(shapes[i])
    return found


def bytes_of(shapes: Shapes, dtype: torch.dtype) -> int:
    """Bytes of host memory that matrices of the given shapes take."""
    items = (sum(shapes[i][0] * shapes[i][1] for i in piece) for piece in _pieces(shapes))
    return sum(_power(count * dtype.itemsize) for count in items)


def held_bytes() -> float:
    """Bytes of pinned memory that PyTorch has, used or kept; infinite where a version does not say."""
    if (stats := getattr(torch.cuda, "host_memory_stats", None)) is None:
        return math.inf
    found = stats()  # nothing before CUDA is initialised; the first name is that of earlier versions
    return max(found.get(f"{name}.current", 0) for name in ("reserved_bytes", "allocated_bytes"))


def give_back(device: torch.device) -> None:
    """Return the pinned memory that PyTorch keeps to the system, once the device's copies have ended."""
    private = getattr(torch._C, "_host_emptyCache", None)  # since version 2.5; the public function came later
    empty = getattr(torch.accelerator, "empty_host_cache", private)
    if empty is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)
        empty()
        free.forget()


def _power(size: int) -> int:
    """The smallest power of two that is not below a size."""
    return 1 << max(0, size - 1).bit_length()


def _pieces(shapes: Shapes) -> list[list[int]]:
    """Which matrices share a piece: the largest first, each in the first piece that has room for it."""
    sizes = [rows * columns for rows, columns in shapes]
    piece_size, pieces, used = _power(max(sizes, default=0)), [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((p for p, count in enumerate(used) if count + sizes[i] <= piece_size), len(pieces))
        if place == len(pieces):
            pieces.append([])
            used.append(0)
        pieces[place].append(i)
        used[place] += sizes[i]
    return pieces
