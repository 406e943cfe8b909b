"""Torch backend: the kernel matrix, stored, and products with it that never store it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..plan import Plan
from ..profile import Profile
from .gradients import gradient_aim
from .tiles import fill_symmetric, fit_rows, tiles


def plan_kernel_matrix(X: torch.Tensor, Z: torch.Tensor, out: torch.Tensor | None, why: str) -> Plan:
    """The plan of kernel_matrix."""
    m, n, d = len(X), len(Z), X.shape[1]
    symmetric = Z is X
    held = 0 if out is not None else m * n * X.element_size()
    rows, peak = fit_rows("kernel_matrix", Z, X, held, lambda rows: 3 * rows * rows * X.element_size())
    return Plan(
        "kernel_matrix",
        "torch",
        "blocked, half of it and mirrored" if symmetric else "blocked",
        why,
        "",
        (1.0 if symmetric else 2.0) * m * n * d,
        peak,
        rows,
    )


def kernel_matrix(kernel: Profile, X, Z, out: torch.Tensor | None, rows: int, ridge: float = 0.0) -> torch.Tensor:
    """k(X, Z), shape (n, m); + ridge I where Z is X."""
    result = X.new_empty(len(X), len(Z)) if out is None else out
    if Z is X:
        fill_symmetric(result, X, rows, kernel.value_)
        if ridge:
            result.diagonal().add_(ridge)
        return result
    for _, block in tiles(Z, X, rows, out=result):
        kernel.value_(block)
    return result


def plan_kernel_matmul(X: torch.Tensor, Z: torch.Tensor, V: torch.Tensor, why: str) -> Plan:
    """The plan of kernel_matmul."""
    n, m, d, p = len(X), len(Z), X.shape[1], V.shape[1]
    size = X.element_size()
    aim = gradient_aim(X.device)
    rows, peak = fit_rows("kernel_matmul", Z, X, n * p * size, lambda rows: rows * (m + p) * size, aim)
    half = 1.0 if Z is X else 2.0
    return Plan(
        "kernel_matmul",
        "torch",
        "blocked, K never stored",
        why,
        "",
        half * n * m * d + 2.0 * n * m * p,
        peak,
        rows,
    )


def kernel_matmul(
    kernel: Profile, X: torch.Tensor, Z: torch.Tensor, V: torch.Tensor, rows: int, starts: Iterable[int] | None = None
) -> torch.Tensor:
    """k(X, Z) V, shape (n, p); with starts, what these row blocks contribute to it."""
    result = X.new_zeros(len(X), V.shape[1])
    symmetric = Z is X
    for row, block in tiles(Z, X, rows, lower=symmetric, starts=starts):
        kernel.value_(block)
        result[row].addmm_(block, V[: block.shape[1]])
        if symmetric:  # the mirrored block serves the rows above
            result[: row.start].addmm_(block[:, : row.start].T, V[row])
    return result
