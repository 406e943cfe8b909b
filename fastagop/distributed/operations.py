"""The operations of fastagop, shared by the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch

from fastagop.distributed.communicator import other
from fastagop.distributed.engine import Predictor, Sharded, area_of_product, block_of_product
from fastagop.kernels import operations
from fastagop.kernels.kernel_operator import KernelOperator, in_dtype
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.profile import Kernel
from fastagop.solvers.solve import Solution, SolveOptions, warn_about
from fastagop.solvers.table import Method


@torch.no_grad()
def agop(
    kernel: Kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    center: bool = False,
    method: str = "auto",
    precision: str = "highest",
    backend: str = "auto",
    memory_limit: float | None = None,
    sample_weight: torch.Tensor | None = None,
    group: Any = None,
) -> torch.Tensor:
    """``fastagop.agop``, shared by the ranks of a group; partial sums (d, d) are added in float64.

    The gradient form, 2 m n K d products, splits over the rows of Z. The gram form splits over the rows of S where
    Z is X and no point has a weight of its own: every rank holds the (n, n) weights and does n^2 d + n^3 / ranks
    products; elsewhere over the rows of Z: n^2 m / ranks + n^2 d. "auto" takes what is cheaper for one rank.

    Args:
        kernel, X, alpha, Z, reduction, center, method, precision, backend, sample_weight: as in ``fastagop.agop``, the
            same on every rank.
        memory_limit: bytes that each rank may take; default the least that any rank has free.
        group: a process group; default all processes.

    Returns:
        Tensor (d, d), the same bits on every rank.
    """
    task = AgopTask(reduction, center, method, memory_limit, sample_weight)
    return in_dtype(Sharded(group).agop(Predictor(kernel, X, alpha, precision, backend), task, Z), X.dtype)


@torch.no_grad()
def kernel_matmul(
    kernel: Kernel,
    X: torch.Tensor,
    Z: torch.Tensor | None = None,
    V: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
    group: Any = None,
) -> torch.Tensor:
    """``fastagop.kernel_matmul``, shared by the ranks of a group.

    Rows of X are shared out, and the rows of the result travel while the next ones are made. Where Z is X, the torch
    backend shares out half of the matrix instead, by equal area, and adds the partial results.

    Args:
        kernel, X, Z, V, precision, backend: as in ``fastagop.kernel_matmul``, the same on every rank.
        group: a process group; default all processes.

    Returns:
        Tensor (n, p), the same bits on every rank.
    """
    ranks, options = Sharded(group).communicator("kernel_matmul", X), {"precision": precision, "backend": backend}

    def checked() -> KernelOperator:
        operator = KernelOperator("kernel_matmul", kernel, X, Z, **options)
        operator.matmul(V)
        return operator

    operator, room = ranks.agree(checked, f"{kernel!r}, {options}", X=X, Z=other(X, Z), V=V)
    assert V is not None  # as has been checked
    if operator.Z is not X or not operator.backend.shares_triangle:
        return ranks.concatenate(
            lambda first, last: operations.kernel_matmul(kernel, X[first:last], operator.Z, V, **options),
            len(X),
            (V.shape[1],),
            V,
        )
    with operator.products():
        rows, at = block_of_product(X, V.shape[1], room), operator.points
        return ranks.total(ranks.together(lambda: area_of_product(at.kernel, at.X, V, rows, ranks), "its share"))


@torch.no_grad()
def gradients(
    kernel: Kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
    group: Any = None,
) -> torch.Tensor:
    """``fastagop.gradients``, shared by the ranks of a group: rows of Z; they travel while the next ones are made.

    Args:
        kernel, X, alpha, Z, precision, backend: as in ``fastagop.gradients``, the same on every rank.
        group: a process group; default all processes.

    Returns:
        Tensor (m, K, d), the same bits on every rank.
    """
    ranks, options = Sharded(group).communicator("gradients", X), {"precision": precision, "backend": backend}

    def checked() -> KernelOperator:
        operator = KernelOperator("gradients", kernel, X, Z, **options)
        operator.gradients(alpha)
        return operator

    operator, _ = ranks.agree(checked, f"{kernel!r}, {options}", X=X, alpha=alpha, Z=other(X, Z))
    return ranks.concatenate(
        lambda first, last: operations.gradients(kernel, X, alpha, operator.Z[first:last], **options),
        len(operator.Z),
        (alpha.shape[1], X.shape[1]),
        X,
    )


def solve(
    kernel: Kernel,
    X: torch.Tensor,
    Y: torch.Tensor,
    *,
    ridge: float = 0.0,
    method: Method = "auto",
    precision: str = "highest",
    backend: str = "auto",
    memory_limit: float | None = None,
    sample_weight: torch.Tensor | None = None,
    group: Any = None,
) -> Solution:
    """``fastagop.solve``, shared by the ranks of a group.

    Of "cholesky+cg", and of "cholesky" for more than 4096 points, every rank holds block rows of half of the matrix and
    of its factor, dealt out in turn. Of "cg" the first rank iterates and holds the preconditioner, and every product
    with k(X, X) is shared out by equal area. Fewer points, and "eigh", are solved by the first rank alone, and the
    others wait for its result.

    Args:
        kernel, X, Y, ridge, method, precision, backend: as in ``fastagop.solve``, the same on every rank.
        memory_limit: bytes that a rank may take; default the least that any of them has free.
        sample_weight: as in ``fastagop.solve``, the same on every rank.
        group: a process group; default all processes.

    Returns:
        Solution, the same bits on every rank.

    Warns:
        NumericalWarning: on every rank, where ``fastagop.solve`` would.
    """
    options = SolveOptions(ridge, method, precision, backend, memory_limit)
    dtype = X.dtype if isinstance(X, torch.Tensor) else torch.float64
    solved = Sharded(group).solve(kernel, X, Y, options, sample_weight=sample_weight, out=dtype).solved
    warn_about(solved.solution, columns=True)
    return solved.solution
