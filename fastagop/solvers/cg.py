"""Conjugate gradients for (k(X, X) + ridge I) alpha = Y where no n x n matrix fits, with a low-rank preconditioner.

Nothing here knows how products with the kernel matrix are made: the operator is a callable, and so are the columns
that the preconditioner is built from. A sharded product serves as well as a local one.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fastagop.kernels import checks
from fastagop.kernels.plan import Plan, block_rows, format_bytes
from fastagop.solvers.found import Found, RowsAndResidual, measure_all
from fastagop.solvers.limits import MAX_JITTER, RESIDUAL, bound, finite_values, relative, times
from fastagop.solvers.options import ConjugateGradients
from fastagop.solvers.preconditioner import PROPOSALS, ROWS, Matmul, preconditioner_of
from fastagop.solvers.problem import Problem
from fastagop.solvers.symmetric_blocks import SymmetricBlocks, default_rows, half_bytes

log = logging.getLogger("fastagop")

_STALL = 100  # steps without a smaller residual before the iteration is given up
_RANK = 2000  # of the preconditioner, at most, where none is asked for
# Coefficients so many times as large as those that a dtype rounds to a residual worth a warning solve nothing there.
_REACH = 100.0
STEPS = 50  # that a plan counts with: the number is known afterwards
_VECTORS = 10  # (n, K) matrices alive at once


def least_bytes(problem: Problem) -> int:
    """Bytes without a preconditioner, where none is asked for by its rank."""
    n = len(problem.X)
    rank = min(problem.options.rank or 0, n)
    return (
        _fixed_bytes(problem)
        + rank * _rank_bytes(n, rank)
        + (_draw_bytes(n, rank) if rank else 0)
        + 8 * problem.blocks_alive * n
    )


def _fixed_bytes(problem: Problem) -> int:
    """Vectors, the points in float64, and half of the matrix where that is stored."""
    (n, d), K = problem.X.shape, problem.outputs
    stored = half_bytes(n, torch.float64, default_rows(n, problem.X.device)) if problem.options.store else 0
    return 8 * n * (_VECTORS * K + 1) + (0 if problem.X.dtype == torch.float64 else 8 * n * d) + stored


def _rank_bytes(n: int, rank: int) -> int:
    """Per column of the preconditioner: of F, of its rotated rows, of r x r matrices."""
    return 8 * (n + min(n, ROWS) + 5 * rank)


def _draw_bytes(n: int, rank: int) -> int:
    return 8 * 3 * n * min(PROPOSALS, rank)


def plan(problem: Problem, reason: str) -> tuple[Plan, Problem]:
    """(plan of method "cg", problem with the preconditioner's rank settled), or MemoryError.

    Memory: the preconditioner 8 n r, r x r work, ten (n, K) matrices, and the blocks of one pass.
    """
    (n, d), K, room, options = problem.X.shape, problem.outputs, problem.room, problem.options
    row, fixed = 8 * problem.blocks_alive * n, _fixed_bytes(problem)
    rank = min(_RANK, n // 16) if options.rank is None else min(options.rank, n)
    each, draw = _rank_bytes(n, rank), _draw_bytes(n, rank)
    if options.rank is None:
        rank = max(0, min(rank, (room - fixed - max(draw + row, 64 * row)) // max(1, each)))
    needed = fixed + rank * each + (draw if rank else 0)
    if needed + row > room:
        matrix = "with half of a kernel matrix stored" if options.store else "even without a kernel matrix"
        raise MemoryError(
            f"solve with n = {n} needs {format_bytes(needed + row)} {matrix} (method 'cg', preconditioner of rank "
            f"{rank}), but {format_bytes(room)} may be used; n up to about {problem.most_points(least_bytes)} fits. "
            f"{problem.advice.iterative(options.store)}"
        )
    rows = block_rows(row, needed, room, n, "solve")
    step = 1.0 * n * n * (2 * K if options.store else d + 2 * K)
    why = (
        f"{problem.operator.why}; {reason}; preconditioner of rank {rank} ({format_bytes(8 * n * rank)}), "
        f"one pass over {'half of a stored matrix' if options.store else 'all pairs'} a step ({step:.2g} flop), "
        f"work given for {STEPS} steps"
    )
    work = STEPS * step + 4.0 * n * rank**2 + (1.0 * n * n * d if options.store else 0.0)
    peak = max(needed, fixed + 8 * n * rank + rows * row)
    backend = problem.operator.backend.name
    made = Plan("solve", backend, "cg", why, precision="float64 passes", flops=work, peak_bytes=peak, block=rows)
    return made, replace(problem, options=replace(options, rank=rank))


class KernelProduct(Protocol):
    """k(X, X) as conjugate gradients see it: made of the points, stored, or shared by processes."""

    def __len__(self) -> int: ...

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """The product k(X, X) V, float64."""
        ...

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """The columns k(X, X[index]), float64."""
        ...

    def diagonal(self) -> torch.Tensor:
        """The diagonal k(x, x) of each point (n,), float64."""
        ...


def solve(
    problem: Problem,
    plan: Plan,
    Y: torch.Tensor,
    ridge,
    out: torch.dtype,
    share: Callable[..., KernelProduct] = lambda product: product,
) -> Found:
    """Solve by conjugate gradients with the least jitter, by tens, that has a bounded solution.

    Products run in float64 whatever X's dtype is: in float32 the residual ends at 3e-5 (Laplace) to 1e-3 (Gaussian)
    at n = 4000 already, and at more for more points.

    Args:
        problem: the system, without its targets.
        plan: made of it.
        Y: float64 targets.
        ridge: a number, or one for each point.
        out: the dtype in which alpha is wanted.
        share: makes of the product with k(X, X) one that other processes take part in.
    """
    of_points, options = problem.operator.float64_product(plan.block), problem.options
    product = StoredProduct.of(problem, of_points) if options.store else share(of_points)
    low_rank = preconditioner_of(product.columns, product.diagonal(), ridge, options)
    scale = low_rank.largest if low_rank else float(len(Y))
    jitter, iterations = 0.0, 0

    def matmul(V: torch.Tensor, jitter: float = 0.0) -> torch.Tensor:
        return product.matmul(V).add_(times(ridge + jitter, V))

    def steps(jitter: float, largest: float) -> CGResult:
        low = low_rank.shifted(jitter) if low_rank else None
        return conjugate_gradients(functools.partial(matmul, jitter=jitter), Y, low, options, largest)

    def unmet(result: CGResult) -> float:
        return relative(matmul(result.alpha.to(out).double()).sub_(Y), Y)

    plain, left, regular = None, math.inf, float(checks.tensor(ridge).min()) > 0
    reach = _REACH * RESIDUAL[out] / torch.finfo(out).eps
    while True:
        result = steps(jitter, bound(Y, out))
        iterations += result.iterations
        finite_values(result.residual)
        if not result.singular or jitter >= MAX_JITTER * scale:
            break
        if not jitter:  # large coefficients may be the answer
            plain = steps(0.0, math.inf if regular else reach * checks.largest(Y))
            iterations += plain.iterations
            left = math.inf if plain.singular else unmet(plain)
            if left <= RESIDUAL[out]:
                break
        jitter = max(10.0 * jitter, torch.finfo(out).eps * scale)
    if plain is not None and left < math.inf and (not jitter or (regular and left <= unmet(result))):
        result, jitter = plain, 0.0
    fields = {"jitter": jitter, "iterations": iterations, "rank": low_rank.rank if low_rank else 0}
    fields |= {"stopped": result.stopped, "tolerance": options.tolerance}
    return Found(result.alpha, dtype=torch.float64, measure=measure_all(matmul), **fields)


@dataclass(frozen=True)
class StoredProduct:
    """k(X, X) of which half is stored, as a solver sees it.

    Attributes:
        blocks: the half.
        points: columns and the diagonal come from it.
    """

    blocks: SymmetricBlocks
    points: KernelProduct

    @classmethod
    def of(cls, problem: Problem, points: KernelProduct) -> StoredProduct:
        """The product whose half of k(X, X) is computed and stored."""
        operator = problem.operator
        rows = operator.backend.factor_kernels(torch.float64, operator.precision).rows
        blocks = SymmetricBlocks(len(points), torch.float64, problem.X.device)
        return cls(blocks.fill_(rows(operator.points.kernel, operator.points.X)), points)

    def __len__(self) -> int:
        return len(self.blocks)

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """The product k(X, X) V, float64."""
        return self.blocks.matmul(V)

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """The columns k(X, X[index]), float64."""
        return self.points.columns(index)

    def diagonal(self) -> torch.Tensor:
        """The diagonal k(x, x) of each point (n,), float64."""
        return self.points.diagonal()


@dataclass(frozen=True)
class CGResult:
    """alpha (n, K) in float64, its residual (recomputed, Frobenius), steps taken, and why they ended early, or "".

    ``singular``: what stopped them is a matrix without a bounded solution, which a larger diagonal would cure.
    ``left``: Y - A alpha.
    """

    alpha: torch.Tensor
    residual: float
    iterations: int
    stopped: str
    left: torch.Tensor
    singular: bool = False

    @property
    def measured(self) -> tuple[torch.Tensor, RowsAndResidual]:
        """``Found.measured`` where A is the system's own matrix, without jitter."""
        return self.alpha, (torch.arange(len(self.left), device=self.left.device), self.left.neg())


class ProgressReporter:
    """Says how far the iteration is: a log line per step, and a bar where one was asked for."""

    def __init__(self, options: ConjugateGradients):
        self.bar = None
        if options.progress:
            from tqdm import tqdm

            self.bar = tqdm(desc="solve", unit="step")

    def step(self, count: int, error: float) -> None:
        """Log a step and its largest relative residual, and move the bar."""
        log.info("solve: step %d, largest relative residual %.1e", count, error)
        if self.bar is not None:
            self.bar.set_postfix_str(f"residual {error:.1e}", refresh=False)
            self.bar.update()

    def close(self) -> None:
        """Close the bar; called also where the iteration raised."""
        if self.bar is not None:
            self.bar.close()


def conjugate_gradients(
    matmul: Matmul,
    Y: torch.Tensor,
    precondition: Matmul | None,
    options: ConjugateGradients,
    bound: float = float("inf"),
) -> CGResult:
    """Solve A alpha = Y for all columns at once, one product with A a step.

    The residual that decides is Y - A alpha itself: when the recursion says that the goal is reached, it is
    recomputed, and the iteration starts again from there if rounding had made the recursion drift.

    Args:
        matmul: V (n, K) -> A V, float64; A symmetric positive definite.
        Y: float64 (n, K).
        precondition: R -> P^-1 R up to a constant factor, or None.
        options: tolerance, max_iterations, progress.
        bound: largest coefficient to go on with. Targets that differ where A sees one point make them grow for ever.
    """
    watch = ProgressReporter(options)
    try:
        return _iterate(matmul, Y, precondition or torch.clone, options, bound, watch)
    finally:
        watch.close()


def _iterate(matmul: Matmul, Y, precondition: Matmul, options: ConjugateGradients, bound: float, watch) -> CGResult:
    size = torch.linalg.vector_norm(Y, dim=0)
    goal = options.tolerance * size
    alpha, R, step, since, stopped, singular = torch.zeros_like(Y), Y.clone(), 0, 0, "", False
    best, best_error, verified = alpha, _largest(Y, size), float("inf")
    direction, rho = torch.zeros_like(Y), torch.ones_like(size)
    while not stopped:
        active = torch.linalg.vector_norm(R, dim=0) > goal
        if not active.any():
            R = Y - matmul(alpha)
            error = _largest(R, size)
            if error <= options.tolerance:
                return CGResult(alpha, relative(R, Y), step, "", R)
            if error > 0.5 * verified:
                stopped = "rounding keeps the residual above the tolerance"
            best, best_error, verified = (alpha, error, error) if error < verified else (best, best_error, verified)
            direction.zero_()
            continue
        if step == options.max_iterations or since == _STALL:
            stopped = "it makes no progress" if since == _STALL else f"max_iterations = {step} steps were not enough"
            break
        Z = precondition(R)
        fresh = (R * Z).sum(0)
        if not bool((fresh > 0)[active].all()):
            stopped = "the preconditioner is not positive definite to rounding"
            break
        direction = Z.add_(direction * torch.where(active, fresh / rho, 0.0))
        product = matmul(direction)
        curvature = (direction * product).sum(0)
        if not bool((curvature > 0)[active].all()):
            singular, stopped = True, "the kernel matrix is not positive definite to rounding"
            break
        length = torch.where(active, fresh / curvature, 0.0)
        alpha, R, rho = alpha + direction * length, R.sub_(product.mul_(length)), fresh
        step, since, error = step + 1, since + 1, _largest(R, size)
        watch.step(step, error)
        if not float(alpha.abs().max()) <= bound:
            singular, stopped = True, f"coefficients grew past {bound:.0e}"
        elif error < best_error:
            best, best_error, since = alpha, error, 0
    left = Y - matmul(best)
    return CGResult(best, relative(left, Y), step, stopped, left, singular)


def _largest(R: torch.Tensor, size: torch.Tensor) -> float:
    """max_c ||R_c|| / size_c; a column of size 0 counts by its own length."""
    errors = torch.linalg.vector_norm(R, dim=0) / torch.where(size > 0, size, 1.0)
    return float(errors.max()) if errors.numel() else 0.0
