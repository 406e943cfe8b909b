"""The solvers in one table: for whom each is, its matrix's dtype, what it takes, and how it runs.

A solver is added as a row: ``reason`` says when it is the one to take, ``plan`` what it would do, and ``run`` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastagop.kernels import calibration
from fastagop.kernels.errors import BackendUnavailable
from fastagop.kernels.plan import Plan, format_bytes
from fastagop.kernels.precision import dtype_name
from fastagop.kernels.profile import Kernel
from fastagop.solvers import cg, direct, full_refined, half, pairs, places
from fastagop.solvers.found import Found
from fastagop.solvers.options import CholeskyCG, ConjugateGradients
from fastagop.solvers.problem import HALF, Problem

# Rows up to which a float64 factorisation on the CPU takes about as long as a float32 one and its refinement, where
# alpha is rounded to float32 at the end. Where alpha stays float64, that holds up to ``problem.FULL_MATRIX_ROWS``.
FLOAT64_ROWS = 128
_SAMPLE, _PASSES = 2048, 5  # rows whose residual is measured in float64; passes of refinement at ridge 0


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes:
        name: the ``method`` it is asked for by.
        stores: what lies in memory, in words.
        dtype: of its matrix, or of its products.
        memory: problem -> bytes.
        seconds: (problem, plan) -> estimated time.
        reason: problem -> why it is the one to take, or None where it is not.
        plan: (problem, reason) -> its Plan and the problem with its options settled, or MemoryError.
        run: (problem, plan, targets, ridges, dtype of alpha) -> ``Found``.
        keeps: whether k(X, X) is left in float64 when it has run.
        halves: whether half of a matrix is stored.
        multiplies: whether it stores no matrix and only multiplies by k(X, X): it then asks the backend for products,
            ranks share these out, and the rank that it finds is its preconditioner's. So are all rows of its name.
        offered: by ``offers``: "always", "with a reason" to be taken, or "never", as what nobody saves by.
    """

    name: str
    stores: str
    dtype: torch.dtype
    memory: Callable[[Problem], int]
    seconds: Callable[[Problem, Plan], float]
    reason: Callable[[Problem], str | None]
    plan: Callable[[Problem, str], tuple[Plan, Problem]]
    run: Callable[..., Found]
    keeps: bool = False
    halves: bool = False
    multiplies: bool = False
    offered: Literal["always", "with a reason", "never"] = "always"


def _direct(name: str, dtype: torch.dtype, reason: Callable[[Problem], str | None]) -> Solver:
    def memory(problem: Problem) -> int:
        eigh = name == "eigh"
        return direct.eigh_bytes(len(problem.X), problem.outputs) if eigh else problem.needed_bytes(dtype)

    def seconds(problem: Problem, plan: Plan) -> float:
        found = problem.operator.seconds(plan, dtype, stored=True)
        if dtype == torch.float64:
            return found
        n, d = problem.X.shape
        pairs = 2.0 * min(n, _SAMPLE) * n if problem.ridge else _PASSES * float(n) * n  # in float64, after the factor
        more = replace(plan, flops=pairs * d)
        return found + problem.operator.seconds(more, torch.float64, pairs / (float(n) * n), stored=True)

    def plan(problem: Problem, why: str) -> tuple[Plan, Problem]:
        if memory(problem) > problem.room:
            raise problem.too_large(dtype, memory)
        return direct.plan(problem, name, dtype, f"{problem.operator.why}; {why}"), problem

    def run(problem: Problem, planned: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
        return direct.solve(problem, planned, Y, ridge, (dtype, out))

    return Solver(
        name=name,
        stores=f"{dtype_name(dtype)} matrix",
        dtype=dtype,
        memory=memory,
        seconds=seconds,
        reason=reason,
        plan=plan,
        run=run,
        keeps=dtype == torch.float64,
        offered="never" if name == "eigh" else "always",
    )


def _half(name: str, dtype: torch.dtype, form: half.Form, reason: Callable[[Problem], str | None]) -> Solver:
    """A row of ``half``; ``dtype`` is its factor's."""

    def plan(problem: Problem, why: str) -> tuple[Plan, Problem]:
        peak = form.memory(problem)
        if peak > problem.room:
            raise problem.too_large(dtype, form.memory)
        form.check_host(problem)
        places.check_disk(problem, form.dtypes)
        return half.plan(problem, name, f"{problem.operator.why}; {why}", form, peak), problem

    def seconds(problem: Problem, plan: Plan) -> float:
        return form.seconds(problem)

    return Solver(
        name=name,
        stores=form.stores,
        dtype=dtype,
        memory=form.memory,
        seconds=seconds,
        reason=reason,
        plan=plan,
        run=form.run,
        keeps=form.keeps,
        halves=True,
    )


def _of_half(problem: Problem) -> str | None:
    """Why half of a float64 matrix is factored in place: no full one fits, or a float32 factor gave way. Or None."""
    if problem.coarse or not half.IN_PLACE.fits(problem):
        return None
    if problem.gave_way and problem.many_rows:
        return f"no float32 factor is tried: {problem.gave_way}"
    small = problem.X.dtype == torch.float32 and not problem.large and problem.ridge > 0
    full = problem.fits(torch.float64) or small
    return None if full else f"a full float64 matrix does not fit into {format_bytes(problem.room)}"


def of_full_refined(problem: Problem) -> str | None:
    """Why a fit's few thousand float32 points on the CPU take a float32 factor beside a full k(X, X), or None."""
    alone = problem.X.device.type == "cpu" and problem.shared is None and not problem.coarse
    fit = problem.float64_alpha and problem.X.dtype == torch.float32 and problem.ridge > 0 and problem.outputs > 0
    fits = problem.half == HALF and full_refined.bytes_of(problem) <= problem.room
    few_thousand = len(problem.X) > full_refined.FLOAT64_ROWS and not problem.many_rows
    if problem.gave_way or not (alone and fit and fits and few_thousand):
        return None
    return "a few thousand rows: a float32 factor and steps on it take less time than a float64 factor"


def _of_refined(problem: Problem) -> str | None:
    if not (half.REFINED.fits(problem) and places.fits_disk(problem, half.REFINED.dtypes)):
        return None
    return f"k(X, X) is read once a step for all outputs{_by_rates(problem)}"


def _by_rates(problem: Problem) -> str:
    """On a GPU, the times that decide between a float64 factor and a float32 one."""
    if not problem.rated:
        return ""
    refined, wide, device = half.refined_seconds(problem), half.in_place_seconds(problem), problem.X.device
    return (
        f"; a float32 factor and its refinement take about {refined:.2g} s, a float64 one {wide:.2g} s "
        f"({calibration.source(device)})"
    )


def _refinement_pays(problem: Problem) -> bool:
    """Whether a refined float32 factor is faster on a GPU: some chips' float64 is slow, others have split products."""
    if not problem.rated or not half.REFINED.fits(problem):
        return False
    return half.refined_seconds(problem) < half.in_place_seconds(problem)


def _of_float64(problem: Problem) -> str | None:
    if problem.X.dtype == torch.float64 and (problem.fits(torch.float64) or _of_half(problem) is None):
        return "float64 input"
    if problem.coarse or not problem.fits(torch.float64) or (problem.gave_way and _of_half(problem)):
        return None
    if problem.large:
        return "one factorisation was asked for, and float64 needs no refinement"
    if problem.ridge == 0:
        needed = "ridge 0 needs float64: near collapse the smallest eigenvalue is below float32 rounding"
        return f"{needed}{_by_rates(problem)}"
    few = not problem.many_rows if problem.float64_alpha else len(problem.X) <= FLOAT64_ROWS
    if few and problem.X.device.type == "cpu":
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


def _plan_full_refined(problem: Problem, why: str) -> tuple[Plan, Problem]:
    if full_refined.bytes_of(problem) > problem.room:
        raise problem.too_large(torch.float32, full_refined.bytes_of)
    return full_refined.plan(problem, f"{problem.operator.why}; {why}"), problem


FULL_REFINED = Solver(
    name="cholesky+cg",
    stores="a float64 matrix and its float32 factor",
    dtype=torch.float32,
    memory=full_refined.bytes_of,
    seconds=lambda problem, plan: half.refined_seconds(problem),
    reason=of_full_refined,
    plan=_plan_full_refined,
    run=full_refined.run,
    keeps=True,
    offered="with a reason",
)
EIGH = _direct("eigh", torch.float64, lambda problem: "eigh asked for; it runs in float64")
CG = Solver(
    name="cg",
    stores="no matrix",
    dtype=torch.float64,
    memory=cg.least_bytes,
    seconds=lambda problem, plan: problem.operator.seconds(plan, torch.float64, cg.STEPS),
    reason=lambda problem: "cg asked for",
    plan=cg.plan,
    run=cg.solve,
    multiplies=True,
)
TABLE = (
    FULL_REFINED,
    _half("cholesky+cg", torch.float32, half.REFINED, _of_refined),
    _half("cholesky+cg", torch.float32, half.FROM_POINTS, lambda problem: "k(X, X) does not fit beside its factor"),
    _direct("cholesky", torch.float64, _of_float64),
    _half("cholesky", torch.float64, half.IN_PLACE, _of_half),
    _direct("cholesky", torch.float32, _of_float32),
    EIGH,
    CG,
)
# For kernels that are not radial: no row above is made for a diagonal that is not 1, or for values of either sign.
PAIRS = (
    replace(
        _direct("cholesky", torch.float64, lambda problem: "a kernel that is not radial is factored in float64"),
        run=pairs.cholesky,
        keeps=False,
    ),
    replace(EIGH, run=pairs.eigh, keeps=False),
    replace(CG, run=pairs.conjugate_gradients),
)
Method = str | ConjugateGradients | CholeskyCG
OPTIONS = {ConjugateGradients: "cg", CholeskyCG: "cholesky+cg"}  # the methods that options are those of


_OPERATIONS = {False: "solve", True: "solve with method 'cg'"}  # what a backend is asked for, by ``multiplies``


def operation_of(method: str) -> str:
    """The operation that a method asks a backend for; "auto" begins with the one that stores a matrix."""
    return _OPERATIONS[any(solver.multiplies for solver in TABLE if solver.name == method)]


def methods() -> tuple[str, ...]:
    """The words that ``method=`` takes, "auto" and the plain factorisation before the table's other names."""
    return tuple(dict.fromkeys(("auto", "cholesky", *(solver.name for solver in TABLE))))


def order(problem: Problem) -> tuple[str, ...]:
    """The methods that "auto" tries, until one fits into memory.

    Small problems take one matrix in full, and a fit's of more than 512 points two. Large ones of float32 points take
    a float32 factor where k(X, X) fits beside it, else the faster of a float64 factor and of a float32 one without
    k(X, X); on a GPU one matrix in full, but for chips on which a float64 factor takes longer than a float32 one and
    its refinement.
    """
    if problem.X.dtype == torch.float64 or not problem.operator.kernel.radial or problem.gave_way:
        return "cholesky", "cg"
    if of_full_refined(problem) or _refinement_pays(problem):
        return "cholesky+cg", "cholesky", "cg"
    if not problem.large:
        return "cholesky", "cholesky+cg", "cg"
    if _of_refined(problem) or half.from_points_seconds(problem) < half.in_place_seconds(problem):
        return "cholesky+cg", "cholesky", "cg"
    return "cholesky", "cholesky+cg", "cg"


def _rows(problem: Problem) -> tuple[Solver, ...]:
    """The rows that are made for a problem's kernel."""
    return TABLE if problem.operator.kernel.radial else PAIRS


def offers(problem: Problem) -> list[str]:
    """What the rows of the table would take of seconds and bytes, in words."""
    lines = []
    stores = problem.operator.serves("solve")  # a backend may only multiply
    for solver in _rows(problem):
        if solver.offered == "never" or not (stores or solver.multiplies):
            continue
        if solver.offered == "with a reason" and solver.reason(problem) is None:
            continue
        try:
            plan, settled = solver.plan(problem, "")
            cost = f"about {solver.seconds(settled, plan):.2g} s, {format_bytes(plan.peak_bytes)}"
        except MemoryError:
            cost = f"{format_bytes(solver.memory(problem))}, which does not fit"
        lines.append(f"{solver.name}, {solver.stores}: {cost}")
    return lines


def refuse(kernel: Kernel, method: str, options: ConjugateGradients) -> None:
    """Refuse what has no row for kernels that are not radial, or stores half of a matrix for its products."""
    names = tuple(dict.fromkeys(solver.name for solver in PAIRS))
    if kernel.radial or (method in ("auto", *names) and not options.store):
        return
    wish = "ConjugateGradients(store=True)" if options.store else f"method={method!r}"
    halves = options.store or any(solver.halves for solver in TABLE if solver.name == method)
    reason = "stores half of a matrix with a diagonal of 1, for radial kernels" if halves else "is for radial kernels"
    raise BackendUnavailable(
        f"{wish} cannot serve {kernel!r}: it {reason}; use method={', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
    )


def choose(problem: Problem, method: str) -> tuple[Solver, str]:
    """(solver, why) for a method by name, the first of the table's rows of that name that has a reason to be taken."""
    for solver in _rows(problem):
        if solver.name == method and (reason := solver.reason(problem)) is not None:
            return solver, reason
    raise AssertionError(f"the last row of {method!r} must always have a reason")
