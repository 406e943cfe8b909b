"""The low-rank part of the gradient weights, taken out before the weights are squared.

The gram form squares W, and what it squares cancels later: float32 loses digits as (W / scale of the gradients)^2. Most
of W is smooth: in high dimension all distances are alike and W is nearly constant; once classes collapse it is nearly
constant by pairs of classes. W = E + P Q^T with few columns leaves a small E to square, and P Q^T needs no squares:
what it adds to the gradients has rank one in the points for every column and output (``gram.gram_form``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..gemm import matmul_nt, random_signs, symmetrise_

RANK = 16  # columns of the leading part
_ROWS = 256  # rows of W looked at once


@dataclass(frozen=True)
class LowRank:
    """P Q^T for weights W (m, n), shared by evaluation points and centers.

    Where these are the same points, the diagonal of W is free, since a point's weight with itself multiplies
    x - x = 0: it is what P Q^T says, and E's is zero.

    Attributes:
        P: (m, r), of W's dtype.
        Q: (n, r).
        symmetric: evaluation points are the centers; P Q^T is then symmetric.
    """

    P: torch.Tensor
    Q: torch.Tensor
    symmetric: bool

    @property
    def rank(self) -> int:
        """Columns of P and Q."""
        return self.P.shape[1]

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same in another dtype."""
        return LowRank(self.P.to(dtype), self.Q.to(dtype), self.symmetric)

    def diagonal(self) -> torch.Tensor:
        """What the diagonal of W counts as, (n, 1)."""
        return (self.P * self.Q).sum(1, keepdim=True)

    def subtract_(self, W: torch.Tensor) -> torch.Tensor:
        """Overwrite W by E = W - P Q^T, the part that is left."""
        Q = self.Q if self._constant else self.Q.double()
        for row, block in _blocks(W):
            if self._constant:
                block.sub_(self.P[row] * Q[0])
            else:  # P Q^T must not round: errors of W's size may be all that a cancelling alpha leaves
                block.copy_(torch.addmm(block.double(), self.P[row].double(), Q.T, alpha=-1.0))
            if self.symmetric:
                block.diagonal(row.start).zero_()
        return W

    @property
    def _constant(self) -> bool:
        return self.rank == 1 and not self.Q.stride(0)

    def residual_column_norms(self, W: torch.Tensor) -> torch.Tensor:
        """Sums of squares of E's columns to a few digits, float64 (n,); W stays as it is."""
        total = W.new_zeros(W.shape[1], dtype=torch.float64)
        for row, block in _blocks(W):
            E = block - (self.P[row] * self.Q[0] if self._constant else matmul_nt(self.P[row], self.Q))
            if self.symmetric:  # symmetric: rows are columns
                E.diagonal(row.start).zero_()
                total[row] = torch.linalg.vector_norm(E, dim=1).double().square_()
            else:
                total += torch.linalg.vector_norm(E, dim=0).double().square_()
        return total

    def project(self, E: torch.Tensor, P: torch.Tensor | None = None) -> torch.Tensor:
        """E^T P, (n, r), float64; with the P given or its own."""
        P = self.P if P is None else P
        return matmul_nt(E if self.symmetric else E.T, P.T.to(E.dtype).contiguous()).double()


def _blocks(W: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, len(W), _ROWS):
        row = slice(start, min(len(W), start + _ROWS))
        yield row, W[row]


def mean_part(W: torch.Tensor, symmetric: bool) -> LowRank:
    """The mean of W, its diagonal left out where points are their own centers."""
    m, n = W.shape
    pairs = m * n - (m if symmetric else 0)
    mean = W.sum(1).sum(dtype=torch.float64) / max(1, pairs)
    return LowRank(mean.to(W.dtype).expand(m, 1), W.new_ones(1, 1).expand(n, 1), symmetric)


def leading_part(W: torch.Tensor, symmetric: bool, rank: int = RANK) -> LowRank:
    """The leading part of W by subspace iteration: three products with ``rank`` columns.

    The iteration starts with the constant vector and random signs of a fixed seed, and fills the diagonal with the row
    means. It need not converge: whatever it finds is taken out exactly.
    """
    n = W.shape[1]
    signs = random_signs(n, rank, W)
    signs[:, 0] = 1.0
    if not symmetric:
        Q = torch.linalg.qr(W.T @ torch.linalg.qr(W @ signs).Q).Q
        return LowRank(W @ Q, Q, symmetric)
    fill = W.sum(1, keepdim=True).div_(max(1, n - 1))

    def apply(V: torch.Tensor) -> torch.Tensor:
        return matmul_nt(W, V.T).addcmul_(fill, V)

    Q = torch.linalg.qr(apply(torch.linalg.qr(apply(signs)).Q)).Q
    inner = (Q.T @ apply(Q)).double()
    values, vectors = torch.linalg.eigh(symmetrise_(inner))
    Q = Q @ (vectors * values.abs().sqrt()).to(Q.dtype)
    return LowRank(Q * values.sign().to(Q.dtype), Q, symmetric)
