"""Products of a float32 factor that preconditions, in bfloat16 where its rounding is lost beside the pivots.

The trailing matrix of a factorisation shrinks as it goes on: after the leading columns what is left of a kernel matrix
is small but on its diagonal, and products of such columns need few digits. Choosing the digits of each part by its size
is known for covariance matrices (Abdulah, Cao, Pei, Bosilca, Dongarra, Genton, Keyes, Ltaief, Sun 2022). Processors
with tiles for bfloat16 (AMX) multiply six times as fast by them as in float32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..calibration import cpuinfo
from ..gemm import LIBRARY, PanelProducts, subtract_product_

# Of the least pivot: how large rounding may be. On two cores of a Xeon .1 to .3 take one to three steps of conjugate
# gradients more than float32 (images, collapsed classes and random points, n = 10,000), and 1 makes pivots fail.
_SHARE = 0.1
_ROUNDING = torch.finfo(torch.bfloat16).eps / 2
_FEWEST = 256  # columns from which bfloat16 is the faster
# Columns that are multiplied at once: the library packs both factors of a product into memory that it takes anew, which
# the system clears at .5 GB/s on some virtual machines.
_CHUNK = 4096


class _Ready(NamedTuple):
    """Rows of a factor made ready: columns and what they hold, without gaps, in float32 and in bfloat16."""

    fine: list[tuple[slice, torch.Tensor]]
    coarse: list[tuple[slice, torch.Tensor]]


class MixedPanels(PanelProducts):
    """Products in float32, and in bfloat16 by the columns that take little off the diagonal; on the CPU.

    With w_p what part p of the columns takes off the diagonal, a product by these differs by at most eps w_p: in its
    columns' rounding, and in its own, which is bfloat16's as well. Over n rows such errors make a matrix whose norm is
    near sqrt(n) times an item of it. Parts are rounded, from the least w_p on, while this is small beside the pivots.

    Args:
        n: rows of the matrix to factor.
        rows: of its blocks.
        least: an estimate of its least pivot from above, such as its least diagonal less its largest other item.

    Attributes:
        has_rounded: whether any product was in bfloat16.
    """

    note = " by bfloat16 products where their rounding is small"

    def __init__(self, n: int, rows: int, least: float):
        self._n, self._rows, self._least = n, rows, least
        self._width = _FEWEST if rows % _FEWEST == 0 else rows  # of a part
        self.has_rounded, self._rooms = False, dict[str, torch.Tensor]()
        self._sizes = {"left": rows * n, "rows": rows * min(n, _CHUNK), "product": rows * rows}

    @staticmethod
    def bytes_of(n: int, rows: int) -> int:
        """Most bytes that rounded rows and products take, with the library's copies of what it multiplies."""
        return torch.bfloat16.itemsize * rows * (n + 3 * min(n, _CHUNK) + rows)

    def ready(self, A: torch.Tensor, diagonal: torch.Tensor | None = None) -> _Ready:
        """Rows of a factor, each part of them in float32 or bfloat16; without a diagonal all in float32."""
        rounded = [] if diagonal is None or A.shape[1] < _FEWEST else self._small(A, diagonal)
        if not any(rounded):
            return _Ready([(slice(None), LIBRARY.ready(A))], [])
        self.has_rounded, width = True, A.shape[1] // len(rounded)
        fine = [(columns, A[:, columns].contiguous()) for columns in _runs(rounded, False, width)]
        of_block = A.shape[1] < self._rows  # of these several are in use at a time
        room = A.new_empty(A.numel(), dtype=torch.bfloat16) if of_block else self._room("left", A.numel())
        coarse, start = [], 0
        for columns in _runs(rounded, True, width, _CHUNK):
            part = _rounded(A[:, columns], room[start:])
            coarse.append((columns, part))
            start += part.numel()
        return _Ready(fine, coarse)

    def _small(self, A: torch.Tensor, diagonal: torch.Tensor) -> list[bool]:
        """Which parts of A's columns may be rounded; all of them are one where they are not whole parts."""
        width = self._width if A.shape[1] % self._width == 0 else A.shape[1]
        taken = torch.linalg.vector_norm(A.unflatten(1, (-1, width)), dim=2).square_()
        left = min(self._least, float((diagonal - taken.sum(1)).min()))
        allowed = _SHARE * left / (_ROUNDING * math.sqrt(self._n))
        parts = taken.mean(0)
        order = parts.argsort()
        few = (parts[order].cumsum(0) <= allowed).tolist()
        rounded = [False] * len(few)
        for part, small in zip(order.tolist(), few, strict=True):
            rounded[part] = small
        return rounded

    def subtract_(self, C: torch.Tensor, A: torch.Tensor, B: _Ready) -> None:
        """C -= A B^T in place, B ready."""
        for columns, part in B.fine:
            subtract_product_(C, A[:, columns], part)
        for columns, part in B.coarse:
            self._subtract_rounded_(C, _rounded(A[:, columns], self._room("rows", len(A) * part.shape[1])), part)

    def subtract_square_(self, C: torch.Tensor, A: _Ready) -> None:
        """C -= A A^T in place, A ready."""
        for _, part in A.fine:
            LIBRARY.subtract_square_(C, part)
        for _, part in A.coarse:
            self._subtract_rounded_(C, part, part)

    def times_triangle_(self, A: torch.Tensor, T: _Ready) -> None:
        """A <- A T^T in place, T ready and lower triangular."""
        [(_, triangle)] = T.fine
        LIBRARY.times_triangle_(A, triangle)

    def _subtract_rounded_(self, C: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        product = self._room("product", C.numel()).view(C.shape)
        torch.mm(A, B.T, out=product)
        C.sub_(product)

    def _room(self, name: str, items: int) -> torch.Tensor:
        """Uninitialised bfloat16 memory, which the next call with the name overwrites: fresh pages take as long."""
        if name not in self._rooms or len(self._rooms[name]) < items:
            self._rooms[name] = torch.empty(max(items, self._sizes[name]), dtype=torch.bfloat16, device="cpu")
        return self._rooms[name][:items]


def _rounded(A: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """A in bfloat16, written into a room."""
    return room[: A.numel()].view(A.shape).copy_(A)


def _runs(flags: list[bool], wanted: bool, width: int, most: int = 2**62) -> list[slice]:
    """The columns of neighbouring parts with a flag, each of that width; not more than ``most`` in one slice."""
    runs: list[slice] = []
    for part, flag in enumerate(flags):
        if flag is wanted:
            start, stop = part * width, (part + 1) * width
            joined = runs and runs[-1].stop == start and stop - runs[-1].start <= most
            runs.append(slice(runs.pop().start if joined else start, stop))
    return runs


@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 several times as fast as float32, and PyTorch by that."""
    return "amx_bf16" in cpuinfo().get("flags", "").split() and torch.backends.mkldnn.is_available()
