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


class _Ready(NamedTuple):
    """Rows of a factor made ready: (columns, these without gaps) in float32, and the other columns in bfloat16."""

    fine: list[tuple[slice, torch.Tensor]]
    coarse: list[slice]
    rounded: torch.Tensor | None


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

    def ready(self, A: torch.Tensor, diagonal: torch.Tensor | None = None) -> _Ready:
        """Rows of a factor, each part of them in float32 or bfloat16; without a diagonal all in float32."""
        rounded = [] if diagonal is None or A.shape[1] < _FEWEST else self._rounded(A, diagonal)
        if not any(rounded):
            return _Ready([(slice(None), LIBRARY.ready(A))], [], None)
        self.has_rounded, width = True, A.shape[1] // len(rounded)
        fine = [(columns, A[:, columns].contiguous()) for columns in _runs(rounded, False, width)]
        coarse = _runs(rounded, True, width)
        left = A.shape[1] >= self._rows  # of a block: one such is in use at a time, but several parts of its square
        return _Ready(fine, coarse, self._in_bfloat16(A, coarse, "left" if left else None))

    def _rounded(self, A: torch.Tensor, diagonal: torch.Tensor) -> list[bool]:
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
        if B.rounded is not None:
            self._subtract_rounded_(C, self._in_bfloat16(A, B.coarse, "rows"), B.rounded)

    def subtract_square_(self, C: torch.Tensor, A: _Ready) -> None:
        """C -= A A^T in place, A ready."""
        for _, part in A.fine:
            LIBRARY.subtract_square_(C, part)
        if A.rounded is not None:
            self._subtract_rounded_(C, A.rounded, A.rounded)

    def times_triangle_(self, A: torch.Tensor, T: _Ready) -> None:
        """A <- A T^T in place, T ready and lower triangular."""
        [(_, triangle)] = T.fine
        LIBRARY.times_triangle_(A, triangle)

    def _subtract_rounded_(self, C: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        product = self._room("product", len(A), len(B))
        torch.mm(A, B.T, out=product)
        C.sub_(product)

    def _in_bfloat16(self, A: torch.Tensor, columns: list[slice], room: str | None) -> torch.Tensor:
        """Columns of A beside each other, in the room of that name or in memory of their own."""
        wide = sum(some.stop - some.start for some in columns)
        out = A.new_empty(len(A), wide, dtype=torch.bfloat16) if room is None else self._room(room, len(A), wide)
        start = 0
        for some in columns:
            stop = start + some.stop - some.start
            out[:, start:stop].copy_(A[:, some])
            start = stop
        return out

    def _room(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Uninitialised bfloat16 memory, which the next call with the name overwrites: fresh pages take as long."""
        if name not in self._rooms or self._rooms[name].numel() < rows * columns:
            self._rooms[name] = torch.empty(rows * columns, dtype=torch.bfloat16, device="cpu")
        return self._rooms[name][: rows * columns].view(rows, columns)


def _runs(flags: list[bool], wanted: bool, width: int) -> list[slice]:
    """The columns of neighbouring parts with a flag, each of that width."""
    runs: list[slice] = []
    for part, flag in enumerate(flags):
        if flag is wanted:
            first = runs.pop().start if runs and runs[-1].stop == part * width else part * width
            runs.append(slice(first, (part + 1) * width))
    return runs


@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 several times as fast as float32, and PyTorch by that."""
    return "amx_bf16" in cpuinfo().get("flags", "").split() and torch.backends.mkldnn.is_available()
