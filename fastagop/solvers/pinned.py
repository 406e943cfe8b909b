"""Matrices in pinned host memory, from which a CUDA device reads without help.

PyTorch takes pinned memory in powers of two, up to twice of what is asked for: matrices share pieces of such sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
