"""Direct solve of (K + ridge I) alpha = Y: one n x n matrix, its factor below the diagonal, itself above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastagop import cg, linalg
from fastagop.kernels import torch_blocks
from fastagop.kernels._backends import triton_fills
from fastagop.kernels._plan import Plan
from fastagop.kernels.radial import Radial

# A residual above this is worth a warning: what each dtype can promise on a solvable problem.
RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-6}
MAX_JITTER = 1.0  # of the largest row sum: the solution is then all ridge; nothing sensible is left to try
_STEPS = {"highest": 25, "high": 100, "medium": 200}  # of refinement at most, by the products of the factor
_GOAL = 1e-9


@dataclass(frozen=True)
class System:
    """The system to solve and where its large products are done.

    Attributes:
        K: (n, n), k(X, X); a factorisation takes its lower triangle.
        diagonal: 1 + ridge, as every profile has phi(0) = 1.
        matmul: V -> (k(X, X) + ridge I) V in float64, which residuals are taken from.
        update: the column-block update of ``linalg.cholesky_lower_``; None for the library's products.
        steps: of refinement after a float32 factorisation, at most.
        out: the dtype in which alpha is wanted.
    """

    K: torch.Tensor
    diagonal: float
    matmul: Callable[[torch.Tensor], torch.Tensor]
    update: Callable | None
    steps: int
    out: torch.dtype

    def residual(self, alpha: torch.Tensor, Y: torch.Tensor) -> float:
        """||(k + ridge I) alpha - Y|| / ||Y||."""
        return cg.relative(self.matmul(alpha.double()).sub_(Y), Y)

    def excess(self, alpha: torch.Tensor, Y: torch.Tensor) -> float:
        """0 where alpha, rounded to the dtype it is wanted in, solves the system or stays bounded; else its excess.

        Targets that differ where the kernel sees one point cannot be met: coefficients then grow like 1 / jitter, and
        in the working dtype their differences are noise.
        """
        bound = largest(Y) / torch.finfo(self.out).eps ** 0.5
        excess = largest(alpha) / bound if bound > 0 else 0.0
        fine = excess <= 1 or self.residual(alpha.to(self.out), Y) <= RESIDUAL[self.out]
        return 0.0 if fine else excess


def system(
    K: torch.Tensor, kernel: Radial, X: torch.Tensor, ridge: float, plan: Plan, precision: str, out: torch.dtype
) -> System:
    """Fill K with k(X, X), in its own dtype, and say how to go on.

    Residuals come from K's upper triangle, but for a float32 K without a ridge: the eigenvalues that matter there are
    below its rounding, so they come from the points in float64, one pass over all pairs a step.
    """
    update, steps = None, _STEPS["highest"]
    if plan.backend == "triton" and triton_fills(K.dtype):
        from fastagop.kernels import triton_ops  # imports triton

        triton_ops.fill_symmetric(K, kernel, X)
        if K.dtype == torch.float32:  # the library's float64 products are on tensor cores as they are
            update, steps = triton_ops.cholesky_update(precision), _STEPS[precision]
    else:
        torch_blocks.fill_symmetric(K, X.to(K.dtype), plan.block, kernel.value_)
    wide = X.double() if K.dtype == torch.float32 and ridge == 0 else None

    def matmul(V: torch.Tensor) -> torch.Tensor:
        if wide is None:
            return linalg.upper_matmul(K, 1.0 + ridge, V)
        return torch_blocks.kernel_matmul(kernel, wide, wide, V, plan)

    return System(K, 1.0 + ridge, matmul, update, steps, out)


def cholesky(system: System, Y: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """(alpha in float64, jitter, refinement steps); K's lower triangle holds the factor afterwards."""
    K = system.K
    scale = linalg.largest_row_sum(K) + system.diagonal - 1.0
    jitter = _factor(system, 0.0, scale)
    while True:
        alpha, iterations = _refined(system, Y)
        excess = system.excess(alpha, Y)
        if not excess or jitter >= MAX_JITTER * scale:
            return alpha, jitter, iterations
        linalg.restore_lower_(K)
        jitter = _factor(system, max(jitter * max(10.0, excess), torch.finfo(K.dtype).eps * scale), scale)


def _factor(system: System, jitter: float, scale: float) -> float:
    """Factor K in place with the least jitter >= the one given that works; returns it."""
    while linalg.cholesky_lower_(system.K, system.diagonal + jitter, update=system.update):
        linalg.restore_lower_(system.K)
        jitter = max(10.0 * jitter, torch.finfo(system.K.dtype).eps * scale)
    return jitter


def _refined(system: System, Y: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(alpha, steps): the factor's solution; a float32 factor preconditions float64 conjugate gradients."""
    K = system.K

    def by_factor(R: torch.Tensor) -> torch.Tensor:
        return linalg.cholesky_solve(K, R.to(K.dtype)).double()

    if K.dtype == torch.float64:
        return by_factor(Y), 0
    options = cg.ConjugateGradients(tolerance=_GOAL, max_iterations=system.steps)
    outcome = cg.conjugate_gradients(system.matmul, Y, by_factor, options)
    return outcome.alpha, outcome.iterations


def eigh(system: System, Y: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(alpha, rank) by eigendecomposition, without the eigenvalues that rounding made up or that alpha cannot bear."""
    ridge = system.diagonal - 1.0
    values, vectors = linalg.eigh(system.K)
    cut, target = len(system.K) * torch.finfo(system.K.dtype).eps * float(values[-1]), vectors.T @ Y
    while True:
        keep = values + ridge > cut
        alpha = vectors @ (torch.where(keep, 1.0 / (values + ridge), 0.0)[:, None] * target)
        excess = system.excess(alpha, Y)
        if not excess or int(keep.sum()) <= 1:
            return alpha, int(keep.sum())
        cut *= 10.0


def largest(A: torch.Tensor) -> float:
    """The largest absolute item, 0 where there is none."""
    return float(A.abs().max()) if A.numel() else 0.0
