"""Kernel regression and AGOP of some thousand float32 points on the CPU: ``full_refined``, and gradients in float32.

The weights are made with k(X, X), of distances that float64 has. Products with them lose digits where points are near
each other or coefficients large: gradients at a few points in float64 tell what that costs M, and where it is more than
``_LOSS`` the AGOP of larger problems takes over, with k(X, X) as it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fastagop.kernels.gemm import matmul_nt
from fastagop.kernels.profile import Profile
from fastagop.kernels.torch_backend import tiles
from fastagop.solvers import full_refined
from fastagop.solvers.limits import largest
from fastagop.solvers.solution import Solution, Solved

_LOSS = 1e-5  # of M, what is promised; the errors of many points' gradients have no direction in common, M's is less
_POINTS = 32  # with the largest coefficients, and as many others
_USUAL = 2.0**20  # sizes of points and targets within this and its inverse need no unit of their own
_ROWS = 256  # of a block of float64 weights
_FEW = 64  # rows whose kernel values say whether a bandwidth says anything


@dataclass(frozen=True)
class MediumFit:
    """A solved problem of points x (n, d), centred; ``solved`` and ``K`` are as ``Local.solve`` returns them."""

    kernel: Profile
    x: torch.Tensor
    matrices: full_refined.Matrices
    solved: Solved

    @property
    def K(self) -> torch.Tensor:
        """k(X, X) in full."""
        return self.matrices.full()

    def agop(self, center: bool, diagonal: bool) -> torch.Tensor | None:
        """The AGOP (d, d), or its diagonal (d,), float64, summed over the points; None where float32 loses too much."""
        index, exact = self._some()
        for dtype in (torch.float32, torch.float64):
            G = self._gradients(dtype)
            mean = G.mean(0) if center else G.new_zeros(G.shape[1:])
            if _loss(G[index] - mean, exact - mean.double()) <= _LOSS:
                break
        else:
            return None
        G = G.sub_(mean) if center else G
        if diagonal:
            return G.square().sum((0, 1), dtype=torch.float64)
        flat = G.reshape(-1, G.shape[2])
        M = matmul_nt(flat.T, flat.T).double()
        return (M + M.T).mul_(0.5)

    def _gradients(self, dtype: torch.dtype) -> torch.Tensor:
        """Those of the outputs at the points (n, K, d), with products in a dtype."""
        W = self.matrices.W
        assert W is not None
        n, d = self.x.shape
        x, a = self.x.to(dtype), self.solved.alpha.to(dtype)
        beside = torch.cat([x, x.new_ones(n, 1)], 1)  # one product for the sums over x and those of the weights
        right = (a[:, :, None] * beside[:, None, :]).view(n, -1)
        if dtype == torch.float32:
            both = matmul_nt(W, right.T)
        else:
            both = torch.cat([torch.mm(part.double(), right) for part in W.split(_ROWS)])
        both = both.view(n, -1, d + 1)
        return both[:, :, :d].addcmul_(both[:, :, d:], x[:, None, :], value=-1.0)

    def _some(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(some of the points, the gradients there (p, K, d)) in float64, with weights that were not rounded."""
        x, alpha = self.x, self.solved.alpha
        n, count = len(x), min(len(x), _POINTS)
        index = torch.cat([torch.arange(count) * n // count, alpha.abs().amax(1).topk(count)[1]])
        z = x[index]
        W = torch.cat([self.kernel.weight_(sq) for _, sq in tiles.tiles(x, z, 2 * count)])
        G = (W @ (alpha[:, :, None] * x[:, None, :]).view(n, -1)).view(len(z), -1, x.shape[1])
        return index, G.sub_((W @ alpha)[:, :, None] * z[:, None, :])


def _loss(found: torch.Tensor, exact: torch.Tensor) -> float:
    """What errors of gradients (p, K, d) cost the AGOP of their points, of its size."""
    found, exact = (part.double().reshape(-1, part.shape[2]) for part in (found, exact))
    M = exact.T @ exact
    size = float(torch.linalg.matrix_norm(M))
    return float(torch.linalg.matrix_norm(found.T @ found - M)) / size if size > 0 else float("inf")


def bytes_of(X: torch.Tensor, Y: torch.Tensor) -> int:
    """What such a problem takes beyond the points, roughly."""
    (n, d), K = X.shape, Y.shape[1]
    return 24 * n * n + 20 * n * d * (K + 1)


def fit(kernel: Profile, X: torch.Tensor, Y: torch.Tensor, ridge: float, weights: bool) -> MediumFit | None:
    """(k(X, X) + ridge I) alpha = Y for points X (n, d) and targets Y (n, K); None where anything is unusual.

    The caller has seen that ``table.of_full_refined`` holds; ``weights``: an AGOP is wanted.
    """
    start = time.perf_counter()
    y, n = Y.double(), len(X)
    if X.shape[1] == 0 or not all(1.0 / _USUAL <= largest(part) <= _USUAL for part in (X, y)):
        return None
    x = X.double()
    x -= x.mean(0)
    matrices = full_refined.Matrices.of(kernel, x, weights)
    some, eps = matrices.K[:: n // _FEW, :: n // _FEW].tril(), torch.finfo(X.dtype).eps
    if not bool((some.gt(eps) & some.lt(1.0 - 4.0 * eps)).any()):
        return None  # these values are 0 or 1
    found = matrices.solve(y, ridge, torch.float64)
    if found is None:
        return None
    solution = Solution(
        found.alpha, found.residual, ridge, 0.0, "cholesky+cg", torch.float32, found.iterations, n,
        time.perf_counter() - start, tolerance=full_refined.TOLERANCE, residual_rows=n,
    )  # fmt: skip
    return MediumFit(kernel, x, matrices, Solved(solution, found.alpha))
