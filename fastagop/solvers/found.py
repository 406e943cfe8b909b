"""What a solver found, the same for every solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastagop.solvers.symmetric_blocks import SymmetricBlocks

RowsAndResidual = tuple[torch.Tensor, torch.Tensor]  # (rows, (k + ridge) alpha - Y of them), k(X, X) in float64
Measure = Callable[[torch.Tensor, torch.Tensor], RowsAndResidual]


@dataclass(frozen=True)
class Found:
    """What a solver found for a system, and how.

    Attributes:
        alpha: coefficients of the points (r, K), float64.
        jitter: what was added to the diagonal beyond the ridge.
        iterations, rank, stopped, tolerance: as in ``solution.Solution``, the rank without rows that were merged.
        dtype: of the factorisation, or of the products of "cg".
        measure: (alpha, Y) -> rows and their residual.
        measured: coefficients and what ``measure`` says of them, where that was computed on the way.
        K: k(X, X) in a matrix's strict upper triangle, or half of it, where it is left.
        method: what ran, where that is not the plan's.
        fallback: why it is not.
    """

    alpha: torch.Tensor
    jitter: float
    iterations: int
    rank: int
    dtype: torch.dtype
    measure: Measure
    measured: tuple[torch.Tensor, RowsAndResidual] | None = None
    K: SymmetricBlocks | torch.Tensor | None = None
    stopped: str = ""
    tolerance: float = 0.0
    method: str = ""
    fallback: str = ""

    def unmet(self, alpha: torch.Tensor, Y: torch.Tensor) -> RowsAndResidual:
        """(rows, (k + ridge) alpha - Y of them) with k(X, X) in float64, of the alpha that is returned."""
        if self.measured is not None and torch.equal(alpha, self.measured[0]):
            return self.measured[1]
        return self.measure(alpha, Y)


def measure_all(matmul: Callable[[torch.Tensor], torch.Tensor]) -> Measure:
    """``Found.measure`` of all rows, for a product alpha -> (k + ridge) alpha."""

    def measure(alpha: torch.Tensor, Y: torch.Tensor) -> RowsAndResidual:
        return torch.arange(len(Y), device=Y.device), matmul(alpha).sub_(Y)

    return measure
