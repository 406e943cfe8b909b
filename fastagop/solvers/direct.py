"""Direct solve of (K + ridge W^-1) alpha = Y: one n x n matrix, its factor below the diagonal, itself above."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fastagop import linalg
from fastagop.kernels import checks
from fastagop.kernels.checks import largest
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.memory.matrices import empty_matrix
from fastagop.kernels.plan import Plan, block_rows, format_bytes
from fastagop.kernels.precision import dtype_name
from fastagop.kernels.torch_backend.tiles import BLOCKS_ALIVE
from fastagop.solvers import cg
from fastagop.solvers.found import Found
from fastagop.solvers.limits import MAX_JITTER, RESIDUAL, bound, finite_values, relative, times
from fastagop.solvers.problem import WORKSPACE, Problem, needed_bytes, vectors_bytes

log = logging.getLogger("fastagop")

STEPS = {"highest": 25, "high": 100, "medium": 200}  # of refinement at most, by the products of the factor
_GOAL = 1e-9
# The residual that a rounded kernel matrix may leave. Below the first size another try costs next to nothing.
ENOUGH, ENOUGH_OF_FEW, _FEW = 1e-5, 1e-6, 2048
_LAPACK = 2**22  # bytes of an eigendecomposition's buffers at most, which no allocator of torch sees
_SMALL = 2**18  # bytes of a block of the matrix that no memory is too small for
_LIGHT = 1e9  # times the number of points: a ridge over a weight beside which kernel values do not count
_BLOCKS = 3  # of the matrix of a radial kernel, alive at once while it is filled
_PASSES = 6  # over all pairs in float64 that refinement from the points takes at most, where a float64 matrix fits


@dataclass(frozen=True)
class FullMatrix:
    """An n x n matrix that is factored in its own lower triangle.

    Attributes:
        K: (n, n), both triangles filled; the strict upper one stays as it is.
        update: the column-block update of ``linalg.cholesky_lower_``; None for the library's products.
    """

    K: torch.Tensor
    update: Callable | None = None

    def __len__(self) -> int:
        return len(self.K)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factorisation."""
        return self.K.dtype

    def largest_row_sum(self) -> float:
        """The largest sum of a row of K."""
        return linalg.largest_row_sum(self.K)

    def factor(self, diagonal: float | torch.Tensor) -> int:
        """Factor K with a diagonal; 0, or which pivot failed."""
        return linalg.cholesky_lower_(self.K, diagonal, update=self.update)

    def restore(self) -> None:
        """Make K what it was before ``factor``."""
        linalg.restore_lower_(self.K)

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """The solution of L L^T X = B by the factor L."""
        return linalg.cholesky_solve(self.K, B)


class Matrix(Protocol):
    """What a direct solve asks of its matrix: ``FullMatrix``, or half of one (``half.HalfMatrix``)."""

    @property
    def K(self) -> torch.Tensor | None:
        """(n, n) with k(X, X) above its diagonal, where there is one."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factorisation."""
        ...

    def __len__(self) -> int: ...

    def largest_row_sum(self) -> float:
        """The largest sum of a row of K."""
        ...

    def factor(self, diagonal: float | torch.Tensor) -> int:
        """Factor with a diagonal; 0, or which pivot failed."""
        ...

    def restore(self) -> None:
        """Make K what it was before ``factor``."""
        ...

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """The solution of L L^T X = B by the factor L."""
        ...


@dataclass(frozen=True)
class LinearSystem:
    """The system to solve and where its large products are done.

    Attributes:
        matrix: k(X, X), which a factorisation overwrites.
        ridge: on the diagonal: a number, or ridge / weight of each point (n,).
        matmul: V -> (k(X, X) + ridge) V in float64, from what is at hand: K, or the points.
        from_points: the same from the points.
        check: V -> (rows, their k(X, X) V) from k(X, X) in float64, a sample where all rows would cost too much.
        steps: of refinement after a float32 factorisation, at most.
        out: the dtype in which alpha is wanted.
    """

    matrix: Matrix
    ridge: float | torch.Tensor
    matmul: Callable[[torch.Tensor], torch.Tensor]
    from_points: Callable[[torch.Tensor], torch.Tensor]
    check: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    steps: int
    out: torch.dtype

    def residual(self, alpha: torch.Tensor, Y: torch.Tensor) -> float:
        """||(k + ridge) alpha - Y|| / ||Y|| with the matrix at hand."""
        return relative(self.matmul(alpha.double()).sub_(Y), Y)

    def unmet(self, alpha: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, (k + ridge) alpha - Y of them) with k(X, X) in float64."""
        rows, R = self.check(alpha.double())
        return rows, R.add_(times(self.ridge, alpha.double())[rows]).sub_(Y[rows])

    def excess(self, alpha: torch.Tensor, Y: torch.Tensor) -> float:
        """0 where alpha, rounded to the dtype it is wanted in, solves the system or stays bounded; else its excess.

        Targets that differ where the kernel sees one point cannot be met: coefficients then grow like 1 / jitter, and
        in the working dtype their differences are noise.
        """
        bearable = bound(Y, self.out)
        excess = largest(alpha) / bearable if bearable > 0 else 0.0
        fine = excess <= 1 or self.residual(alpha.to(self.out), Y) <= RESIDUAL[self.out]
        return 0.0 if fine else excess

    def found(self, alpha: torch.Tensor, jitter: float = 0.0, iterations: int = 0, rank: int | None = None) -> Found:
        """What a solver found for this system."""
        n, matrix = len(self.matrix), self.matrix
        return Found(
            alpha=alpha,
            jitter=jitter,
            iterations=iterations,
            rank=n if rank is None else rank,
            dtype=matrix.dtype,
            measure=self.unmet,
            K=matrix.K,
        )


def plan(problem: Problem, method: str, dtype: torch.dtype, why: str) -> Plan:
    """The plan with one n x n matrix in a dtype."""
    X, operator, (n, d), size = problem.X, problem.operator, problem.X.shape, dtype.itemsize
    kernels = operator.backend.factor_kernels(dtype, operator.precision)
    alive = _BLOCKS if operator.kernel.radial else problem.blocks_alive
    rows = block_rows(n * size, 0, max(n * size, int(WORKSPACE * n * n * size) // alive, _SMALL), n, "solve")
    peak = eigh_bytes(n, problem.outputs) if method == "eigh" else needed_bytes(n, 0, dtype, problem.outputs)
    if not operator.kernel.radial:  # even blocks of few rows may take more than the workspace
        peak = max(peak, (n + alive * rows) * n * size)
    extra = 0 if X.dtype == dtype else X.numel() * size
    work = n * n * d + (9 * n**3 if method == "eigh" else n**3 / 3) + 4.0 * n * n * problem.outputs
    precision = f"{dtype_name(dtype)} factorisation"
    if dtype == X.dtype == torch.float32:
        described = operator.backend.describe_precision(operator.precision, X)
        precision = f"{described} factorisation, float64 refinement"
    precision += kernels.note
    backend = operator.backend.name
    made = Plan("solve", backend, method, why, precision=precision, flops=work, peak_bytes=peak + extra, block=rows)
    return _with_second_try(made, problem) if dtype == torch.float32 and problem.ridge > 0 else made


def eigh_bytes(n: int, outputs: int = 0) -> int:
    """What ``eigh`` takes: K, the eigenvectors, 2 n^2 numbers of LAPACK's work, and its buffers.

    Of these, targets and coefficients of very many outputs find K and the eigenvectors only.
    """
    decomposed = int((4 + WORKSPACE) * 8 * n * n) + min(_LAPACK, 8 * n * n)
    return max(decomposed, 2 * 8 * n * n + vectors_bytes(n, outputs, torch.float64))


def _with_second_try(plan: Plan, problem: Problem) -> Plan:
    """The plan of a float32 matrix with what a float64 one takes, where that fits: it may turn out to be needed."""
    if not problem.fits(torch.float64):
        return replace(plan, precision=f"{plan.precision} from the points where its matrix is too coarse")
    more = f"; a float64 matrix where the float32 one leaves a residual above {ENOUGH:.0e}"
    needed = problem.needed_bytes(torch.float64)
    return replace(plan, precision=plan.precision + more, peak_bytes=max(plan.peak_bytes, needed))


def solve(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, dtypes: tuple[torch.dtype, torch.dtype]) -> Found:
    """Solve with the plan's method in a dtype; with a float64 matrix after all where a float32 one is found too coarse.

    Args:
        problem: the system, without its targets.
        plan: made of it.
        Y: float64 targets.
        ridge: a number, or one for each point.
        dtypes: of the matrix, and the one in which alpha is wanted.
    """
    dtype, out = dtypes
    build = functools.partial(system, problem.operator, ridge, plan, out)
    if plan.method == "eigh":
        eigen = build(dtype)
        alpha, rank = eigh(eigen, Y)
        return eigen.found(alpha, rank=rank)
    if dtype == torch.float32 and not _is_zero(ridge):
        if (found := _by_float32(problem, build(dtype), Y)) is not None:
            return found
        log.info("solve: solving again with a float64 matrix of %s", format_bytes(8 * len(Y) ** 2))
        dtype = torch.float64
    found = cholesky(build(dtype), Y)
    assert found is not None
    return found


def _by_float32(problem: Problem, system: LinearSystem, Y: torch.Tensor) -> Found | None:
    """The solution by a float32 matrix, refined from the points where it is coarse; None where float64 is due."""
    wide, (n, d) = problem.fits(torch.float64), problem.X.shape
    found = cholesky(system, Y, wide)
    if found is None:
        return None
    coarse, found = _coarse(system, found, Y)
    if not coarse:
        return found
    log.info("solve: a float32 kernel matrix leaves a residual of %.1e", coarse)
    if not wide or _PASSES * (d + 2 * Y.shape[1]) < n / 3:
        refined, met = _refined_from_points(system, found, Y, system.steps if not wide else _PASSES)
        if met or not wide:
            return refined
    return None


def _is_zero(ridge) -> bool:
    return not isinstance(ridge, torch.Tensor) and ridge == 0


def system(operator: KernelOperator, ridge, plan: Plan, out: torch.dtype, dtype: torch.dtype) -> LinearSystem:
    """A matrix filled with k(X, X), in its dtype, and how to go on.

    Products come from K's upper triangle, but for a float32 K without a ridge: the eigenvalues that matter there are
    below its rounding, so they come from the points in float64, one pass over all pairs a step.
    """
    X, kernels = operator.points.X, operator.backend.factor_kernels(dtype, operator.precision)
    K = empty_matrix(len(X), len(X), X, dtype)
    kernels.fill(K, operator.points.kernel, X, plan.block)
    rows = max(1, plan.block * _BLOCKS * dtype.itemsize // (8 * BLOCKS_ALIVE))  # of float64 blocks in as many bytes
    points = functools.cache(functools.partial(operator.float64_product, rows))
    every = torch.arange(len(X), device=X.device)

    def stored(V: torch.Tensor) -> torch.Tensor:
        return linalg.upper_matmul(K, ridge + 1.0, V)

    def from_points(V: torch.Tensor) -> torch.Tensor:
        return points().matmul(V).add_(times(ridge, V))

    def sampled(V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (every, linalg.upper_matmul(K, 1.0, V)) if dtype == torch.float64 else points().sampled(V)

    exact = dtype == torch.float32 and _is_zero(ridge)
    return LinearSystem(
        matrix=FullMatrix(K, kernels.update),
        ridge=ridge,
        matmul=from_points if exact else stored,
        from_points=from_points,
        check=sampled,
        steps=STEPS[kernels.precision],
        out=out,
    )


def _coarse(system: LinearSystem, found: Found, Y: torch.Tensor) -> tuple[float, Found]:
    """(residual with float64 kernel values where a float32 matrix is to blame for it, else 0; found, measured)."""
    alpha, K = found.alpha, Y.shape[1]
    returned = alpha.to(system.out).double()
    lost = alpha - returned
    rounded = system.out != torch.float64
    rows, both = system.check(torch.cat([alpha, lost], 1) if rounded else alpha)
    R = both[:, :K] + times(system.ridge, alpha)[rows] - Y[rows]
    change = both[:, K:] + times(system.ridge, lost)[rows] if rounded else torch.zeros_like(R)
    found = replace(found, measured=(returned, (rows, R - change)))
    size = float(torch.linalg.vector_norm(Y)) * (len(rows) / len(Y)) ** 0.5
    if size == 0:
        return 0.0, found
    error, floor = (float(torch.linalg.vector_norm(part)) / size for part in (R + found.jitter * alpha[rows], change))
    enough = ENOUGH_OF_FEW if len(Y) <= _FEW else ENOUGH
    return (error if error > max(enough, 4.0 * floor) else 0.0), found


def cholesky(system: LinearSystem, Y: torch.Tensor, wide: bool = False, *, least: float = 0.0) -> Found | None:
    """The solution with the least jitter that has bounded coefficients; the matrix holds a factor afterwards.

    Jitter rises by tens from the rounding of the largest row sum, or from ``least``, where less is expected to be in
    vain: a factor of 50,000 points takes four minutes.

    Under a ridge, large coefficients without jitter stay where they, rounded, meet the targets better than bounded
    ones.
    None where a float32 matrix needs jitter and a float64 one could be had (``wide``).
    """
    matrix = system.matrix
    scale = finite_values(matrix.largest_row_sum()) + float(checks.tensor(system.ridge).min())
    scale = scale if scale > 0 else 1.0  # values of the user's own kernels may be negative
    hopeful = wide and matrix.dtype == torch.float32 and not _is_zero(system.ridge)
    rounding = torch.finfo(matrix.dtype).eps * scale
    jitter, plain = _factor(system, least, rounding, hopeful), None
    while jitter is not None:
        alpha, iterations, singular = _refined(system, Y, jitter)
        excess = 1.0 if singular else system.excess(alpha, Y)
        found = system.found(alpha, jitter, iterations)
        if not excess or jitter >= MAX_JITTER * scale:
            if plain is None:
                return found
            return min(plain, found, key=lambda one: system.residual(one.alpha.to(system.out), Y))
        if not (jitter or singular or _is_zero(system.ridge)):
            plain = found
        matrix.restore()
        least = max(jitter * max(10.0, excess), rounding)
        jitter = None if hopeful else _factor(system, least, rounding, False)
    return None


def _factor(system: LinearSystem, jitter: float, rounding: float, once: bool) -> float | None:
    """Factor in place with the least jitter >= the one given that works; returns it. None if only one try is due."""
    while system.matrix.factor(1.0 + system.ridge + jitter):
        if once:
            return None
        system.matrix.restore()
        jitter = max(10.0 * jitter, rounding)
    return jitter


def _refined(system: LinearSystem, Y: torch.Tensor, jitter: float) -> tuple[torch.Tensor, int, bool]:
    """(alpha, steps, whether the matrix is singular): a float32 factor preconditions float64 conjugate gradients.

    The jitter belongs to the system that is refined: without it that system is not positive definite to rounding.
    """
    matrix = system.matrix

    def by_factor(R: torch.Tensor) -> torch.Tensor:
        return matrix.solve(R.to(matrix.dtype)).double()

    if matrix.dtype == torch.float64:
        return by_factor(Y), 0, False
    options = cg.ConjugateGradients(tolerance=_GOAL, max_iterations=system.steps)
    outcome = cg.conjugate_gradients(lambda V: system.matmul(V).add_(V, alpha=jitter), Y, by_factor, options)
    return outcome.alpha, outcome.iterations, outcome.singular


def _refined_from_points(system: LinearSystem, found: Found, Y: torch.Tensor, steps: int) -> tuple[Found, bool]:
    """(alpha refined with float64 kernel values from the points, whether that was enough): one pass a step."""

    def matmul(V: torch.Tensor) -> torch.Tensor:
        return system.from_points(V).add_(V * found.jitter)

    def by_factor(R: torch.Tensor) -> torch.Tensor:
        return system.matrix.solve(R.to(system.matrix.dtype)).double()

    left = Y - matmul(found.alpha)
    reach = ENOUGH_OF_FEW * 0.1 * float(torch.linalg.vector_norm(Y) / torch.linalg.vector_norm(left))
    options = cg.ConjugateGradients(tolerance=min(0.5, reach), max_iterations=steps)
    outcome = cg.conjugate_gradients(matmul, left, by_factor, options)
    better = replace(found, alpha=found.alpha + outcome.alpha, measured=None)
    return replace(better, iterations=found.iterations + outcome.iterations), not outcome.stopped


def eigh(system: LinearSystem, Y: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(alpha, rank) by eigendecomposition, without the eigenvalues that rounding made up or that alpha cannot bear."""
    finite_values(system.matrix.largest_row_sum())
    K, ridge = system.matrix.K, system.ridge
    assert K is not None
    root = torch.ones((), device=K.device)
    if isinstance(ridge, torch.Tensor):  # of W^1/2 (K + ridge W^-1) W^1/2, whose second part is a multiple of I
        least = float(ridge.min())
        root = (least / ridge).sqrt()[:, None]
        linalg.scale_lower_(K, root)
        ridge = least
    values, vectors = linalg.eigh(K)  # of the lower triangle; the residual reads the upper one
    cut, target = len(K) * torch.finfo(K.dtype).eps * float(values[-1]), vectors.T @ (root * Y)
    while True:
        keep = values + ridge > cut
        alpha = root * (vectors @ (torch.where(keep, 1.0 / (values + ridge), 0.0)[:, None] * target))
        if isinstance(system.ridge, torch.Tensor):  # points that weigh next to nothing, whose eigenvectors are rounding
            of_rows = system.ridge[:, None]
            alpha = torch.where(of_rows > _LIGHT * len(Y), (Y - system.check(alpha)[1]) / of_rows, alpha)
        excess = system.excess(alpha, Y)
        if not excess or int(keep.sum()) <= 1:
            return alpha, int(keep.sum())
        cut *= 10.0
