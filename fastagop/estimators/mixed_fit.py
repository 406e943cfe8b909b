"""Kernel regression and AGOP of some thousand float32 points on the CPU: ``full_refined``, and gradients in float32.

The weights are made with k(X, X), of distances that float64 has. Products with them lose digits where points are near
each other or coefficients large: gradients at a few points in float64, those among them that may have lost most, tell
what that costs M, and where it is more than ``_LOSS`` the AGOP of larger problems takes over, with k(X, X) as it is.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from fastagop.estimators.rounding import loss_of
from fastagop.kernels.checks import largest
from fastagop.kernels.plan import computed_once
from fastagop.kernels.profile import Profile
from fastagop.kernels.scaling import is_usual
from fastagop.kernels.torch_backend.distance import around_mean, squared_distances, squared_norms
from fastagop.kernels.torch_backend.products import (
    differences_and_losses,
    differences_at_few,
    differences_product,
    outer_products,
)
from fastagop.solvers import full_refined
from fastagop.solvers.limits import tells_points_apart
from fastagop.solvers.solution import Solution, Solved
from fastagop.solvers.solve import scale_targets

SQUARABLE = 2.0**30  # coefficients beyond it, or below its inverse, are scaled: float32 holds their squares then
_LOSS = 1e-5  # of M, what is promised; errors of many points that have no direction in common cost M less
_AT_MOST = 3.0  # times ``_LOSS`` that M may be off by, as points at regular places tell
_OF_SHORT = 3.0  # times ``_LOSS``: what short sums of float32 may mend; beyond it float64 is next
_POINTS = 24  # with the largest coefficients, as many with the largest bounds of rounding, and as many others
_FEW = 64  # rows whose kernel values say whether a bandwidth says anything


@dataclass(frozen=True)
class MixedFit:
    """A solved problem of points x (n, d), centred; ``solved`` and ``K`` are as ``Local.solve`` returns them."""

    kernel: Profile
    x: torch.Tensor
    matrices: full_refined.Matrices
    solved: Solved

    @property
    def K(self) -> torch.Tensor:
        """k(X, X) as a full matrix, from which the AGOP of larger problems goes on."""
        return self.matrices.full()

    def agop(self, center: bool, diagonal: bool) -> torch.Tensor | None:
        """The AGOP (d, d), or its diagonal (d,), float64, summed over the points; None where float32 loses too much."""
        G, losses = self._gradients(torch.float32)
        index = self._telling(losses)
        exact = self._exact(index)
        loss = _loss(G, index, exact, center)
        for dtype, most in ((torch.float32, _OF_SHORT * _LOSS), (torch.float64, math.inf)):
            if _LOSS < loss <= most:
                del G
                G, _ = self._gradients(dtype, short=True)
                loss = _loss(G, index, exact, center)
        if not loss <= _LOSS:
            return None
        M = outer_products(G, center, diagonal=diagonal)
        return M if self._scaled[1] == 1.0 else M.mul_(self._scaled[1]).mul_(self._scaled[1])

    @computed_once
    def _scaled(self) -> tuple[torch.Tensor, float]:
        """(coefficients that gradients are taken of, what they were divided by)."""
        return scale_targets(self.solved.alpha, SQUARABLE)

    def _gradients(self, dtype: torch.dtype, short: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the outputs at the points (n, K, d), with products in a dtype, and what these may lose (n,).

        ``short``: as of ``products.differences_and_losses``.
        """
        W = self.matrices.W
        assert W is not None
        x = self.x.to(dtype)
        return differences_and_losses(W, self._scaled[0].to(dtype), x, x, short)

    def _telling(self, losses: torch.Tensor) -> torch.Tensor:
        """Numbers of the points whose gradients tell what float32 costs, given bounds of it at each (n,)."""
        n = len(self.x)
        count = min(n, _POINTS)
        largest = [values.topk(count)[1] for values in (self.solved.alpha.abs().amax(1), losses)]
        return torch.cat([torch.arange(count, device=losses.device) * n // count, *largest])

    def _exact(self, index: torch.Tensor) -> torch.Tensor:
        """The gradients at some of the points (p, K, d) in float64, with weights that were not rounded."""
        x, z = self.x, self.x[index]
        sq = x.new_empty(len(index), len(x))
        W = self.kernel.weight_(squared_distances(z, x, squared_norms(z), squared_norms(x), sq, index))
        product = differences_at_few if len(index) < x.shape[1] else differences_product
        return product(W, self._scaled[0], x, z)


def _loss(G: torch.Tensor, index: torch.Tensor, exact: torch.Tensor, center: bool) -> float:
    """What errors of gradients G (n, K, d) cost M, by those that are exact at some points; less the mean of all.

    Errors of many points that have a direction in common add up to more than they do at these: ``_AT_MOST`` times as
    much may come of the points at regular places, the first of these, as they stand for all.
    """
    mean = G.mean(0) if center else G.new_zeros(G.shape[1:])
    found, exact = G[index] - mean, exact - mean.double()
    even = min(len(G), _POINTS)
    size = torch.linalg.matrix_norm(_squares(exact))
    change = torch.linalg.matrix_norm(_squares(found[:even]) - _squares(exact[:even])) * (len(G) / even)
    of_all = torch.linalg.matrix_norm(_squares(exact[:even])) * (len(G) / even)
    return max(loss_of(found, exact), float(change / torch.maximum(of_all, size)) / _AT_MOST)


def _squares(g: torch.Tensor) -> torch.Tensor:
    """sum_i sum_c g_ic g_ic^T (d, d) of gradients g (p, K, d), float64."""
    g = g.double().reshape(-1, g.shape[2])
    return g.T @ g


def bytes_of(X: torch.Tensor, Y: torch.Tensor) -> int:
    """Most bytes beyond the points: three matrices and their fill, then gradients that are taken again in float64."""
    (n, d), K = X.shape, Y.shape[1]
    return 16 * n * n + max(8 * n * n, 16 * n * (K * (d + 1) + 2)) + 36 * n * (d + K + 8)


def fit(kernel: Profile, X: torch.Tensor, Y: torch.Tensor, ridge: float, weights: bool) -> MixedFit | str:
    """(k(X, X) + ridge I) alpha = Y for points X (n, d) and targets Y (n, K).

    Where anything is unusual, "", or the words in which a float32 factor gave way.

    The caller has seen that ``table.of_full_refined`` holds; ``weights``: an AGOP is wanted.
    """
    start = time.perf_counter()
    y, n = Y.double(), len(X)
    if X.shape[1] == 0 or not all(is_usual(largest(part)) for part in (X, y)):
        return ""
    x, _ = around_mean(X)
    matrices = full_refined.Matrices.of(kernel, x, weights)
    some, eps = matrices.K[:: n // _FEW, :: n // _FEW].triu(), torch.finfo(X.dtype).eps
    if not tells_points_apart(some, eps):
        return ""
    found = matrices.solve(y, ridge, torch.float64)
    if found is None:
        return full_refined.GAVE_WAY
    solution = Solution(
        found.alpha, found.residual, ridge, 0.0, "cholesky+cg", torch.float32, found.iterations, n,
        time.perf_counter() - start, tolerance=full_refined.TOLERANCE, residual_rows=n,
    )  # fmt: skip
    return MixedFit(kernel, x, matrices, Solved(solution, found.alpha))
