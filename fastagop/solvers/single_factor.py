"""A float32 factor of a symmetric matrix in one piece on the CPU, which preconditions or is refined."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastagop import linalg
from fastagop.kernels.gemm import favours_onednn

# Rows from which blocks and oneDNN's products are faster than LAPACK (two cores of a Zen 5: 2.7 ms by either at 1000
# rows, 13 instead of 17 at 2000, 118 instead of 202 at 4500).
_BY_BLOCKS = 1200


@dataclass(frozen=True)
class Factor:
    """A triangle T (n, n) with T T^T = A, lower by columns or ``upper`` by rows; the other triangle does not count."""

    T: torch.Tensor
    upper: bool

    def solve(self, R: torch.Tensor) -> torch.Tensor:
        """A^-1 R for R (n, K); for few columns in a fraction of the time that LAPACK's solver takes."""
        half = torch.linalg.solve_triangular(self.T, R, upper=self.upper)
        return torch.linalg.solve_triangular(self.T.mT, half, upper=not self.upper)


def factor_(A: torch.Tensor) -> Factor | None:
    """The factor of A, contiguous, float32, of which the upper triangle is read; it lies in A's memory.

    None where a pivot fails. LAPACK works by columns: A's rows are those of its transpose, whose lower triangle it
    turns into the factor in place.
    """
    if len(A) >= _BY_BLOCKS and favours_onednn():
        return None if linalg.cholesky_upper_(A) else Factor(A, upper=True)
    L, failed = A.mT, torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(L, out=(L, failed))
    return None if int(failed) else Factor(L, upper=False)
