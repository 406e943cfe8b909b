"""(k(X, X) + ridge I) alpha = Y for kernels that are not radial: any diagonal, values of either sign, any scale.

The kernel is divided by a power of two that brings its diagonal to about 1, and so are the ridge and, multiplied, the
coefficients: limits on jitter and on coefficients, which are made for kernels of that size, then mean the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastagop import linalg
from fastagop.kernels.families.composition import Multiple
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.memory.matrices import empty_matrix
from fastagop.kernels.pair_backend.composite import diagonal_of
from fastagop.kernels.plan import Plan
from fastagop.kernels.profile import Kernel
from fastagop.solvers import cg, direct
from fastagop.solvers.found import Found, RowsAndResidual
from fastagop.solvers.limits import times
from fastagop.solvers.problem import Problem


@dataclass(frozen=True)
class FullMatrixWithDiagonal(direct.FullMatrix):
    """A stored matrix with a diagonal of its own (n,), float64."""

    diagonal: torch.Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))

    def largest_row_sum(self) -> float:
        """The largest sum of absolute values of a row of K."""
        return max(float(row.abs().sum(1).max()) for row in self.K.split(256))

    def factor(self, diagonal: float | torch.Tensor) -> int:
        """Factor with what is beyond the diagonal of 1 that other kernels have; 0, or which pivot failed."""
        return super().factor(self.diagonal + (diagonal - 1.0))


def unit_of(kernel: Kernel, X: torch.Tensor) -> float:
    """The power of two by which a kernel's values at points are divided, so that its diagonal comes to about 1."""
    largest = float(diagonal_of(kernel, X.double()).max())
    return math.ldexp(1.0, math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def _unscaled(found: Found, unit: float) -> Found:
    """What was found with the kernel over ``unit``, for the kernel itself.

    Its matrix has served: its values are no way to gradients here.
    """

    def residual(alpha: torch.Tensor, Y: torch.Tensor) -> RowsAndResidual:
        return found.unmet(alpha * unit, Y)

    alpha, jitter = found.alpha / unit, found.jitter * unit
    return replace(found, alpha=alpha, jitter=jitter, measure=residual, measured=None, K=None)


def _scaled(problem: Problem, ridge) -> tuple[Problem, Any, float]:
    """(the problem of the kernel over a power of two, its ridge, that number)."""
    operator = problem.operator
    unit = unit_of(operator.kernel, operator.X)
    kernel = Multiple(1.0 / unit, operator.kernel)
    # The products of every method are float64.
    scaled = KernelOperator("solve with method 'cg'", kernel, operator.X, precision=operator.precision)
    return replace(problem, operator=scaled, ridge=problem.ridge / unit), ridge / unit, unit


def _system(problem: Problem, plan: Plan, ridge, out: torch.dtype) -> direct.LinearSystem:
    operator = problem.operator
    X = operator.X.double()
    K = empty_matrix(len(X), len(X), X, torch.float64)
    operator.backend.factor_kernels(torch.float64, operator.precision).fill(K, operator.kernel, X, plan.block)
    diagonal, every = diagonal_of(operator.kernel, X), torch.arange(len(X), device=X.device)

    def product(V: torch.Tensor) -> torch.Tensor:
        return linalg.upper_matmul(K, diagonal, V)

    def matmul(V: torch.Tensor) -> torch.Tensor:
        return product(V).add_(times(ridge, V))

    return direct.LinearSystem(
        matrix=FullMatrixWithDiagonal(K, diagonal=diagonal),
        ridge=ridge,
        matmul=matmul,
        from_points=matmul,
        check=lambda V: (every, product(V)),
        steps=0,
        out=out,
    )


def cholesky(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
    """Solve by one float64 factorisation, with the least jitter that has bounded coefficients."""
    problem, ridge, unit = _scaled(problem, ridge)
    found = direct.cholesky(_system(problem, plan, ridge, out), Y)
    assert found is not None
    return _unscaled(found, unit)


def eigh(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
    """Solve by the eigendecomposition, without the eigenvalues that rounding made up."""
    problem, ridge, unit = _scaled(problem, ridge)
    system = _system(problem, plan, ridge, out)
    alpha, rank = direct.eigh(system, Y)
    return _unscaled(system.found(alpha, rank=rank), unit)


def conjugate_gradients(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, out: torch.dtype, **shared) -> Found:
    """Solve by conjugate gradients with products made of the points."""
    problem, ridge, unit = _scaled(problem, ridge)
    return _unscaled(cg.solve(problem, plan, Y, ridge, out, **shared), unit)
