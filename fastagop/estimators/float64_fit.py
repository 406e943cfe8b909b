"""Kernel regression and AGOP of a few hundred float32 points on the CPU, in float64 and in as few steps as that takes.

In float64, products lose about eps |x| / r of a term, 1e-9 where r is the least distance that float32 points can have,
so the two forms of larger problems and their near pairs need no choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastagop.kernels import checks
from fastagop.kernels.profile import Profile
from fastagop.kernels.torch_backend.products import differences_product, outer_products
from fastagop.solvers import float64_small
from fastagop.solvers.solution import Solved

_WORK = 3e8  # operations at most: a few milliseconds


@dataclass(frozen=True)
class Float64Fit:
    """A solved problem of a kernel; ``solved`` is what ``kernel_ridge.solve`` returns."""

    kernel: Profile
    found: float64_small.SmallSolve

    @property
    def solved(self) -> Solved:
        """The solution, alpha in float64."""
        return self.found.solved

    def agop(self, center: bool, diagonal: bool) -> torch.Tensor | None:
        """The AGOP (d, d), or its diagonal (d,), summed over the points; None where it leaves float64."""
        x = self.found.x
        W = self.kernel.weight_beside_(self.found.sq.clone(), self.found.A)  # A's ridge is where r = 0, and w with it
        M = outer_products(differences_product(W, self.solved.alpha, x, x), center, diagonal=diagonal)
        return M if checks.finite(M) else None


def bytes_of(X: torch.Tensor, Y: torch.Tensor) -> int:
    """What a small problem takes beyond the points, roughly."""
    (n, d), K = X.shape, Y.shape[1]
    return 8 * (6 * n * n + 3 * n * d * K + 2 * n * d + d * d)


def fit(kernel: Profile, X: torch.Tensor, Y: torch.Tensor, ridge: float) -> Float64Fit | None:
    """(k(X, X) + ridge I) alpha = Y for points X (n, d) and targets Y (n, K); None where it is not a small problem."""
    (n, d), K = X.shape, Y.shape[1]
    if X.dtype != torch.float32 or 2.0 * n * n * d * (K + 1) + n**3 + 2.0 * n * K * d * d > _WORK:
        return None
    found = float64_small.solve(kernel, X, Y, ridge, torch.float64, rounded=True)
    return None if found is None else Float64Fit(kernel, found)
