"""Half of a symmetric matrix whose block rows are dealt out to ranks in turn, and how its factor is shared.

The first rank runs the solver; what it asks of the matrix every rank does with its own block rows. A column block is
factored by its owner and sent to all while they update theirs by the one before: one block row travels ahead. A
factorisation sends every block row once, 4 n^2 bytes in float64; a solve two (b, K) blocks a block row; a product its
factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastagop.distributed.communicator import Communicator
from fastagop.kernels import checks
from fastagop.kernels.gemm import LIBRARY, PanelProducts, subtract_product_
from fastagop.solvers.symmetric_blocks import SymmetricBlocks

_DTYPES = (torch.float64, torch.float32)
_FILL, _COPY, _DROP, _PRODUCT, _FACTOR, _SOLVE = range(6)  # of these ``_SOLVE`` has the numbers ``MEETING``
_FIRST = -1  # numbers of these requests go down from here; those of other products are positive
_FAILED = -1.0  # in place of the pivot that fails, of a rank that could not make its block row


class SharedBlocks(SymmetricBlocks):
    """This rank's block rows of the matrix: ``mine`` of all; every rank calls ``cholesky_`` and ``solve`` together.

    ``matmul`` gives what these block rows contribute.
    """

    def __init__(self, n: int, dtype: torch.dtype, ranks: Communicator, rows: int | None = None):
        self.ranks = ranks
        super().__init__(n, dtype, ranks.device, rows)

    def _mine(self, count: int) -> range:
        return range(self.ranks.rank, count, self.ranks.size)

    def _like(self, dtype: torch.dtype) -> SharedBlocks:
        return SharedBlocks(self.n, dtype, self.ranks, self.rows)

    def _span(self, q: int) -> slice:
        return slice(q * self.rows, min(self.n, (q + 1) * self.rows))

    def cholesky_(self, diagonal: float | torch.Tensor, products: PanelProducts = LIBRARY) -> int:
        """As ``SymmetricBlocks.cholesky_``, by the library's products; all ranks are told of the pivot that fails.

        Raises:
            Exception: what failed on this rank, which takes part to the end. RuntimeError: another rank has failed.
        """
        self._error: Exception | None = None
        diagonal = checks.tensor(diagonal, torch.float64).expand(self.n)
        mine = dict(zip(self._mine(self.count), self.blocks, strict=True))
        sent = self._send(0, mine, diagonal)
        for q in range(self.count):
            head, work = sent
            self.ranks.wait(work)
            row = self._span(q)
            if failed := int(head[-1, 0]):
                if failed == _FAILED:
                    raise self._error or RuntimeError(f"rank {q % self.ranks.size} could not make its part of a factor")
                return row.start + failed
            done, L = head[:-1, : row.start].to(self.device), head[:-1, row.start :].to(self.device)
            divide_ = self._divisor(L.contiguous())
            if q + 1 < self.count and q + 1 not in mine:  # it comes while this rank's rows are updated
                sent = self._send(q + 1, mine, diagonal)
            for p in sorted(p for p in mine if p > q):
                try:
                    panel = mine[p][:, row]
                    if row.start:
                        subtract_product_(panel, mine[p][:, : row.start], done)
                    divide_(panel)
                except Exception as error:  # raised when the other ranks know
                    self._error = self._error or error
                if p == q + 1:
                    sent = self._send(p, mine, diagonal)
        if self._error is not None:
            raise self._error
        return 0

    def _send(self, q: int, mine: dict[int, torch.Tensor], diagonal: torch.Tensor):
        """(block row q, factored by its owner, with the pivot that failed in a row of its own; the pending work)."""
        row = self._span(q)
        message = torch.zeros(row.stop - row.start + 1, row.stop, dtype=self.dtype, device=self.ranks.wire)
        if q in mine:
            try:
                message[-1] = self._factor(mine[q], diagonal[row])
            except Exception as error:  # raised when the other ranks know
                self._error = self._error or error
            if self._error is not None:
                message[-1] = _FAILED
            message[:-1].copy_(mine[q])
        return message, self.ranks.send(message, q % self.ranks.size)

    def _factor(self, block: torch.Tensor, diagonal: torch.Tensor) -> float:
        """Factor the square at the end of a block row, given its diagonal; 0, or which pivot failed."""
        before = block.shape[1] - len(block)
        square = block[:, before:]
        square.diagonal().copy_(diagonal)
        if before:
            LIBRARY.subtract_square_(square, LIBRARY.ready(block[:, :before]))
        L, info = torch.linalg.cholesky_ex(square)
        square.copy_(L)
        return float(info)

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """This rank's rows of (L L^T)^-1 B, zero elsewhere; B is the same on every rank."""
        X, beyond = B.clone(), torch.zeros_like(B)
        mine = dict(zip(self._mine(self.count), self.blocks, strict=True))
        for q in range(self.count):
            row = self._span(q)
            part = X[row].clone()
            if q in mine:
                part.addmm_(mine[q][:, : row.start], X[: row.start], alpha=-1.0)
                part = torch.linalg.solve_triangular(mine[q][:, row.start :], part, upper=False)
            X[row] = self.ranks.broadcast(part, q % self.ranks.size)
        for q in reversed(range(self.count)):
            row = self._span(q)
            part = X[row] - self.ranks.total(beyond[row])
            X[row] = 0.0
            if q in mine:
                X[row] = torch.linalg.solve_triangular(mine[q][:, row.start :].mT, part, upper=True)
                beyond[: row.start].addmm_(mine[q][:, : row.start].T, X[row])
        return X


class RankBlocks:
    """What a rank holds of the matrices of a solve, and does when the first rank asks.

    Args:
        n: rows of the matrix.
        ranks: the group.
        fill: writes k(X, X) into blocks.
    """

    def __init__(self, n: int, ranks: Communicator, fill: Callable[[SymmetricBlocks], SymmetricBlocks]):
        self.n, self.ranks, self.fill, self.held = n, ranks, fill, {}

    def answer(self, V: torch.Tensor, number: int) -> torch.Tensor:
        """This rank's part of the answer to a request, float64."""
        what, which = divmod(_FIRST - number, 2)
        dtype, nothing = _DTYPES[which], torch.zeros_like(V)
        if what == _FILL:
            self.held[dtype] = self.fill(self.held.get(dtype) or SharedBlocks(self.n, dtype, self.ranks))
            return nothing
        if what == _COPY:
            self.held[dtype] = self.held[_DTYPES[1 - which]].to(dtype)
            return nothing
        if what == _DROP:
            self.held.pop(dtype, None)
            return nothing
        blocks = self.held[dtype]
        if what == _FACTOR:
            failed = blocks.cholesky_(V[:, 0])
            nothing[0] = failed if self.ranks.rank == 0 else 0
            return nothing
        V = V.to(dtype)
        return (blocks.matmul(V) if what == _PRODUCT else blocks.solve(V)).double()


class AskedBlocks:
    """A matrix that ranks hold in ``RankBlocks``, as the solver on the first rank sees it.

    It has what solvers ask of ``SymmetricBlocks``.
    """

    def __init__(self, n: int, dtype: torch.dtype, request: Callable[[torch.Tensor, int], torch.Tensor], device):
        self.n, self.dtype, self.request, self.device = n, dtype, request, device

    def __len__(self) -> int:
        return self.n

    def _ask(self, what: int, V: torch.Tensor | None = None) -> torch.Tensor:
        V = torch.zeros(1, 1, dtype=torch.float64, device=self.device) if V is None else V
        return self.request(V.double(), _FIRST - 2 * what - _DTYPES.index(self.dtype))

    def fill_(self, rows_of: object) -> AskedBlocks:
        """k(X, X), which every rank knows how to write."""
        self._ask(_FILL)
        return self

    def to(self, dtype: torch.dtype) -> AskedBlocks:
        """A copy in another dtype."""
        copy = AskedBlocks(self.n, dtype, self.request, self.device)
        copy._ask(_COPY)
        return copy

    def drop(self) -> None:
        """Give its memory back."""
        self._ask(_DROP)

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """The matrix times V."""
        return self._ask(_PRODUCT, V).to(V.dtype)

    def largest_row_sum(self) -> float:
        """max_i sum_j A_ij."""
        return float(self.matmul(torch.ones(self.n, 1, dtype=torch.float64, device=self.device)).max())

    def cholesky_(self, diagonal: float | torch.Tensor, products: PanelProducts = LIBRARY) -> int:
        """Factor with a diagonal by the library's products; 0, or which pivot failed."""
        diagonal = torch.as_tensor(diagonal, dtype=torch.float64, device=self.device).expand(self.n)
        return int(self._ask(_FACTOR, diagonal[:, None])[0])

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """(L L^T)^-1 B."""
        return self._ask(_SOLVE, B).to(B.dtype)
