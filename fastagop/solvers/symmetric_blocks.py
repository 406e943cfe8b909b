"""A symmetric matrix of which every byte counts twice: its lower triangle, in block rows that are contiguous.

Block i holds rows start_i .. stop_i and columns 0 .. stop_i. A column block's update is then one product with a long
inner dimension, and a pass over the matrix reads each block once. Blocks lie on the device that computes, in pinned
host memory beside it, or in a file of which nothing is left whatever ends the process.

In pinned memory a block row lies as square tiles, each without gaps. PyTorch copies those while the host goes on; parts
of wider rows it would gather in pageable memory first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fastagop.kernels import checks
from fastagop.kernels.gemm import LIBRARY, PanelProducts, rows_of, times_few
from fastagop.kernels.memory.matrices import empty_matrix
from fastagop.solvers import mapped, pinned
from fastagop.solvers.staging import Staging

# Rows of a block: products with few rows are slow, and a block's own columns are work beside the one long product. On
# two cores of a Zen 3 (n = 16,000, float32) 512 to 2048 rows factor at 153 to 158 GFLOP/s, where products of this size
# reach 171. By bfloat16 products (a Xeon, n = 20,000) it takes 4.7 s with 768 rows, which one core multiplies, 3.4 with
# 1024, 3.5 with 1536. A GPU wants larger ones and fewer launches.
ROWS = {"cpu": 1024, "cuda": 4096}
# Rows of a triangle by whose inverse, half of it zeros, a float32 panel is multiplied; a larger triangle is halved.
INVERTED = {"cpu": 256, "cuda": 4096}
FILL = 256  # rows that are filled at once: the work beside a block is a few times as much


class SymmetricBlocks:
    """An n x n symmetric matrix by its lower triangle, uninitialised at first.

    Args:
        n: rows.
        dtype: torch.float32 or torch.float64.
        device: that computes.
        rows: of a block; default by device.
        place: where blocks lie: "device"; "host", pinned memory from which a CUDA device streams them; or a folder
            for a memory-mapped file, which has no name there. A device to which blocks are streamed holds two block
            rows in a pass (``Staging``), and in a factorisation one more and a copy of it.

    Attributes:
        count: block rows.
        slices: the rows of each.
        blocks: of block row i the columns up to its own last row, (b, stop_i); in pinned memory their items tile by
            tile.
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
        self._held: Staging | None = None

    def _mine(self, count: int) -> range:
        """The block rows that this process holds."""
        return range(count)

    def _allocate(self, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        if self.place == "device":
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            return [empty_matrix(*shape, like) for shape in shapes]
        if self.place == "host":
            return pinned.matrices(shapes, self.dtype)
        return mapped.matrices(shapes, self.dtype, self.place)

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
        for i, row in enumerate(self.slices):
            there = self._on_device(i, read=False)
            for first in range(0, len(there), FILL):
                part = there[first : first + FILL]
                start = row.start + first
                rows_of(part[:, : start + len(part)], start)
            for first in range(FILL, len(there), FILL):  # what lies above these rows on the diagonal block
                above = there[:first, row.start + first : row.start + first + FILL]
                above.copy_(there[first : first + FILL, row.start : row.start + first].T)
            self._write(i, slice(0, row.stop), there)
        return self

    def apply_(self, change: Callable[[torch.Tensor], object], diagonal: float) -> SymmetricBlocks:
        """Change every item in place, and set the diagonal."""
        for i, row in enumerate(self.slices):
            there = self._on_device(i)
            for part in there.split(FILL):
                change(part)
            there[:, row.start :].fill_diagonal_(diagonal)
            self._write(i, slice(0, row.stop), there)
        return self

    def to(self, dtype: torch.dtype) -> SymmetricBlocks:
        """A copy in another dtype, at the same place."""
        copy = self._like(dtype)
        self._wait()
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
        """(rows, these rows of the matrix with all columns in a dtype), each overwritten by the next.

        The device holds so many rows, or of pinned memory all rows of a block, whose tiles come one by one.
        """
        if self.place == "host":
            for row, block in self._full_rows(dtype):
                for first in range(0, len(block), rows):
                    some = block[first : first + rows]
                    yield slice(row.start + first, row.start + first + len(some)), some
            return
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

    def _full_rows(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows of a block, these with all columns) from pinned memory, each overwritten by the next."""
        buffer = torch.empty(self.rows, self.n, dtype=dtype, device=self.device)
        room = self._room()
        for i, row in enumerate(self.slices):
            out = buffer[: row.stop - row.start]
            for columns, part in self._parts(i, slice(0, row.stop)):
                out[:, columns].copy_(_moved(part, room))
            for j in range(i + 1, len(self.slices)):
                [(_, part)] = self._parts(j, row)
                out[:, self.slices[j]].copy_(_moved(part, room).T)
            yield row, out

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

    def largest_beside_diagonal(self) -> float:
        """The largest item that is not on the diagonal; 0 where none is larger."""
        parts = ((block[:, : row.start], block[:, row.start :].tril(-1)) for row, block in self._streamed())
        return max(float(part.max()) for pair in parts for part in pair if part.numel())

    def cholesky_(self, diagonal: float | torch.Tensor, products: PanelProducts = LIBRARY) -> int:
        """Overwrite the matrix A, with another diagonal, by its factor L, A = L L^T.

        Left-looking: a column block is updated by all that lies left of it in one product for each block row.

        Args:
            diagonal: of the matrix to factor, a number or (n,).
            products: what a float32 factor multiplies by; float64 takes the library's.

        Returns:
            0, or the 1-based index of the first pivot that failed; the blocks are then used up.
        """
        diagonal = checks.tensor(diagonal, torch.float64).expand(self.n)
        products = products if self.dtype == torch.float32 else LIBRARY
        self._wait()
        for i, row in enumerate(self.slices):
            [(_, square)] = self._parts(i, row)
            square.diagonal().copy_(diagonal[row])
        self._held = self._staging() if self._elsewhere else None  # once, since rows of other sizes come between passes
        try:
            for q in range(len(self.blocks)):
                if failed := self._factor_columns(q, products):
                    return failed
        finally:
            self._held = None
        return 0

    def _factor_columns(self, q: int, products: PanelProducts) -> int:
        """Turn column block q into its part of the factor; all that lies left of it is part of it by now.

        Returns:
            0, or the 1-based index of the pivot that failed.
        """
        row = self.slices[q]
        there = self._on_device(q)
        square, done = there[:, row.start :], None
        if row.start:
            done = products.ready(there[:, : row.start], square.diagonal())
            products.subtract_square_(square, done)
        L, info = torch.linalg.cholesky_ex(square)
        if int(info):
            return row.start + int(info)
        square.copy_(L)
        self._write(q, row, square)
        divide_ = self._divisor(L, products)
        for below, wide in self._streamed(q + 1, row.stop):
            panel = wide[:, row.start :]
            if row.start:
                products.subtract_(panel, wide[:, : row.start], done)
            divide_(panel)
            self._write(below.start // self.rows, row, panel)
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
        between = products.ready(L[half:, :half], torch.linalg.vector_norm(L[half:], dim=1).square_())

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

    @property
    def _elsewhere(self) -> bool:
        """Whether the device computes with copies of blocks."""
        return self.place == "host" or (self.place != "device" and self.device.type == "cuda")

    def _parts(self, i: int, columns: slice) -> list[tuple[slice, torch.Tensor]]:
        """(columns, where they lie) of whole tiles of a block row: these in pinned memory, elsewhere all in one."""
        block = self.blocks[i]
        if self.place != "host":
            return [(columns, block[:, columns])]
        b, flat = len(block), block.view(-1)
        starts = range(columns.start, columns.stop, self.rows)
        tiles = [slice(start, min(columns.stop, start + self.rows)) for start in starts]
        return [(tile, flat[b * tile.start : b * tile.stop].view(b, -1)) for tile in tiles]

    def _on_device(self, i: int, read: bool = True) -> torch.Tensor:
        """Block row i, or room for it."""
        if not self._elsewhere:
            return self.blocks[i]
        there = torch.empty(self.blocks[i].shape, dtype=self.dtype, device=self.device)
        if read:
            self._read(i, there, self._room())
        return there

    def _room(self) -> torch.Tensor:
        """Room for a tile, where blocks come by tiles."""
        return torch.empty(self.rows**2 if self.place == "host" else 0, dtype=self.dtype, device=self.device)

    def _read(self, i: int, out: torch.Tensor, room: torch.Tensor) -> None:
        """Copy the first columns of block row i into out, which has no gaps; tiles come into the room for one first."""
        for columns, part in self._parts(i, slice(0, out.shape[1])):
            target = out[:, columns]
            if target.is_contiguous():
                target.copy_(part, non_blocking=True)
            else:
                target.copy_(_moved(part, room))

    def _write(self, i: int, columns: slice, there: torch.Tensor) -> None:
        """Put columns of block row i back; into pinned memory the host does not wait for it."""
        for some, part in self._parts(i, columns):
            if part.data_ptr() != there.data_ptr():
                new = there[:, some.start - columns.start : some.stop - columns.start]
                part.copy_(new, non_blocking=self.place == "host")

    def _wait(self) -> None:
        """Let the host wait for what the device still reads from pinned memory or writes there."""
        if self.place == "host":
            torch.cuda.current_stream(self.device).synchronize()

    def _staging(self) -> Staging:
        return Staging(self.rows * self.n, self._room())

    def _streamed(
        self, first: int = 0, width: int | None = None, backwards: bool = False
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, block) from a block on, on the device: all of its columns, or the first; good until the next one."""
        order = list(range(first, len(self.slices)))
        if backwards:
            order.reverse()
        if not self._elsewhere:
            for i in order:
                yield self.slices[i], self.blocks[i][:, :width]
            return
        coming = [(i, (len(self.blocks[i]), width or self.slices[i].stop)) for i in order]
        for i, block in (self._held or self._staging()).through(coming, self._read):
            yield self.slices[i], block


def _moved(tile: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """A tile in the room for one, on its device."""
    return room[: tile.numel()].view(tile.shape).copy_(tile, non_blocking=True)


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
