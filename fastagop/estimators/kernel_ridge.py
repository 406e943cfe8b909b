"""Kernel regression and the AGOP of its predictor, from one n x n matrix where that loses nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastagop import distributed
from fastagop.estimators.diagonal import agop_diagonal
from fastagop.kernels import checks
from fastagop.kernels.agop import agop, agop_from_weights_
from fastagop.kernels.plan import Plan
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.radial import Radial
from fastagop.kernels.scaling import scale_points
from fastagop.kernels.torch_backend import tiles
from fastagop.solvers import copies
from fastagop.solvers.cg import ConjugateGradients
from fastagop.solvers.copies import Rows
from fastagop.solvers.solve import Advice, Solution, Solved, plan_solve, scale_targets, solve_stored, solve_unstored

log = logging.getLogger("fastagop")

AGOP_SCALES = ("max", "mean", "sum")
_ADVICE = Advice("solver", "raise memory_limit where memory is free")
_ROUNDING = 2e-6  # of the gradients: M is off by twice that, and float32 sums cost some more; 1e-5 is promised
_POINTS = 8
_SQUARABLE = 2.0**30  # coefficients beyond it, or below its inverse, are scaled: float32 holds their squares then


@dataclass(frozen=True)
class KernelRidge:
    """A kernel regression's kernel and ridge, and how it computes.

    ``solver``: any ``method`` of ``fastagop.solve``; ``memory_limit``: bytes that a step may take.
    """

    kernel: Radial
    ridge: float
    precision: str
    backend: str
    solver: str | ConjugateGradients = "auto"
    memory_limit: float | None = None

    @property
    def how(self) -> dict:
        """How a solve computes."""
        metadata = {"ridge": self.ridge, "method": self.solver, "memory_limit": self.memory_limit, "advice": _ADVICE}
        metadata["wide"] = True  # alpha is wanted in float64
        return {**metadata, "precision": self.precision, "backend": self.backend}


def solve(X: torch.Tensor, Y: torch.Tensor, regression: KernelRidge, group=None, *, rows: Rows | None = None) -> Solved:
    """The kernel regression's solution, alpha in float64; by the ranks of a group together where there is one.

    Args:
        X: points (r, d). Y: targets (n, K) of the rows given. rows: how those became points; default as they are.
    """
    if group is None:
        return _solved(X, Y, regression, rows or copies.alone(X))[0]
    return _solved_together(X, Y, regression, group, rows or copies.alone(X))[0]


def _solved_together(X, Y, regression: KernelRidge, group, rows: Rows) -> tuple[Solved, int]:
    return distributed.solve_as(torch.float64, regression.kernel, X, Y, group=group, rows=rows, **regression.how)


def _solved(X, Y, regression: KernelRidge, rows: Rows) -> tuple[Solved, torch.Tensor | None, Plan]:
    """(solution in float64, matrix that holds k(X, X) above its diagonal or None, plan)."""
    kernel = regression.kernel
    plan, (_, _, ridge, how) = plan_solve(kernel, X, rows.take(Y), **regression.how)
    if not isinstance(how, ConjugateGradients):
        return *solve_stored(kernel, X, Y, ridge, plan, how, regression.precision, torch.float64, rows), plan
    with matmul_precision(regression.precision, X.device):
        return solve_unstored(kernel, X, Y, ridge, plan, how, torch.float64, rows), None, plan


def fit_and_agop(
    X: torch.Tensor,
    Y: torch.Tensor,
    regression: KernelRidge,
    group=None,
    *,
    rows: Rows | None = None,
    center: bool = False,
    diagonal: bool = False,
    mark: Callable[[str], None] | None = None,
) -> tuple[Solution, torch.Tensor, int]:
    """(solution, AGOP summed over rows, planned bytes); the kernel matrix becomes the weights where that loses nothing.

    The AGOP is float64: small eigenvalues of M, whose square roots come next, keep what rounding would take. Where no
    (n, n) matrix fits, or "cg" is asked for, conjugate gradients solve. Rows count in M by their weights.

    Args:
        X: points (r, d). Y: targets (n, K) of the rows given. rows: how those became points; default as they are.
        center: subtract the mean gradient. diagonal: the diagonal of the AGOP only, (d,).
        mark: called with "solve" and with "agop" when these are done.
    """
    mark, rows = mark or (lambda stage: None), rows or copies.alone(X)
    if group is not None:
        solved, planned = _solved_together(X, Y, regression, group, rows)
        K, backend = None, ""
    else:
        solved, K, plan = _solved(X, Y, regression, rows)
        planned, backend = plan.peak_bytes, plan.backend
    mark("solve")
    alpha, size = scale_targets(solved.alpha, _SQUARABLE)
    kernel, X, _, unit = scale_points(regression.kernel, X, X)
    K = None if diagonal else K
    if K is not None:  # one in float64 still holds every small distance, so no second pass over pairs is needed
        K = tiles.weights_from_upper_(kernel, K) if K.dtype == torch.float64 else None
    wide = X.dtype != torch.float64 and _rounding_costs(kernel, X, alpha, center, rows.weights)
    if group is not None and X.dtype != torch.float64:
        wide = bool(distributed.broadcast(X.new_full((1,), float(wide)), group))
    if wide:
        log.info(
            "agop: float32 coefficients would cost more than %.0e of the gradients; computing in float64", _ROUNDING
        )
        X = X.double()
    weights = None if rows.weights is None else rows.weights.to(X)
    weighted = {} if weights is None else {"sample_weight": weights}
    how = {"center": center, "precision": regression.precision, "backend": "auto" if wide else regression.backend}
    limit = {"memory_limit": regression.memory_limit}
    if diagonal:
        how = {"precision": regression.precision, "group": group, **limit}
        M = agop_diagonal(kernel, X, alpha.to(X.dtype), center=center, weights=weights, **how)
    elif group is not None:
        M = distributed.agop_as(
            alpha, kernel, X, alpha.to(X.dtype), reduction="sum", weights=weights, group=group, **limit, **how
        )
    elif K is not None:
        backend = "torch" if wide else backend
        weighted = {} if weights is None else {"row_weights": weights}
        M = agop_from_weights_(K, X, alpha, regression.precision, backend, center, **weighted)
    else:
        M = agop(kernel, X, alpha.to(X.dtype), reduction="sum", **limit, **weighted, **how)
    M = _of_size(M.double().div_(unit).div_(unit), size)
    mark("agop")
    return solved.solution, M, planned


def _rounding_costs(kernel: Radial, X: torch.Tensor, alpha: torch.Tensor, center: bool, weights) -> bool:
    """Whether rounding coefficients and weights to X's dtype costs the gradients too much, at a few of the points.

    Half of these points have the largest coefficients: there the gradients of nearly singular problems are largest.
    Two random sums of the outputs stand for all of them.
    """
    (n, K), points = alpha.shape, min(len(alpha), _POINTS)
    if K == 0:
        return False
    size = alpha.abs().amax(1) * (1.0 if weights is None else weights.sqrt())
    index = torch.cat([torch.arange(points, device=X.device) * n // points, size.topk(points)[1]])
    signs = (
        torch.randint(0, 2, (K, 2), generator=torch.Generator().manual_seed(0), device="cpu").mul_(2).sub_(1).to(alpha)
    )
    signs = signs if K > 2 else torch.eye(K, dtype=alpha.dtype, device=alpha.device)
    x, root = X.double(), 1.0 if weights is None else weights[index].sqrt()[:, None]
    z, W = x[index], torch.cat([kernel.weight_(tile) for _, tile in tiles.tiles(x, x[index], 2 * points)])
    both, total, lost = (alpha @ signs, alpha.to(X.dtype).double() @ signs), 0.0, 0.0
    for exact, rounded in zip(both[0].T, both[1].T, strict=True):
        terms = W * exact
        apart = (W.to(X.dtype).double() * rounded).sub_(terms)
        g, change = ((part @ x - part.sum(1, keepdim=True) * z) * root for part in (terms, apart))
        g = g - g.mean(0) if center else g
        total, lost = total + float(g.square().sum()), lost + float(change.square().sum())
    return lost > _ROUNDING * _ROUNDING * total


def _of_size(M: torch.Tensor, size: float) -> torch.Tensor:
    """The AGOP of coefficients that many times as large."""
    M = M.mul_(size).mul_(size)
    if not checks.finite(M):
        raise ValueError("y is so large that the AGOP of its predictor leaves float64; divide y by a constant")
    return M


def agop_divisor(M: torch.Tensor, scale: str, n: float) -> float:
    """What ``agop_scale`` divides an AGOP summed over rows of total weight n by; 1 where "max" would divide by zero."""
    if scale == "max":
        largest = float(M.max())
        return largest if largest > 0 else 1.0
    return float(n) if scale == "mean" else 1.0
