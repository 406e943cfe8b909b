"""Kernel regression and AGOP of a few hundred float32 points on the CPU, in float64 and in as few steps as that takes.

What larger problems plan, estimate and guard against costs more than such a problem itself. In float64, products lose
about eps |x| / r of a term, 1e-9 where r is the least distance that float32 points can have, so the two forms and the
near pairs of larger problems need no choice. Whatever is out of the ordinary (a failed pivot, coefficients that grow,
numbers of unusual size, a bandwidth that says nothing) is left to ``kernel_ridge``, which reports it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastagop.kernels.profile import Profile
from fastagop.solvers.limits import bound, largest, relative
from fastagop.solvers.solution import Solution, Solved

_POINTS = 512  # at most
_WORK = 3e8  # operations at most: a few milliseconds
_USUAL = 2.0**20  # sizes of points and targets within this and its inverse need no unit of their own


@dataclass(frozen=True)
class SmallFit:
    """A solved problem.

    Attributes:
        solved: what ``kernel_ridge.solve`` returns.
        kernel, x: the kernel and the points, float64.
        sq: their squared distances.
    """

    solved: Solved
    kernel: Profile
    x: torch.Tensor
    sq: torch.Tensor

    def agop(self, center: bool, diagonal: bool) -> torch.Tensor | None:
        """The AGOP (d, d), or its diagonal (d,), summed over the points; None where it leaves float64's usual sizes."""
        x, alpha = self.x, self.solved.alpha
        n, d = x.shape
        W = self.kernel.weight_(self.sq.clone())
        G = torch.mm(W, (alpha[:, :, None] * x[:, None, :]).view(n, -1)).view(n, -1, d)
        G.addcmul_((W @ alpha)[:, :, None], x[:, None, :], value=-1.0)
        if center:
            G -= G.mean(0)
        flat = G.view(-1, d)
        M = flat.square().sum(0) if diagonal else flat.T @ flat
        return M if bool(M.isfinite().all()) else None


def fit(kernel: Profile, X: torch.Tensor, Y: torch.Tensor, ridge: float) -> SmallFit | None:
    """(k(X, X) + ridge I) alpha = Y for points X (n, d) and targets Y (n, K); None where it is not a small problem."""
    start, (n, d), K = time.perf_counter(), X.shape, Y.shape[1]
    if not 1 < n <= _POINTS or X.dtype != torch.float32 or X.device.type != "cpu" or K == 0 or d == 0:
        return None
    if 2.0 * n * n * d * (K + 1) + n**3 + 2.0 * n * K * d * d > _WORK:
        return None
    x, y = X.double(), Y.double()
    x = x - x.mean(0)
    if not (_usual(largest(x)) and _usual(largest(y))):
        return None
    sq = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square_()
    A = kernel.value_(sq.clone())
    eps = torch.finfo(X.dtype).eps
    if not bool(((eps < A) & (1.0 - 4.0 * eps > A)).any()):
        return None  # the bandwidth makes every value 0 or 1
    A.diagonal().add_(ridge)
    L, info = torch.linalg.cholesky_ex(A)
    if int(info):
        return None
    alpha = torch.cholesky_solve(y, L).contiguous()
    if not largest(alpha) <= bound(y, torch.float64):
        return None
    residual = relative(torch.mm(A, alpha).sub_(y), y)
    solution = Solution(
        alpha, residual, ridge, 0.0, "cholesky", torch.float64, 0, n, time.perf_counter() - start, residual_rows=n
    )
    return SmallFit(Solved(solution, alpha), kernel, x, sq)


def _usual(size: float) -> bool:
    return 1.0 / _USUAL <= size <= _USUAL


def solve_and_agop(
    fitted: SmallFit, center: bool, diagonal: bool, mark: Callable[[str], None]
) -> tuple[Solved, torch.Tensor, int] | None:
    """What ``kernel_ridge.fit_and_agop`` returns."""
    M = fitted.agop(center, diagonal)
    if M is None:
        return None
    mark("solve")
    mark("agop")
    n, d = fitted.x.shape
    return fitted.solved, M, 8 * (5 * n * n + 3 * n * d * fitted.solved.alpha.shape[1] + d * d)
