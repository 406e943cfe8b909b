"""Kernel ridge(less) regression: (k(X, X) + ridge I) alpha = Y, by factorising one n x n matrix, or without one."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastagop.kernels import checks
from fastagop.kernels.backends import NAMES, choose, describe_precision, triton_fills
from fastagop.kernels.errors import BackendUnavailable
from fastagop.kernels.keops_backend import reductions
from fastagop.kernels.plan import Plan, block_rows, budget, format_bytes
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.radial import Radial
from fastagop.kernels.scaling import scale_points
from fastagop.kernels.torch_backend import tiles
from fastagop.solvers import bandwidth, cg, copies, direct
from fastagop.solvers.cg import ConjugateGradients
from fastagop.solvers.copies import Rows
from fastagop.solvers.direct import MAX_JITTER, RESIDUAL, largest
from fastagop.solvers.solution import Solution, Solved, report

_SHORT = 4096  # rows up to which a float64 factorisation on the CPU takes about as long as a refined float32 one


@dataclass(frozen=True)
class Advice:
    """What a caller's user can change where memory is short: the words of its error."""

    method: str = "method"
    limit: str = "raise memory_limit where memory is free"

    def direct(self) -> str:
        """Where no matrix fits."""
        return f"Use fewer points, {self.method}='cg', or {self.limit}"

    def iterative(self) -> str:
        """Where not even the vectors of "cg" fit."""
        return (
            f"Use fewer points, a smaller rank in {self.method}=fastagop.ConjugateGradients(rank=...), or {self.limit}"
        )


ADVICE = Advice()


def plan_solve(
    kernel,
    X,
    Y,
    *,
    ridge: float = 0.0,
    method: str | ConjugateGradients = "auto",
    precision: str = "highest",
    backend: str = "auto",
    memory_limit: float | None = None,
    sample_weight: torch.Tensor | None = None,
    advice: Advice = ADVICE,
    wide: bool = False,
) -> tuple[Plan, tuple]:
    """(Plan, (X, Y, ridge, how)) of a solve call.

    how: (the factorisation's dtype, bytes that may be taken), or the options of method "cg". ``advice``: what the
    caller's user can change where memory is short. ``wide``: alpha is wanted in float64.
    """
    checks.kernel(kernel)
    options = ConjugateGradients()
    if isinstance(method, ConjugateGradients):
        options, method = method, "cg"
    checks.choice("method", method, ("auto", "cholesky", "eigh", "cg"))
    checks.choice("precision", precision, checks.PRECISIONS)
    ridge, limit = checks.nonnegative("ridge", ridge), checks.memory_limit(memory_limit)
    checks.choice("backend", backend, NAMES)
    checks.points(X, None)
    checks.ridge(ridge, X.dtype)
    # KeOps never stores the matrix: it serves the passes of "cg" only.
    chosen, why = choose("auto" if method == "cg" else backend, "solve", kernel, X, precision)
    checks.matrix("Y", Y, like=X, rows=(len(X), "X"))
    checks.sample_weight(sample_weight, X, "mean")
    room, reason = budget(limit, X.device), "cg asked for"
    if method != "cg":
        try:
            coarse = chosen == "triton" and precision != "highest"
            road, dtype, reason = _road(X, ridge, method, room, coarse, advice, wide)
            plan = _plan_direct(X, Y, road, dtype, f"{why}; {reason}", precision, chosen)
            if dtype == torch.float32 and ridge > 0:
                plan = _with_second_try(plan, X, room)
            return plan, (X, Y, ridge, (dtype, room))
        except MemoryError:
            if method != "auto" or chosen == "triton":
                raise
            reason = f"no n x n matrix fits into {format_bytes(room)}"
    backend, why = _passes(backend, kernel, X)
    plan, options = cg.plan(X, Y, options, room, backend, f"{why}; {reason}", advice)
    return plan, (X, Y, ridge, options)


def _passes(backend: str, kernel: Radial, X: torch.Tensor) -> tuple[str, str]:
    """(backend, why) of the float64 passes of "cg"."""
    if backend == "triton":
        raise BackendUnavailable(
            "backend 'triton' cannot serve solve with method 'cg': these products are in float64; use "
            "backend='torch' or 'auto' to compute without it"
        )
    return choose(backend, "kernel_matmul", kernel, X, pairs=cg.STEPS * float(len(X)) ** 2)


def _plan_direct(X, Y, method: str, dtype: torch.dtype, why: str, precision: str, backend: str) -> Plan:
    """The road with one n x n matrix."""
    n, size = len(X), dtype.itemsize
    copies = 3.0 if method == "eigh" else 1.0 + direct.WORKSPACE
    extra = 0 if X.dtype == dtype else X.numel() * size
    rows = block_rows(n * size, 0, max(n * size, int(direct.WORKSPACE * n * n * size) // 3), n, "solve")
    work = n * n * X.shape[1] + (n**3 / 3 if method == "cholesky" else 9 * n**3) + 4.0 * n * n * Y.shape[1]
    words = str(dtype).removeprefix("torch.")
    if dtype != X.dtype or X.dtype == torch.float64:
        words = f"{words} factorisation"
    else:
        words = f"{describe_precision(precision, X, backend)} factorisation, float64 refinement"
    if backend == "triton" and not triton_fills(dtype):
        words += " of a matrix from the torch backend: this Triton is older than 3.5 and has no float64 products"
    return Plan("solve", backend, method, why, words, work, int(copies * n * n * size) + extra, rows)


def _with_second_try(plan: Plan, X: torch.Tensor, room: int) -> Plan:
    """The plan of a float32 matrix with what a float64 one takes, where that fits: it may turn out to be needed."""
    needed = direct.needed_bytes(len(X), X.shape[1], torch.float64)
    if needed > room:
        return replace(plan, precision=f"{plan.precision} from the points where its matrix is too coarse")
    more = f"; a float64 matrix where the float32 one leaves a residual above {direct.ENOUGH:.0e}"
    return replace(plan, precision=plan.precision + more, peak_bytes=max(plan.peak_bytes, needed))


def _road(
    X: torch.Tensor, ridge: float, method: str, room: int, coarse: bool, advice: Advice, wide: bool
) -> tuple[str, torch.dtype, str]:
    """(method, dtype of the factorisation, why), or MemoryError with the plan.

    ``coarse``: products below float32's accuracy were asked for, so that the factor is a preconditioner anyway.
    """
    n = len(X)
    need = {dtype: direct.needed_bytes(n, X.shape[1], dtype) for dtype in RESIDUAL}
    if method == "eigh":
        needed, dtype, reason = 3 * n * n * 8, torch.float64, "eigh asked for; it runs in float64"
    elif X.dtype == torch.float64:
        needed, dtype, reason = need[torch.float64], torch.float64, "float64 input"
    elif ridge == 0 and not coarse and need[torch.float64] <= room:
        needed, dtype = need[torch.float64], torch.float64
        reason = "ridge 0 needs float64: near collapse the smallest eigenvalue is below float32 rounding"
    elif wide and n <= _SHORT and X.device.type == "cpu" and not coarse and need[torch.float64] <= room:
        needed, dtype = need[torch.float64], torch.float64
        reason = "few rows: float64 takes about as long as float32 and its refinement"
    else:
        needed, dtype = need[torch.float32], torch.float32
        reason = "float32 input with a ridge" if ridge else f"a float64 matrix does not fit into {format_bytes(room)}"
        if coarse:
            reason = "the precision asked for makes the factor a preconditioner"
    if needed > room:
        largest = int((room / (needed / n**2)) ** 0.5)
        raise MemoryError(
            f"solve with n = {n} needs {format_bytes(needed)} ({dtype} matrix of "
            f"{format_bytes(n * n * dtype.itemsize)} and its workspace), but {format_bytes(room)} may be used; "
            f"n up to about {largest} fits. {advice.direct()}"
        )
    return ("cholesky" if method == "auto" else method), dtype, reason


@torch.no_grad()
def solve(
    kernel: Radial,
    X: torch.Tensor,
    Y: torch.Tensor,
    *,
    ridge: float = 0.0,
    method: str | ConjugateGradients = "auto",
    precision: str = "highest",
    backend: str = "auto",
    memory_limit: float | None = None,
    sample_weight: torch.Tensor | None = None,
) -> Solution:
    """Solve (k(X, X) + ridge W^-1) alpha = Y; ridge 0 is allowed and never gives NaN or a wild solution.

    Rows that X's dtype cannot tell apart are one point: m of them under a ridge mu are one under mu / m with their mean
    target, and share its coefficient, or differ by what their targets ask for where a ridge keeps that small. Weights
    W = diag(sample_weight) count as copies do; 1 each by default.

    The matrix exists once and is factored in place, in float64 where X is float64 or where ridge is 0 and memory
    allows, else in float32 with float64 refinement, and in float64 after all where float32 values leave a residual
    above 1e-5 and memory allows. A failed pivot adds jitter to the diagonal, from rounding level upwards by tens; close
    points whose targets differ raise it further, so that coefficients stay bounded. Whatever was done is in the result
    (paper, algorithm 1).

    Where no such matrix fits, preconditioned conjugate gradients solve for all outputs at once, with one float64 pass
    over all pairs a step, and with the same rule for jitter. A problem that they cannot bring to their tolerance is
    reported, with the best alpha found.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: points (n, d). Y: targets (n, K).
        ridge: mu >= 0 on the diagonal.
        method: "cholesky", "eigh" (float64, eigenvalues below n eps of the largest dropped), "cg" (no n x n matrix)
            or ``fastagop.ConjugateGradients(...)`` for "cg" with options; "auto" is "cholesky", and "cg" where that
            does not fit.
        precision, backend: as in ``kernel_matrix``.
        memory_limit: bytes the call may take beyond its inputs; default most of what is free.
        sample_weight: weights (n,) >= 0 of X's dtype; a row of weight 0 is left out, its coefficient is 0.

    Returns:
        Solution.

    Raises:
        TypeError, ValueError: naming the argument. MemoryError: with the plan and the largest n that fits.
        BackendUnavailable: the backend cannot serve the call.

    Warns:
        NumericalWarning: once, when jitter was added, eigenvalues were dropped, "cg" ended before its tolerance, the
            residual exceeds 1e-6 (float64) or 1e-3 (float32), copies contradict each other at ridge 0, or the bandwidth
            makes every kernel value 0 or 1.
    """
    options = {"ridge": ridge, "method": method, "precision": precision, "backend": backend}
    plan, (X, Y, ridge, how) = plan_solve(
        kernel, X, Y, memory_limit=memory_limit, sample_weight=sample_weight, **options
    )
    rows, points = copies.find(X, sample_weight), X
    if not rows.plain:  # fewer points may take another road
        points = rows.take(X)
        plan, (_, _, _, how) = plan_solve(kernel, points, rows.take(Y), memory_limit=memory_limit, **options)
    if isinstance(how, ConjugateGradients):
        with matmul_precision(precision, X.device):
            solved = solve_unstored(kernel, points, Y, ridge, plan, how, X.dtype, rows, apart=True)
    else:
        solved, _ = solve_stored(kernel, points, Y, ridge, plan, how, precision, X.dtype, rows, apart=True)
    solution = as_given(solved.solution, kernel, X, Y, rows)
    report(solution)
    return solution


def as_given(solution: Solution, kernel: Radial, X: torch.Tensor, Y: torch.Tensor, rows: Rows) -> Solution:
    """The solution with the residual of the rows as they were given, where copies equal each other to rounding only."""
    if rows.exact:
        return solution
    kernel, X, _, _ = scale_points(kernel, X, X)
    (y, unit), live = scale_targets(Y.double()), rows.live
    x, y, alpha = X.double()[live], y[live], solution.alpha.double()[live] / unit
    some, R = direct.sample_product(kernel, x, alpha, tiles.plan_kernel_matmul(x, x, alpha, "", ""))
    R = R + (solution.ridge / rows.each[live][some])[:, None] * alpha[some] - y[some]
    residual = cg.relative(R * (len(y) / len(some)) ** 0.5, y)
    return replace(solution, residual=residual, residual_rows=len(Y) if len(some) == len(y) else len(some))


def solve_stored(
    kernel: Radial,
    X,
    Y,
    ridge: float,
    plan: Plan,
    how: tuple[torch.dtype, int],
    precision: str,
    out: torch.dtype,
    rows: Rows,
    *,
    apart: bool = False,
) -> tuple[Solved, torch.Tensor]:
    """(solved, matrix with k(X, X) in its strict upper triangle) at the points X (r, d) of given targets Y (n, K).

    alpha comes in dtype ``out``: where the kernel matrix is nearly singular, rounding it to float32 costs more than
    everything else, so callers that go on computing ask for float64. ``apart``: copies whose targets differ get
    coefficients that differ, where the ridge keeps these small; else they share one.
    """
    start, task = time.perf_counter(), _Task.of(Y, ridge, rows, out, apart)
    note = bandwidth.note(kernel, X)
    kernel, X, _, _ = scale_points(kernel, X, X)
    with matmul_precision(precision, X.device):
        found = direct.solve(kernel, X, task.target, task.ridge, plan, how, precision, out)
        answer = task.answer(found.alpha)
        residuals = task.residuals(*found.unmet(answer.seen, task.target), answer)
    made = {"jitter": found.jitter, "method": plan.method, "dtype": found.system.K.dtype, "note": note}
    made |= {
        "iterations": found.iterations,
        "rank": found.rank + len(Y) - len(X),
        "seconds": time.perf_counter() - start,
    }
    return task.solved(answer, ridge=ridge, **residuals, **made), found.system.K


def solve_unstored(
    kernel: Radial,
    X,
    Y,
    ridge: float,
    plan: Plan,
    options: ConjugateGradients,
    out: torch.dtype,
    rows: Rows,
    product: Callable | None = None,
    *,
    apart: bool = False,
) -> Solved:
    """Solve by conjugate gradients; ``product(kernel, X, X, V, plan)`` -> k(X, X) V may be a sharded one.

    Products run in float64 whatever X's dtype is: in float32 the residual ends at 3e-5 (Laplace) to 1e-3 (Gaussian)
    at n = 4000 already, and at more for more points.
    """
    product = product or (reductions if plan.backend == "keops" else tiles).kernel_matmul
    start, task = time.perf_counter(), _Task.of(Y, ridge, rows, out, apart)
    note = bandwidth.note(kernel, X)
    kernel, X, _, _ = scale_points(kernel, X, X)
    x, every = X.double(), torch.arange(len(X), device=X.device)

    def matmul(V, jitter=0.0):
        return product(kernel, x, x, V, plan).add_(direct.times(task.ridge + jitter, V))

    def columns(index):
        return tiles.kernel_matrix(kernel, x, x[index], None, plan)

    low_rank = cg.preconditioner_of(columns, x.new_ones(len(x)), task.ridge, options)  # every profile has phi(0) = 1
    outcome, jitter, iterations = _with_jitter(matmul, task.target, low_rank, options, out)
    answer = task.answer(outcome.alpha)
    residuals = task.residuals(every, matmul(answer.seen).sub_(task.target), answer)
    made = {"jitter": jitter, "method": "cg", "dtype": torch.float64, "iterations": iterations}
    made |= {"rank": low_rank.rank if low_rank else 0, "stopped": outcome.stopped, "tolerance": options.tolerance}
    made |= {"note": note, "seconds": time.perf_counter() - start}
    return task.solved(answer, ridge=ridge, **residuals, **made)


@dataclass(frozen=True)
class _Task:
    """The system of the points that rows were merged into, in a power-of-two unit of the targets.

    Attributes:
        target: mean targets (r, K), float64. ridge: a number, or one for each point (r,). unit: of the targets.
        given: what the residual of the rows given needs beyond it. rows, contradictions, out: as elsewhere.
    """

    target: torch.Tensor
    ridge: float | torch.Tensor
    unit: float
    given: copies.Given | None
    rows: Rows
    contradictions: int
    out: torch.dtype

    @classmethod
    def of(cls, Y: torch.Tensor, ridge: float, rows: Rows, out: torch.dtype, apart: bool) -> _Task:
        """The task of targets as they were given (n, K); ``apart``: copies meet their own targets where they can."""
        y, unit = scale_targets(Y.double())
        target, weights = rows.means(y), rows.weights
        ridges = ridge if weights is None or ridge == 0 else ridge / weights
        given = rows.given(y, target, ridge, direct.bound(y, out) if apart else 0.0)
        return cls(target, ridges, unit, given, rows, rows.contradictions(y, target), out)

    def answer(self, alpha: torch.Tensor) -> _Answer:
        """The coefficients that are returned, from those found for the points."""
        points = unscale_coefficients(alpha.to(self.out), self.unit)
        if self.given is None:
            return _Answer(points, self.rows.shared(points), points.double() / self.unit, None)
        rows = unscale_coefficients(self.given.rows(alpha, self.out), self.unit)
        seen = rows.double() / self.unit
        return _Answer(points, self.rows.among_all(rows), self.given.summed(seen, len(alpha)), seen)

    def residuals(self, index: torch.Tensor, R: torch.Tensor, answer: _Answer) -> dict:
        """Residuals of the rows given and of the points, from those (s, K) of some points."""
        grow, size = len(self.target) / max(1, len(index)), float(torch.linalg.vector_norm(self.target))
        merged = (grow * float(R.square().sum())) ** 0.5
        merged = merged / size if size > 0 else 0.0
        measured = len(self.rows.group) if len(index) == len(self.target) else len(index)
        if self.given is None or answer.rows is None:
            return {"residual": merged, "residual_rows": measured}
        part = direct.times(self.ridge, answer.seen)
        total = self.given.squares(R, index, answer.rows, part) ** 0.5
        literal = total / self.given.size if self.given.size > 0 else 0.0
        return {"residual": literal, "merged_residual": merged, "residual_rows": measured}

    def solved(self, answer: _Answer, **made) -> Solved:
        """The Solution of all rows given, and the points' coefficients."""
        found = Solution(alpha=answer.all, merged=self.rows.merged, contradictions=self.contradictions, **made)
        return Solved(found, answer.points)


@dataclass(frozen=True)
class _Answer:
    """Coefficients in the dtype that was asked for.

    Attributes:
        points: of the points (r, K). all: of the rows given (n, K).
        seen: what the rows' add up to for each point, in the task's unit, float64 (r, K).
        rows: of the rows that have a weight, in the task's unit, float64; None where they are the points'.
    """

    points: torch.Tensor
    all: torch.Tensor
    seen: torch.Tensor
    rows: torch.Tensor | None


def scale_targets(Y: torch.Tensor, reach: float = 2.0**60) -> tuple[torch.Tensor, float]:
    """(Y / unit, unit), the unit a power of two: 1 where the largest item is within 1 / reach and reach."""
    most = largest(Y)
    if most == 0 or 1.0 / reach <= most <= reach:
        return Y, 1.0
    unit = math.ldexp(1.0, max(-1000, min(1000, math.frexp(most)[1])))
    return Y / unit, unit


def unscale_coefficients(alpha: torch.Tensor, unit: float) -> torch.Tensor:
    """Coefficients of targets that were divided by a unit, as those of the targets themselves."""
    alpha = alpha if unit == 1.0 else alpha * unit
    if not checks.finite(alpha):
        raise ValueError(f"Y is so large that its coefficients leave {alpha.dtype}; divide Y by a constant")
    return alpha


def _with_jitter(matmul, Y, low_rank, options, out: torch.dtype):
    """(outcome, jitter, steps of all tries) with the least jitter, by tens, that has a bounded solution."""
    scale = low_rank.largest if low_rank else float(len(Y))
    jitter, iterations = 0.0, 0
    while True:
        outcome = cg.conjugate_gradients(
            functools.partial(matmul, jitter=jitter),
            Y,
            low_rank.shifted(jitter) if low_rank else None,
            options,
            direct.bound(Y, out),
        )
        iterations += outcome.iterations
        if not outcome.singular or jitter >= MAX_JITTER * scale:
            return outcome, jitter, iterations
        jitter = max(10.0 * jitter, torch.finfo(out).eps * scale)
