"""Kernel regression and the AGOP of its predictor, from one n x n matrix where that loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastagop import distributed
from fastagop.agop import agop, agop_from_weights_
from fastagop.kernels import _checks, torch_blocks
from fastagop.kernels._plan import Plan, roomy
from fastagop.kernels.operations import in_units
from fastagop.kernels.radial import Radial
from fastagop.solve import Solution, in_unit, plan_solve, solve_into

AGOP_SCALES = ("max", "mean", "sum")
_SQUARABLE = 2.0**30  # coefficients beyond it, or below its inverse, are scaled: float32 holds their squares then


@dataclass(frozen=True)
class Machine:
    """A kernel regression's kernel and ridge, and how it computes."""

    kernel: Radial
    ridge: float
    precision: str
    backend: str

    def shared(self, group) -> dict:
        """How operations that a group shares compute."""
        return {"precision": self.precision, "backend": self.backend, "group": group}


def solve(X: torch.Tensor, Y: torch.Tensor, machine: Machine, group=None) -> Solution:
    """The kernel regression's solution, alpha in float64; by the ranks of a group together where there is one."""
    if group is None:
        return _solve_stored(X, Y, machine)[1]
    return distributed.solve_as(torch.float64, machine.kernel, X, Y, ridge=machine.ridge, **machine.shared(group))[0]


def _solve_stored(X, Y, machine: Machine) -> tuple[torch.Tensor, Solution, Plan]:
    """(matrix that holds k(X, X) above its diagonal, solution in float64, plan)."""
    kernel, precision = machine.kernel, machine.precision
    kernel, X, _, _ = in_units(kernel, X, X)
    plan, (_, _, ridge, dtype) = plan_solve(
        kernel, X, Y, ridge=machine.ridge, method="cholesky", precision=precision, backend=machine.backend
    )
    assert isinstance(dtype, torch.dtype)  # of "cholesky"
    K = roomy(len(X), len(X), X, dtype)
    return K, solve_into(K, kernel, X, Y, ridge, plan, precision, torch.float64), plan


def solve_and_agop(
    X: torch.Tensor,
    Y: torch.Tensor,
    machine: Machine,
    group=None,
    *,
    center: bool = False,
    mark: Callable[[str], None] | None = None,
) -> tuple[Solution, torch.Tensor, int]:
    """(solution, AGOP summed over X, planned bytes); the kernel matrix becomes the weights where that loses nothing.

    The AGOP is float64: small eigenvalues of M, whose square roots come next, keep what rounding would take.
    In a group where no (n, n) matrix fits on the first rank, conjugate gradients solve. ``mark`` is called with "solve"
    and with "agop" when these are done.
    """
    mark = mark or (lambda stage: None)
    if group is not None:
        how = machine.shared(group)
        solution, planned = distributed.solve_as(torch.float64, machine.kernel, X, Y, ridge=machine.ridge, **how)
        mark("solve")
        how |= {"reduction": "sum", "center": center}
        alpha, size = in_unit(solution.alpha, _SQUARABLE)
        M = distributed.agop_as(alpha, machine.kernel, X, alpha.to(X.dtype), **how)
        mark("agop")
        return solution, _of_size(M, size), planned
    K, solution, plan = _solve_stored(X, Y, machine)
    alpha, size = in_unit(solution.alpha, _SQUARABLE)
    mark("solve")
    kernel, X, _, unit = in_units(machine.kernel, X, X)
    # A float64 kernel matrix still holds every small distance, so no second pass over pairs is needed.
    W = torch_blocks.weights_from_upper_(kernel, K) if K.dtype == torch.float64 else None
    del K
    if W is None:
        how = {"center": center, "precision": machine.precision, "backend": machine.backend}
        M = agop(kernel, X, alpha.to(X.dtype), reduction="sum", **how)
    else:
        M = agop_from_weights_(W, X, alpha, machine.precision, plan.backend, center)
    M = _of_size(M.double().div_(unit).div_(unit), size)
    mark("agop")
    return solution, M, plan.peak_bytes


def _of_size(M: torch.Tensor, size: float) -> torch.Tensor:
    """The AGOP of coefficients that many times as large."""
    M = M.mul_(size).mul_(size)
    if not _checks.finite(M):
        raise ValueError("y is so large that the AGOP of its predictor leaves float64; divide y by a constant")
    return M


def agop_divisor(M: torch.Tensor, scale: str, n: int) -> float:
    """What ``agop_scale`` divides an AGOP summed over n points by; 1 where "max" would divide by zero."""
    if scale == "max":
        largest = float(M.max())
        return largest if largest > 0 else 1.0
    return float(n) if scale == "mean" else 1.0
