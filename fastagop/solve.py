"""Kernel ridge(less) regression: (k(X, X) + ridge I) alpha = Y, by factorising one n x n matrix, or without one."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import torch

from fastagop import cg, direct
from fastagop.cg import ConjugateGradients
from fastagop.direct import MAX_JITTER, RESIDUAL, largest
from fastagop.kernels import _checks, keops_ops, torch_blocks
from fastagop.kernels._backends import NAMES, choose, matmul_precision, precision_words, triton_fills
from fastagop.kernels._plan import Plan, block_rows, budget, human, roomy
from fastagop.kernels.errors import BackendUnavailable, warn
from fastagop.kernels.operations import in_units
from fastagop.kernels.radial import Radial

_WORKSPACE = 0.25  # of n^2 items: panels of the factorisation, blocks of the kernel matrix


@dataclass(frozen=True)
class Solution:
    """What ``solve`` found and what it did to find it.

    Attributes:
        alpha: coefficients (n, K), in X's dtype.
        residual: ||(k + ridge I) alpha - Y|| / ||Y|| (Frobenius), of the alpha returned, without the jitter.
        ridge: the ridge asked for.
        jitter: what was added to the diagonal beyond the ridge; 0.0 when nothing.
        method: what ran, "cholesky", "eigh" or "cg".
        dtype: the dtype of the factorisation, or of the products of "cg".
        iterations: steps of "cg", or of float64 refinement after a float32 factorisation.
        rank: eigenvalues kept by "eigh"; rank of the preconditioner of "cg"; n otherwise.
        seconds: wall-clock time.
        stopped: why "cg" ended before its tolerance; "" where it did not.
        tolerance: the residual "cg" was asked for; 0.0 for the others.
    """

    alpha: torch.Tensor
    residual: float
    ridge: float
    jitter: float
    method: str
    dtype: torch.dtype
    iterations: int
    rank: int
    seconds: float
    stopped: str = ""
    tolerance: float = 0.0


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
) -> tuple[Plan, tuple]:
    """(Plan, (X, Y, ridge, how)) of a solve call; how: the factorisation's dtype, or the options of method "cg"."""
    _checks.kernel(kernel)
    options = ConjugateGradients()
    if isinstance(method, ConjugateGradients):
        options, method = method, "cg"
    _checks.choice("method", method, ("auto", "cholesky", "eigh", "cg"))
    _checks.choice("precision", precision, _checks.PRECISIONS)
    ridge, limit = _checks.nonnegative("ridge", ridge), _checks.memory_limit(memory_limit)
    _checks.choice("backend", backend, NAMES)
    _checks.points(X, None)
    _checks.ridge(ridge, X.dtype)
    # KeOps never stores the matrix: it serves the passes of "cg" only.
    chosen, why = choose("auto" if method == "cg" else backend, "solve", kernel, X, precision)
    _checks.matrix("Y", Y, like=X, rows=(len(X), "X"))
    room, reason = budget(limit, X.device), "cg asked for"
    if method != "cg":
        try:
            road, dtype, reason = _road(X, ridge, method, room, chosen == "triton" and precision != "highest")
            plan = _plan_direct(X, Y, road, dtype, f"{why}; {reason}", precision, chosen)
            return plan, (X, Y, ridge, dtype)
        except MemoryError:
            if method != "auto" or chosen == "triton":
                raise
            reason = f"no n x n matrix fits into {human(room)}"
    backend, why = _passes(backend, kernel, X)
    plan, options = cg.plan(X, Y, options, room, backend, f"{why}; {reason}")
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
    copies = 3.0 if method == "eigh" else 1.0 + _WORKSPACE
    extra = 0 if X.dtype == dtype else X.numel() * size
    rows = block_rows(n * size, 0, max(n * size, int(_WORKSPACE * n * n * size) // 3), n, "solve")
    work = n * n * X.shape[1] + (n**3 / 3 if method == "cholesky" else 9 * n**3) + 4.0 * n * n * Y.shape[1]
    words = str(dtype).removeprefix("torch.")
    if dtype != X.dtype or X.dtype == torch.float64:
        words = f"{words} factorisation"
    else:
        words = f"{precision_words(precision, X, backend)} factorisation, float64 refinement"
    if backend == "triton" and not triton_fills(dtype):
        words += " of a matrix from the torch backend: this Triton is older than 3.5 and has no float64 products"
    return Plan("solve", backend, method, why, words, work, int(copies * n * n * size) + extra, rows)


def _road(X: torch.Tensor, ridge: float, method: str, room: int, coarse: bool) -> tuple[str, torch.dtype, str]:
    """(method, dtype of the factorisation, why), or MemoryError with the plan.

    ``coarse``: products below float32's accuracy were asked for, so that the factor is a preconditioner anyway.
    """
    n = len(X)
    need = {t: int((1 + _WORKSPACE) * n * n * t.itemsize) + X.numel() * 8 for t in RESIDUAL}
    if method == "eigh":
        needed, dtype, reason = 3 * n * n * 8, torch.float64, "eigh asked for; it runs in float64"
    elif X.dtype == torch.float64:
        needed, dtype, reason = need[torch.float64], torch.float64, "float64 input"
    elif ridge == 0 and not coarse and need[torch.float64] <= room:
        needed, dtype = need[torch.float64], torch.float64
        reason = "ridge 0 needs float64: near collapse the smallest eigenvalue is below float32 rounding"
    else:
        needed, dtype = need[torch.float32], torch.float32
        reason = "float32 input with a ridge" if ridge else f"a float64 matrix does not fit into {human(room)}"
        if coarse:
            reason = "the precision asked for makes the factor a preconditioner"
    if needed > room:
        largest = int((room / (needed / n**2)) ** 0.5)
        raise MemoryError(
            f"solve with n = {n} needs {human(needed)} ({dtype} matrix of {human(n * n * dtype.itemsize)} and "
            f"its workspace), but {human(room)} may be used; n up to about {largest} fits. "
            "Use fewer points, method='cg', or raise memory_limit where memory is free"
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
) -> Solution:
    """Solve (k(X, X) + ridge I) alpha = Y; ridge 0 is allowed and never gives NaN or a wild solution.

    The matrix exists once and is factored in place, in float64 where X is float64 or where ridge is 0 and memory
    allows, else in float32 with float64 refinement. A failed pivot adds jitter to the diagonal, from rounding
    level upwards by tens; points that the kernel cannot tell apart but whose targets differ raise it further,
    so that coefficients stay bounded. Whatever was done is in the result (paper, algorithm 1).

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

    Returns:
        Solution.

    Raises:
        TypeError, ValueError: naming the argument. MemoryError: with the plan and the largest n that fits.
        BackendUnavailable: the backend cannot serve the call.

    Warns:
        NumericalWarning: once, when jitter was added, eigenvalues were dropped, "cg" ended before its tolerance, or
            the residual exceeds 1e-6 (float64) or 1e-3 (float32).
    """
    plan, (X, Y, ridge, how) = plan_solve(
        kernel,
        X,
        Y,
        ridge=ridge,
        method=method,
        precision=precision,
        backend=backend,
        memory_limit=memory_limit,
    )
    kernel, X, _, _ = in_units(kernel, X, X)
    if isinstance(how, ConjugateGradients):
        with matmul_precision(precision, X.device):
            solution = solve_unstored(kernel, X, Y, ridge, plan, how, X.dtype)
    else:
        K = roomy(len(X), len(X), X, how)
        solution = solve_into(K, kernel, X, Y, ridge, plan, precision, X.dtype)
    report(solution)
    return solution


def solve_into(
    K: torch.Tensor, kernel: Radial, X, Y, ridge: float, plan: Plan, precision: str, out: torch.dtype
) -> Solution:
    """Solve using K (n, n) as the one large matrix; "cholesky" leaves k(X, X) in K's strict upper triangle.

    alpha comes in dtype ``out``: where the kernel matrix is nearly singular, rounding it to float32 costs more than
    everything else, so callers that go on computing ask for float64.
    """
    start, (target, unit) = time.perf_counter(), in_unit(Y.double())
    jitter, iterations, rank = 0.0, 0, len(X)
    with matmul_precision(precision, X.device):
        system = direct.system(K, kernel, X, ridge, plan, precision, out)
        if plan.method == "eigh":
            alpha, rank = direct.eigh(system, target)
        else:
            alpha, jitter, iterations = direct.cholesky(system, target)
        alpha = alpha.to(out)
        residual = system.residual(alpha, target)
    alpha, seconds = _of_unit(alpha, unit), time.perf_counter() - start
    return Solution(alpha, residual, ridge, jitter, plan.method, K.dtype, iterations, rank, seconds)


def in_unit(Y: torch.Tensor, reach: float = 2.0**60) -> tuple[torch.Tensor, float]:
    """(Y / unit, unit), the unit a power of two: 1 where the largest item is within 1 / reach and reach."""
    most = largest(Y)
    if most == 0 or 1.0 / reach <= most <= reach:
        return Y, 1.0
    unit = math.ldexp(1.0, max(-1000, min(1000, math.frexp(most)[1])))
    return Y / unit, unit


def _of_unit(alpha: torch.Tensor, unit: float) -> torch.Tensor:
    alpha = alpha if unit == 1.0 else alpha * unit
    if not _checks.finite(alpha):
        raise ValueError(f"Y is so large that its coefficients leave {alpha.dtype}; divide Y by a constant")
    return alpha


def solve_unstored(
    kernel: Radial,
    X,
    Y,
    ridge: float,
    plan: Plan,
    options: ConjugateGradients,
    out: torch.dtype,
    product=None,
) -> Solution:
    """Solve by conjugate gradients; ``product(kernel, X, X, V, plan)`` -> k(X, X) V may be a sharded one.

    Products run in float64 whatever X's dtype is: in float32 the residual ends at 3e-5 (Laplace) to 1e-3 (Gaussian)
    at n = 4000 already, and at more for more points.
    """
    product = product or (keops_ops if plan.backend == "keops" else torch_blocks).kernel_matmul
    start = time.perf_counter()
    x, (target, unit) = X.double(), in_unit(Y.double())

    def matmul(V, diagonal=ridge):
        return product(kernel, x, x, V, plan).add_(V, alpha=diagonal)

    def columns(index):
        return torch_blocks.kernel_matrix(kernel, x, x[index], None, plan)

    ones = x.new_ones(len(x))  # every profile has phi(0) = 1
    low_rank = cg.preconditioner(cg.pivoted_cholesky(columns, ones, options.rank or 0, ridge, options.seed), ridge)
    scale = float(low_rank.values[-1]) if low_rank else float(len(x))
    outcome, jitter, iterations = _with_jitter(matmul, target, low_rank, options, ridge, scale, out)
    alpha, residual = outcome.alpha.to(out), outcome.residual
    if out != torch.float64 or jitter:
        residual = cg.relative(target - matmul(alpha.double()), target)
    alpha = _of_unit(alpha, unit)
    rank, seconds = low_rank.rank if low_rank else 0, time.perf_counter() - start
    said = {"stopped": outcome.stopped, "tolerance": options.tolerance}
    return Solution(alpha, residual, ridge, jitter, "cg", torch.float64, iterations, rank, seconds, **said)


def _with_jitter(matmul, Y, low_rank, options, ridge: float, scale: float, out: torch.dtype):
    """(outcome, jitter, steps of all tries) with the least jitter, by tens, that has a bounded solution."""
    bound = largest(Y) / torch.finfo(out).eps ** 0.5  # as ``direct.System.excess`` has it
    jitter, iterations = 0.0, 0
    while True:
        outcome = cg.conjugate_gradients(
            functools.partial(matmul, diagonal=ridge + jitter),
            Y,
            low_rank.shifted(jitter) if low_rank else None,
            options,
            bound,
        )
        iterations += outcome.iterations
        if not outcome.singular or jitter >= MAX_JITTER * scale:
            return outcome, jitter, iterations
        jitter = max(10.0 * jitter, torch.finfo(out).eps * scale)


def report(solution: Solution) -> None:
    """Warn once about what was altered, or about a residual larger than the dtype promises."""
    said = []
    if solution.jitter > 0:
        said.append(f"jitter {solution.jitter:.1e} was added to the diagonal beyond the ridge {solution.ridge:.1e}")
    if solution.method == "eigh" and solution.rank < len(solution.alpha):
        said.append(f"{len(solution.alpha) - solution.rank} of {len(solution.alpha)} eigenvalues were dropped")
    if solution.stopped:
        said.append(f"conjugate gradients ended after {solution.iterations} steps because {solution.stopped}")
    if solution.stopped or not solution.residual <= max(RESIDUAL[solution.alpha.dtype], solution.tolerance):
        said.append(f"the relative residual is {solution.residual:.1e}")
    if said:
        remedy = "the kernel matrix is singular to rounding here. A ridge above 0 makes the problem well posed"
        if solution.method == "cg":
            remedy = "a larger rank, more max_iterations or a larger ridge helps"
        warn(f"solve: {' and '.join(said)}; {remedy}")
