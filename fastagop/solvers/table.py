"""The solvers in one table: for whom each is, its matrix's dtype, what it takes, and how it runs.

A solver is added as a row: ``reason`` says when it is the one to take, ``plan`` what it would do, and ``run`` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import Plan, format_bytes
from fastagop.solvers import cg, direct
from fastagop.solvers.cg import ConjugateGradients
from fastagop.solvers.direct import Found, needed_bytes

# Rows up to which a float64 factorisation on the CPU takes about as long as a refined float32 one.
SHORT = 4096
_SAMPLE, _PASSES = 2048, 5  # rows whose residual is measured in float64; passes of refinement at ridge 0


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


@dataclass(frozen=True)
class Problem:
    """A system (k(X, X) + ridge W^-1) alpha = Y as far as the choice of its solver goes.

    Attributes:
        operator: of its kernel and points, by the backend that serves it.
        outputs: columns of Y.
        ridge: mu >= 0.
        room: bytes that may be taken.
        options: of conjugate gradients.
        float64_alpha: the coefficients are wanted in float64.
        advice: for errors of memory.
    """

    operator: KernelOperator
    outputs: int
    ridge: float
    room: int
    options: ConjugateGradients
    float64_alpha: bool
    advice: Advice

    @property
    def X(self) -> torch.Tensor:
        """The points (n, d)."""
        return self.operator.X

    @property
    def coarse(self) -> bool:
        """Products below float32's accuracy were asked for, so that a factor is a preconditioner anyway."""
        return self.operator.backend.factor_kernels(torch.float32, self.operator.precision).coarse

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a Cholesky factorisation in a dtype fits into memory."""
        return needed_bytes(len(self.X), self.X.shape[1], dtype) <= self.room


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes:
        name: the ``method`` it is asked for by.
        dtype: of its matrix, or of its products.
        memory: problem -> bytes.
        seconds: (problem, plan) -> estimated time.
        reason: problem -> why it is the one to take, or None where it is not.
        plan: (problem, reason) -> its Plan and the problem with its options settled.
        run: (problem, plan, targets, ridges, dtype of alpha) -> ``direct.Found`` or ``cg.Found``.
    """

    name: str
    dtype: torch.dtype
    memory: Callable[[Problem], int]
    seconds: Callable[[Problem, Plan], float]
    reason: Callable[[Problem], str | None]
    plan: Callable[[Problem, str], tuple[Plan, Problem]]
    run: Callable[..., Found | cg.Found]


def _direct(name: str, dtype: torch.dtype, reason: Callable[[Problem], str | None]) -> Solver:
    def memory(problem: Problem) -> int:
        n = len(problem.X)
        return 3 * n * n * dtype.itemsize if name == "eigh" else needed_bytes(len(problem.X), problem.X.shape[1], dtype)

    def seconds(problem: Problem, plan: Plan) -> float:
        found = problem.operator.seconds(plan, dtype)
        if dtype == torch.float64:
            return found
        n, d = problem.X.shape
        pairs = 2.0 * min(n, _SAMPLE) * n if problem.ridge else _PASSES * float(n) * n  # in float64, after the factor
        more = replace(plan, flops=pairs * d, method="gram")
        return found + problem.operator.seconds(more, torch.float64, pairs / (float(n) * n))

    def plan(problem: Problem, why: str) -> tuple[Plan, Problem]:
        if memory(problem) > problem.room:
            raise _too_large(problem, dtype, memory(problem))
        return direct.plan(problem, name, dtype, f"{problem.operator.why}; {why}"), problem

    def run(problem: Problem, made: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
        return direct.solve(problem, made, Y, ridge, (dtype, out))

    return Solver(name, dtype, memory, seconds, reason, plan, run)


def _too_large(problem: Problem, dtype: torch.dtype, needed: int) -> MemoryError:
    n = len(problem.X)
    largest = int((problem.room / (needed / n**2)) ** 0.5)
    return MemoryError(
        f"solve with n = {n} needs {format_bytes(needed)} ({dtype} matrix of "
        f"{format_bytes(n * n * dtype.itemsize)} and its workspace), but {format_bytes(problem.room)} may be used; "
        f"n up to about {largest} fits. {problem.advice.direct()}"
    )


def _of_float64(problem: Problem) -> str | None:
    if problem.X.dtype == torch.float64:
        return "float64 input"
    if problem.coarse or not problem.fits(torch.float64):
        return None
    if problem.ridge == 0:
        return "ridge 0 needs float64: near collapse the smallest eigenvalue is below float32 rounding"
    if problem.float64_alpha and len(problem.X) <= SHORT and problem.X.device.type == "cpu":
        return "few rows: float64 takes about as long as float32 and its refinement"
    return None


def _of_float32(problem: Problem) -> str | None:
    if problem.X.dtype == torch.float64:
        return None
    if problem.coarse:
        return "the precision asked for makes the factor a preconditioner"
    if problem.ridge:
        return "float32 input with a ridge"
    return f"a float64 matrix does not fit into {format_bytes(problem.room)}"


TABLE = (
    _direct("cholesky", torch.float64, _of_float64),
    _direct("cholesky", torch.float32, _of_float32),
    _direct("eigh", torch.float64, lambda problem: "eigh asked for; it runs in float64"),
    Solver(
        "cg",
        torch.float64,
        cg.least_bytes,
        lambda problem, plan: problem.operator.seconds(plan, torch.float64, cg.STEPS),
        lambda problem: "cg asked for",
        cg.plan,
        cg.solve,
    ),
)
METHODS = ("auto", *dict.fromkeys(solver.name for solver in TABLE))


def choose(problem: Problem, method: str) -> tuple[Solver, str]:
    """(solver, why) for a method by name, the first of the table's rows of that name that has a reason to be taken."""
    for solver in TABLE:
        if solver.name == method and (reason := solver.reason(problem)) is not None:
            return solver, reason
    raise AssertionError(method)  # the last row of every name always has one
