"""A symmetric matrix of which every byte counts twice: its lower triangle, in block rows that are contiguous.

Block i holds rows start_i .. stop_i and columns 0 .. stop_i. A column block's update is then one product with a long
inner dimension, and a pass over the matrix reads each block once. Blocks lie on the device that computes, in pinned
host memory beside it, or in a file of which nothing is left whatever ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastagop.kernels.gemm import LIBRARY, PanelProducts, rows_of, times_few
from fastagop.kernels.plan import empty_matrix
from fastagop.solvers import pinned

# Rows of a block: products with few rows are slow, and a block's own columns are work beside the one long product. On
# two cores of a Zen 3 (n = 16,000, float32) 512 to 2048 rows factor at 153 to 158 GFLOP/s, 768 at 158, where products
# of this size reach 171; a GPU wants larger ones and fewer launches.
ROWS = {"cpu": 768, "cuda": 4096}
# Rows of a triangle by whose inverse, half of it zeros, a float32 panel is multiplied; a larger triangle is halved.
INVERTED = {"cpu": 192, "cuda": 4096}
FILL = 256  # rows that are filled at once: the work beside a block is a few times as much
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class SymmetricBlocks:
    """An n x n symmetric matrix by its lower triangle, uninitialised at first.

    Args:
        n: rows.
        dtype: torch.float32 or torch.float64.
        device: that computes.
        rows: of a block; default by device.
        place: where blocks lie: "device"; "host", pinned memory from which a CUDA device streams them; or a folder
            for a memory-mapped file, which has no name there.

    Attributes:
        count: block rows.
        slices: the rows of each.
        blocks: of block row i the columns up to its own last row, (b, stop_i).
    """

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rows: int | None = None,
        place: str | Path = "device",
    ) -> None:
        self.n, self.dtype, self.device, self.place = n, dtype, torch.device(device), place
        self.rows = max(1, min(n, rows or default_rows(n, self.device)))
        self.count = -(-n // self.rows)
        self.slices = [slice(q * self.rows, min(n, (q + 1) * self.rows)) for q in self._mine(self.count)]
        self.blocks = self._allocate([(row.stop - row.start, row.stop) for row in self.slices])

    def _mine(self, count: int) -> range:
        """The block rows that this process holds."""
        return range(count)

    def _allocate(self, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        if self.place == "device":
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            return [empty_matrix(*shape, like) for shape in shapes]
        if self.place == "host":
            return pinned.matrices(shapes, self.dtype)
        sizes = [rows * columns for rows, columns in shapes]
        with tempfile.TemporaryFile(dir=self.place, prefix="fastagop-") as file:  # unlinked before it is written
            flat = np.memmap(file, _NUMPY[self.dtype], "w+", shape=(max(1, sum(sizes)),))
        parts = torch.from_numpy(flat)[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def __len__(self) -> int:
        return self.n

    @property
    def bytes(self) -> int:
        """Bytes that the stored blocks take."""
        return sum(block.numel() for block in self.blocks) * self.dtype.itemsize

    def drop(self) -> None:
        """Give the memory of the blocks back."""
        self.blocks.clear()
        if self.place == "host":
            pinned.give_back(self.device)

    def fill_(self, rows_of: Callable[[torch.Tensor, int], object]) -> SymmetricBlocks:
        """Write the matrix: rows_of(out, start) writes rows start .. of it, up to their own last column, into out."""
        for row, block in zip(self.slices, self.blocks, strict=True):
            there = self._on_device(block, read=False)
            for first in range(0, len(block), FILL):
                part = there[first : first + FILL]
                start = row.start + first
                rows_of(part[:, : start + len(part)], start)
            for first in range(FILL, len(block), FILL):  # what lies above these rows on the diagonal block
                above = there[:first, row.start + first : row.start + first + FILL]
                above.copy_(there[first : first + FILL, row.start : row.start + first].T)
            self._write(block, there)
        return self

    def apply_(self, change: Callable[[torch.Tensor], object], diagonal: float) -> SymmetricBlocks:
        """Change every item in place, and set the diagonal."""
        for row, block in zip(self.slices, self.blocks, strict=True):
            there = self._on_device(block)
            for part in there.split(FILL):
                change(part)
            there[:, row.start :].fill_diagonal_(diagonal)
            self._write(block, there)
        return self

    def to(self, dtype: torch.dtype) -> SymmetricBlocks:
        """A copy in another dtype, at the same place."""
        copy = self._like(dtype)
        for mine, other in zip(self.blocks, copy.blocks, strict=True):
            other.copy_(mine)
        return copy

    def _like(self, dtype: torch.dtype) -> SymmetricBlocks:
        return SymmetricBlocks(self.n, dtype, self.device, self.rows, self.place)

    def full(self) -> torch.Tensor:
        """The matrix with both triangles, (n, n)."""
        out = empty_matrix(self.n, self.n, torch.empty(0, dtype=self.dtype, device=self.device))
        for row, block in self._streamed():
            out[row, : row.stop].copy_(block)
            out[: row.start, row].copy_(block[:, : row.start].T)
        return out

    def row_tiles(self, rows: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, these rows of the matrix with all columns in a dtype), each overwritten by the next."""
        buffer = torch.empty(min(rows, self.rows), self.n, dtype=dtype, device=self.device)
        for i, (row, block) in enumerate(zip(self.slices, self.blocks, strict=True)):
            for first in range(0, len(block), rows):
                some = slice(first, min(len(block), first + rows))
                tile = buffer[: some.stop - some.start]
                tile[:, : row.stop].copy_(block[some])
                inside = slice(row.start + some.start, row.start + some.stop)
                for below, other in zip(self.slices[i + 1 :], self.blocks[i + 1 :], strict=True):
                    tile[:, below].copy_(other[:, inside].T)
                yield inside, tile

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """The matrix times V (n, p), of its dtype: one pass over the blocks for all columns of V.

        V's columns lie as rows: a pass for ten of them takes half of the time then (n = 20,000).
        """
        R = rows_of(V)
        out = torch.zeros_like(R)
        for row, block in self._streamed():
            out[:, row] += times_few(block, R[:, : row.stop])
            if row.start:
                out[:, : row.start].addmm_(R[:, row], block[:, : row.start])
        return out[: V.shape[1]].T.contiguous()

    def largest_row_sum(self) -> float:
        """The largest sum of a row of the matrix."""
        return float(self.matmul(torch.ones(self.n, 1, dtype=self.dtype, device=self.device)).max())

    def cholesky_(self, diagonal: float | torch.Tensor, products: PanelProducts = LIBRARY) -> int:
        """Overwrite the matrix A, with another diagonal, by its factor L, A = L L^T.

        Left-looking: a column block is updated by all that lies left of it in one product for each block row.

        Args:
            diagonal: of the matrix to factor, a number or (n,).
            products: what a float32 factor multiplies by; float64 takes the library's.

        Returns:
            0, or the 1-based index of the first pivot that failed; the blocks are then used up.
        """
        diagonal = torch.as_tensor(diagonal, dtype=torch.float64).expand(self.n)
        products = products if self.dtype == torch.float32 else LIBRARY
        for row, block in zip(self.slices, self.blocks, strict=True):
            block[:, row].diagonal().copy_(diagonal[row])
        for q in range(len(self.blocks)):
            if failed := self._factor_columns(q, products):
                return failed
        return 0

    def _factor_columns(self, q: int, products: PanelProducts) -> int:
        """Turn column block q into its part of the factor; all that lies left of it is part of it by now.

        Returns:
            0, or the 1-based index of the pivot that failed.
        """
        row = self.slices[q]
        there = self._on_device(self.blocks[q])
        square, done = there[:, row.start :], None
        if row.start:
            done = products.ready(there[:, : row.start])
            products.subtract_square_(square, done)
        L, info = torch.linalg.cholesky_ex(square)
        if int(info):
            return row.start + int(info)
        square.copy_(L)
        self._write(self.blocks[q][:, row.start :], square)
        divide_ = self._divisor(L, products)
        for below, wide in self._streamed(q + 1, slice(0, row.stop)):
            panel = wide[:, row.start :]
            if row.start:
                products.subtract_(panel, wide[:, : row.start], done)
            divide_(panel)
            self._write(self.blocks[below.start // self.rows][:, row], panel)
        return 0

    def _divisor(self, L: torch.Tensor, products: PanelProducts = LIBRARY) -> Callable[[torch.Tensor], object]:
        """Panel <- panel L^-T. In float32, where the factor preconditions only, by products with inverses of parts."""
        if self.dtype == torch.float64:
            return lambda panel: panel.copy_(torch.linalg.solve_triangular(L.mT, panel, upper=True, left=False))
        if len(L) <= INVERTED[self.device.type]:
            inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
            triangle = products.ready(inverse)
            return lambda panel: products.times_triangle_(panel, triangle)
        half = -(-len(L) // 2)
        first, second = self._divisor(L[:half, :half], products), self._divisor(L[half:, half:], products)
        between = products.ready(L[half:, :half])

        def divide_(panel: torch.Tensor) -> None:
            first(panel[:, :half])
            products.subtract_(panel[:, half:], panel[:, :half], between)
            second(panel[:, half:])

        return divide_

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """(L L^T)^-1 B for the factor L that the blocks hold; two passes over them for all columns of B."""
        X = rows_of(B)  # as in ``matmul``
        for row, block in self._streamed():
            if row.start:
                X[:, row] -= times_few(block[:, : row.start], X[:, : row.start])
            X[:, row] = _divided(block[:, row.start :], X[:, row], transposed=False)
        for row, block in self._streamed(backwards=True):
            X[:, row] = _divided(block[:, row.start :], X[:, row], transposed=True)
            if row.start:
                X[:, : row.start].addmm_(X[:, row], block[:, : row.start], alpha=-1.0)
        return X[: B.shape[1]].T.contiguous()

    # ---- Where blocks lie elsewhere than on the device that computes, they come to it and go back.

    def _on_device(self, block: torch.Tensor, read: bool = True) -> torch.Tensor:
        if block.device == self.device:
            return block
        return block.to(self.device, non_blocking=True) if read else torch.empty_like(block, device=self.device)

    def _write(self, block: torch.Tensor, there: torch.Tensor) -> None:
        if block.data_ptr() != there.data_ptr():
            block.copy_(there)

    @functools.cached_property
    def _side(self) -> torch.cuda.Stream:
        """The stream on which blocks come: one, since a stream's memory is of no use to another one."""
        return torch.cuda.Stream(self.device)

    def _streamed(
        self, first: int = 0, columns: slice = slice(None), backwards: bool = False
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, block) from a block on, on the device, the next one on its way while this one is worked on."""
        order = list(range(first, len(self.slices)))
        if backwards:
            order.reverse()
        if self.device.type != "cuda" or self.place == "device":
            for i in order:
                yield self.slices[i], self._on_device(self.blocks[i][:, columns])
            return
        side = self._side
        ahead: list[torch.Tensor] = []

        def fetch(i: int) -> None:
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                ahead.append(self._on_device(self.blocks[i][:, columns]))

        if order:
            fetch(order[0])
        for place, i in enumerate(order):
            torch.cuda.current_stream(self.device).wait_stream(side)
            block = ahead.pop()
            block.record_stream(torch.cuda.current_stream(self.device))
            with contextlib.suppress(IndexError):
                fetch(order[place + 1])
            yield self.slices[i], block


def _divided(L: torch.Tensor, X: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """(L^-1 X^T)^T, or with L^T; without gaps in both LAPACK takes an eighth of the time."""
    L = L.contiguous()
    return torch.linalg.solve_triangular(L.mT if transposed else L, X.T.contiguous(), upper=transposed).T


def default_rows(n: int, device: torch.device) -> int:
    """Rows of a block: an eighth of a small matrix at most, so that half of it is nearly half of its bytes."""
    return max(1, min(ROWS["cuda" if device.type == "cuda" else "cpu"], -(-n // 8)))


def shapes_of(n: int, rows: int) -> list[tuple[int, int]]:
    """(rows, columns) of the blocks of an n x n matrix."""
    return [(min(n, i + rows) - i, min(n, i + rows)) for i in range(0, n, max(1, rows))]


def half_bytes(n: int, dtype: torch.dtype, rows: int) -> int:
    """Bytes of the blocks of an n x n matrix."""
    return dtype.itemsize * sum(rows * columns for rows, columns in shapes_of(n, rows))
