"""(k(X, X) + ridge I) alpha = Y for a few hundred points on the CPU, in float64 and in as few steps as that takes.

What larger problems plan, estimate and guard against costs more than such a problem itself. Whatever is out of the
ordinary (copies, a failed pivot, coefficients that grow, numbers of unusual size, a bandwidth that says nothing) is
left to ``solve.PreparedSolve``, which deals with it and reports it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fastagop.kernels.checks import largest
from fastagop.kernels.profile import Profile
from fastagop.kernels.scaling import is_usual
from fastagop.kernels.torch_backend import few
from fastagop.kernels.torch_backend.distance import around_mean
from fastagop.solvers.limits import both, bound, tells_points_apart
from fastagop.solvers.solution import Solution, Solved

MAX_POINTS = 512


@dataclass(frozen=True)
class SmallSolve:
    """A solved problem, in float64 but for what a solve returns.

    Attributes:
        solved: what a solve returns.
        x: the points; around zero where distances came from a product.
        sq: their squared distances.
        A: k(X, X) + ridge I.
    """

    solved: Solved
    x: torch.Tensor
    sq: torch.Tensor
    A: torch.Tensor


def solve(
    kernel: Profile, X: torch.Tensor, Y: torch.Tensor, ridge: float, out: torch.dtype, rounded: bool = False
) -> SmallSolve | None:
    """alpha, in dtype ``out``, for points X (n, d) and targets Y (n, K); None where it takes more than these steps.

    ``rounded``: distances need no more digits than the rounding of float32 points has left them, as in a fit, whose
    metric is one of many; they then come from a product.
    """
    start, n = time.perf_counter(), len(X)
    if not 1 < n <= MAX_POINTS or X.device.type != "cpu" or Y.shape[1] == 0 or X.shape[1] == 0:
        return None
    x, y, eps = X.double(), Y.double(), torch.finfo(X.dtype).eps
    if not (is_usual(largest(x)) and is_usual(largest(y))):
        return None
    if rounded and X.dtype == torch.float32:
        x, _ = around_mean(x)
        sq = few.distances(x, x)
    else:  # by differences, so that near pairs keep their digits
        sq = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square_()
    A = kernel.value_(sq.clone())
    if not tells_points_apart(A, eps):
        return None
    A.diagonal().add_(ridge)
    L, info = torch.linalg.cholesky_ex(A)
    if int(info):
        return None
    wide = torch.cholesky_solve(y, L).contiguous()
    if not largest(wide) <= bound(y, out):
        return None
    alpha = wide.to(out)
    left = torch.mm(alpha.double().T, A).T.sub_(y)  # A is symmetric: its rows are read once
    residual, of_column = both(left, y)
    seconds = time.perf_counter() - start
    found = Solution(
        alpha=alpha,
        residual=residual,
        ridge=ridge,
        jitter=0.0,
        method="cholesky",
        dtype=torch.float64,
        iterations=0,
        rank=n,
        seconds=seconds,
        residual_rows=n,
        column_residual=of_column,
    )
    return SmallSolve(Solved(found, alpha), x, sq, A)
