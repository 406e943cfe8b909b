"""Kernel ridge(less) regression: (k(X, X) + ridge I) alpha = Y, by the solver that the table names.

``prepare`` checks and plans, which ``fastagop.explain`` prints; what it returns runs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from fastagop.kernels import checks
from fastagop.kernels.kernel_operator import KernelOperator, product_of_points
from fastagop.kernels.plan import Plan, budget, format_bytes
from fastagop.kernels.profile import Kernel
from fastagop.kernels.scaling import scale_points
from fastagop.solvers import bandwidth, copies, float64_small, table
from fastagop.solvers.copies import Rows
from fastagop.solvers.limits import RESIDUAL, bound, over_weights, relative, times, worst_column
from fastagop.solvers.options import CholeskyCG, ConjugateGradients
from fastagop.solvers.places import check_place
from fastagop.solvers.problem import HALF, Advice, Problem, Shared
from fastagop.solvers.solution import Solution, Solved, warn_about
from fastagop.solvers.table import Method, Solver

ADVICE = Advice()


@dataclass(frozen=True)
class SolveOptions:
    """How a system is solved: arguments of ``fastagop.solve``, and what other callers want otherwise.

    Attributes:
        ridge, method, precision, backend, memory_limit: as in ``fastagop.solve``.
        float64_alpha: the coefficients are wanted in float64.
        advice: for errors of memory.
        shared: who holds half of a matrix together.
        gave_way: why a float32 factor gave way earlier in a fit, so that "auto" tries none; "" where none did.
        least_jitter: what the solve before in a fit needed, with which a float64 factor in place begins.
    """

    ridge: float = 0.0
    method: Method = "auto"
    precision: str = "highest"
    backend: str = "auto"
    memory_limit: float | None = None
    float64_alpha: bool = False
    advice: Advice = ADVICE
    shared: Shared | None = None
    gave_way: str = ""
    least_jitter: float = 0.0


@dataclass(frozen=True)
class PreparedSolve:
    """A system, checked and planned, of which nothing has run.

    Attributes:
        problem: the system at the points X.
        solver: that will run.
        plan: what it will do.
    """

    problem: Problem
    solver: Solver
    plan: Plan

    def solve_small_in_float64(self, Y: torch.Tensor, rows: Rows, out: torch.dtype) -> Solved | None:
        """The solution of a few hundred points without copies and weights by one float64 matrix; None of others.

        Arguments as of ``run``.
        """
        float64 = self.plan.method == "cholesky" and self.solver.dtype == torch.float64 and not self.solver.halves
        if not (float64 and rows.plain and self.problem.operator.kernel.radial):
            return None
        operator = self.problem.operator
        found = float64_small.solve(operator.kernel, operator.X, Y, self.problem.ridge, out)
        return None if found is None else found.solved

    @property
    def _gave_way(self) -> str:
        """Why a float32 factor was not tried, where the solver would have been another one otherwise."""
        wide = self.plan.method == "cholesky" and self.solver.dtype == torch.float64
        return self.problem.gave_way if wide else ""

    def seconds(self) -> float:
        """Estimated time of the solve in seconds."""
        return self.solver.seconds(self.problem, self.plan)

    def offers(self) -> list[str]:
        """What this and the other solvers would take, in words."""
        return table.offers(self.problem)

    @torch.no_grad()
    def run(self, Y: torch.Tensor, rows: Rows, out: torch.dtype, *, apart: bool = False, **shared):
        """(Solved at the points of given targets Y (n, K), k(X, X): above a matrix's diagonal, or half of it, or None).

        alpha comes in dtype ``out``: where the kernel matrix is nearly singular, rounding it to float32 costs more than
        everything else, so callers that go on computing ask for float64.

        Args:
            Y: targets of the rows given.
            rows: how those became points.
            apart: copies whose targets differ get coefficients that differ, where the ridge keeps these small; else
                they share one.
            **shared: for a solver whose products other processes take part in.
        """
        problem, operator = self.problem, self.problem.operator
        start, task = time.perf_counter(), _Task.of(Y, problem.ridge, rows, out, apart)
        note = bandwidth.note(operator.points, operator.kernel)
        with operator.products():
            found = self.solver.run(problem, self.plan, task.target, task.ridge, out, **shared)
            answer = task.answer(found.alpha)
            residuals = task.residuals(*found.unmet(answer.seen, task.target), answer)
        method = found.method or self.plan.method
        rank = found.rank if self.solver.multiplies else found.rank + len(Y) - len(problem.X)
        solved = task.solved(
            answer,
            ridge=problem.ridge,
            jitter=found.jitter,
            method=method,
            dtype=found.dtype,
            iterations=found.iterations,
            rank=rank,
            stopped=found.stopped,
            tolerance=found.tolerance,
            note=note,
            fallback=found.fallback or self._gave_way,
            **residuals,
            seconds=time.perf_counter() - start,
        )
        return solved, found.K


def prepare(kernel, X, Y, options: SolveOptions, sample_weight=None) -> PreparedSolve:
    """The solve of a system as it will run: arguments checked, the solver chosen, its plan made."""
    checks.kernel(kernel)
    asked = options.method
    method: str = table.OPTIONS.get(type(asked), asked)  # pyright: ignore[reportAssignmentType] (checked next)
    checks.choice("method", method, table.methods())
    iteration = asked if isinstance(asked, ConjugateGradients) else ConjugateGradients()
    half = asked if isinstance(asked, CholeskyCG) else HALF
    checks.choice("precision", options.precision, checks.PRECISIONS)
    ridge, limit = checks.nonnegative("ridge", options.ridge), checks.memory_limit(options.memory_limit)

    def problem(operation: str) -> Problem:
        operator = KernelOperator(operation, kernel, X, precision=options.precision, backend=options.backend)
        checks.ridge(ridge, X.dtype)
        checks.matrix("Y", Y, like=X, rows=(len(X), "X"))
        checks.sample_weight(sample_weight, X, "solve")
        room = budget(limit, X.device)
        check_place(half, X.device)
        return Problem(
            operator=operator,
            outputs=Y.shape[1],
            ridge=ridge,
            room=room,
            options=iteration,
            float64_alpha=options.float64_alpha,
            advice=options.advice,
            half=half,
            shared=options.shared,
            gave_way=options.gave_way if method == "auto" else "",
            least_jitter=options.least_jitter,
        )

    table.refuse(kernel, method, iteration)
    operation = table.operation_of(method)
    stored = problem(operation)
    if method != "auto":
        return _prepared(stored, method, None)
    first: MemoryError | None = None
    for name in table.order(stored):
        if (other := table.operation_of(name)) != operation:
            if not stored.operator.serves(other):
                break
            return _prepared(problem(other), name, f"no n x n matrix fits into {format_bytes(stored.room)}")
        try:
            return _prepared(stored, name, None)
        except MemoryError as error:
            first = first or error
    assert first is not None
    raise first


def _prepared(problem: Problem, method: str, reason: str | None) -> PreparedSolve:
    solver, asked = table.choose(problem, method)
    plan, problem = solver.plan(problem, reason or asked)
    return PreparedSolve(problem, solver, plan)


@torch.no_grad()
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
) -> Solution:
    """Solve (k(X, X) + ridge W^-1) alpha = Y; ridge 0 is allowed and never gives NaN or a wild solution.

    Rows that X's dtype cannot tell apart are one point: m of them under a ridge mu are one under mu / m with their mean
    target, and share its coefficient, or differ by what their targets ask for where a ridge keeps that small. Weights
    W = diag(sample_weight) count as copies do; 1 each by default.

    Up to a few thousand points one matrix is factored in place, in float64 where X is float64 or ridge is 0, else in
    float32 with float64 refinement. More float32 points take half of the matrix in float64 and half of its factor in
    float32, on which conjugate gradients reach 1e-10; where they do not, a float64 factor takes the matrix's place. A
    failed pivot adds jitter to the diagonal, from rounding level upwards by tens; close points whose targets differ
    raise it, so that coefficients stay bounded. Whatever was done is in the result (paper, algorithm 1).

    Where memory is short, kernel values are made anew from the points at every step of conjugate gradients,
    preconditioned by a factor while one fits, else by a low-rank one; the rule for jitter is the same. A problem
    that they cannot bring to their tolerance is reported, with the best alpha found.

    Args:
        kernel, X, Y, ridge: a kernel such as ``Laplace(2.0)``, points (n, d), targets (n, K), mu >= 0 on the diagonal.
        method: "cholesky" (one factorisation), "cholesky+cg" (a float32 factor refined with float64 kernel values),
            "eigh" (float64, eigenvalues below n eps of the largest dropped), "cg" (no n x n matrix), or with options
            ``fastagop.CholeskyCG(...)`` or ``fastagop.ConjugateGradients(...)``; "auto" is the fastest that fits.
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
            residual exceeds 1e-6 (float64) or 1e-3 (float32), or that of a column twice as much, copies contradict
            each other at ridge 0, or every kernel value is 0 or 1.
    """
    options = SolveOptions(ridge=ridge, method=method, precision=precision, backend=backend, memory_limit=memory_limit)
    prepared = prepare(kernel, X, Y, options, sample_weight)
    rows = copies.find(X, sample_weight)
    small = prepared.solve_small_in_float64(Y, rows, X.dtype)
    if small is not None and small.solution.column_residual <= RESIDUAL[X.dtype]:
        return small.solution
    if not rows.plain:  # fewer points may take another solver
        prepared = prepare(kernel, rows.take(X), rows.take(Y), options)
    solution = as_given(prepared.run(Y, rows, X.dtype, apart=True)[0].solution, kernel, X, Y, rows)
    warn_about(solution, columns=True)
    return solution


def as_given(solution: Solution, kernel: Kernel, X: torch.Tensor, Y: torch.Tensor, rows: Rows) -> Solution:
    """The solution with the residual of the rows as they were given, where copies equal each other to rounding only."""
    if rows.exact:
        return solution
    kernel, X, _, _ = scale_points(kernel, X, X)
    (y, unit), live = scale_targets(Y.double()), rows.live
    x, y, alpha = X.double()[live], y[live], solution.alpha.double()[live] / unit
    some, R = product_of_points(kernel, x, alpha.shape[1]).sampled(alpha)
    R = R + over_weights(solution.ridge, rows.each[live][some])[:, None] * alpha[some] - y[some]
    residual = relative(R * (len(y) / len(some)) ** 0.5, y)
    return replace(solution, residual=residual, residual_rows=len(Y) if len(some) == len(y) else len(some))


@dataclass(frozen=True)
class _Task:
    """The system of the points that rows were merged into, in a power-of-two unit of the targets.

    Attributes:
        target: mean targets (r, K), float64.
        ridge: a number, or one for each point (r,).
        unit: of the targets.
        copied: what the residual of the rows given needs beyond it.
        rows, contradictions, out: as elsewhere.
    """

    target: torch.Tensor
    ridge: float | torch.Tensor
    unit: float
    copied: copies.Given | None
    rows: Rows
    contradictions: int
    out: torch.dtype

    @classmethod
    def of(cls, Y: torch.Tensor, ridge: float, rows: Rows, out: torch.dtype, apart: bool) -> _Task:
        """The task of targets as they were given (n, K); ``apart``: copies meet their own targets where they can."""
        y, unit = scale_targets(Y.double())
        target, weights = rows.means(y), rows.weights
        ridges = ridge if weights is None or ridge == 0 else over_weights(ridge, weights)
        copied = rows.given(y, target, ridge, bound(y, out) if apart else 0.0)
        return cls(
            target=target,
            ridge=ridges,
            unit=unit,
            copied=copied,
            rows=rows,
            contradictions=rows.contradictions(y, target),
            out=out,
        )

    def answer(self, alpha: torch.Tensor) -> _Answer:
        """The coefficients that are returned, from those found for the points."""
        points = unscale_coefficients(alpha.to(self.out), self.unit)
        if self.copied is None:
            return _Answer(points, self.rows.shared(points), points.double() / self.unit, None)
        rows = unscale_coefficients(self.copied.rows(alpha, self.out), self.unit)
        seen = rows.double() / self.unit
        return _Answer(points, self.rows.among_all(rows), self.copied.summed(seen, len(alpha)), seen)

    def residuals(self, index: torch.Tensor, R: torch.Tensor, answer: _Answer) -> dict:
        """Residuals of the rows given and of the points, from those (s, K) of some points."""
        grow, size = len(self.target) / max(1, len(index)), float(torch.linalg.vector_norm(self.target))
        merged = (grow * float(R.square().sum())) ** 0.5
        merged = merged / size if size > 0 else 0.0
        measured = len(self.rows.group) if len(index) == len(self.target) else len(index)
        column = {"column_residual": worst_column(R, self.target)}
        if self.copied is None or answer.rows is None:
            return {"residual": merged, "residual_rows": measured, **column}
        part = times(self.ridge, answer.seen)
        total = self.copied.squares(R, index, answer.rows, part) ** 0.5
        literal = total / self.copied.size if self.copied.size > 0 else 0.0
        return {"residual": literal, "merged_residual": merged, "residual_rows": measured, **column}

    def solved(self, answer: _Answer, **fields) -> Solved:
        """The Solution of all rows given, and the points' coefficients."""
        found = Solution(alpha=answer.all, merged=self.rows.merged, contradictions=self.contradictions, **fields)
        return Solved(found, answer.points)


@dataclass(frozen=True)
class _Answer:
    """Coefficients in the dtype that was asked for.

    Attributes:
        points: of the points (r, K).
        all: of the rows given (n, K).
        seen: what the rows' add up to for each point, in the task's unit, float64 (r, K).
        rows: of the rows that have a weight, in the task's unit, float64; None where they are the points'.
    """

    points: torch.Tensor
    all: torch.Tensor
    seen: torch.Tensor
    rows: torch.Tensor | None


def scale_targets(Y: torch.Tensor, reach: float = 2.0**60) -> tuple[torch.Tensor, float]:
    """(Y / unit, unit), the unit a power of two: 1 where the largest item is within 1 / reach and reach."""
    size = checks.largest(Y)
    if size == 0 or 1.0 / reach <= size <= reach:
        return Y, 1.0
    unit = math.ldexp(1.0, max(-1000, min(1000, math.frexp(size)[1])))
    return Y / unit, unit


def unscale_coefficients(alpha: torch.Tensor, unit: float) -> torch.Tensor:
    """Coefficients of targets that were divided by a unit, as those of the targets themselves."""
    alpha = alpha if unit == 1.0 else alpha * unit
    if not checks.finite(alpha):
        raise ValueError(
            f"Y is so large that its coefficients leave {alpha.dtype}, or the kernel so small; divide Y by a constant, "
            "or multiply the kernel"
        )
    return alpha
