"""Kernel regression and the AGOP of its predictor, from one n x n matrix where that loses nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastagop.distributed.engine import LOCAL, Fit, Local, Predictor
from fastagop.estimators import float64_fit, mixed_fit, rounding
from fastagop.kernels import checks
from fastagop.kernels.families.composition import Multiple
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask, budget, fits
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.profile import Kernel, Profile
from fastagop.kernels.scaling import scale_points
from fastagop.kernels.torch_backend import costs, smooth, tiles
from fastagop.solvers import copies, full_refined, problem
from fastagop.solvers.copies import Rows
from fastagop.solvers.pairs import unit_of
from fastagop.solvers.problem import Advice
from fastagop.solvers.solution import Solution, Solved, as_before
from fastagop.solvers.solve import SolveOptions, scale_targets
from fastagop.solvers.symmetric_blocks import SymmetricBlocks
from fastagop.solvers.table import Method

log = logging.getLogger("fastagop")

AGOP_SCALES = ("max", "mean", "sum")
_ADVICE = Advice("solver", "raise memory_limit where memory is free")
_LEAST = torch.finfo(torch.float64).tiny  # of the largest entry of an AGOP: below it float64 loses digits of it
_FULL = 12  # bytes an item of a float64 matrix in full beside half of it
_READ = 2**26  # bytes beyond which free memory is read, which takes as long as a small solve
_MODERATE = 2.0**20  # values of a kernel that is not radial, which go up to it or down to its inverse as they are


@dataclass(frozen=True)
class KernelRidge:
    """A kernel regression's kernel and ridge, and how it computes.

    ``solver``: any ``method`` of ``fastagop.solve``; ``memory_limit``: bytes that a step may take; ``gave_way``: why
    a float32 factor gave way in an earlier solve of a fit.
    """

    kernel: Kernel
    ridge: float
    precision: str
    backend: str
    solver: Method = "auto"
    memory_limit: float | None = None
    gave_way: str = ""
    least_jitter: float = 0.0

    def after(self, solution: Solution | None) -> KernelRidge:
        """The same for the next solve of a fit: what the one before has tried in vain is not tried again."""
        if solution is None:
            return self
        gave_way = as_before(solution.fallback) if solution.fallback else self.gave_way
        if (gave_way, solution.jitter) == (self.gave_way, self.least_jitter):
            return self
        return replace(self, gave_way=gave_way, least_jitter=solution.jitter)

    @property
    def options(self) -> SolveOptions:
        """How a solve computes; alpha is wanted in float64."""
        return SolveOptions(
            ridge=self.ridge,
            method=self.solver,
            precision=self.precision,
            backend=self.backend,
            memory_limit=self.memory_limit,
            float64_alpha=True,
            advice=_ADVICE,
            gave_way=self.gave_way,
            least_jitter=self.least_jitter,
        )


def solve(
    X: torch.Tensor, Y: torch.Tensor, regression: KernelRidge, engine: Local = LOCAL, *, rows: Rows | None = None
) -> Solved:
    """The kernel regression's solution, alpha in float64.

    Args:
        X: points (r, d).
        Y: targets (n, K) of the rows given.
        regression: what is solved.
        engine: who does the work.
        rows: how the rows became points; default as they are.
    """
    rows = rows or copies.alone(X)
    if mirrored(Y):
        return _both(solve(X, Y[:, 1:], regression, engine, rows=rows))
    if (fitted := _fit_float64(X, Y, regression, engine, rows)) is not None:
        return fitted.solved
    if isinstance(found := _fit_mixed(X, Y, regression, engine, rows, weights=False), mixed_fit.MixedFit):
        return found.solved
    return engine.solve(regression.kernel, X, Y, _after(found, regression).options, rows).solved


def _after(gave_way: str, regression: KernelRidge) -> KernelRidge:
    """The regression where a float32 factor gave way in this very solve, if it did."""
    if not gave_way:
        return regression
    log.info("solve: %s; a float64 factor takes over", gave_way)
    return replace(regression, gave_way=gave_way)


def mirrored(Y: torch.Tensor) -> bool:
    """Whether the second of two columns is the first one's negative, as with two classes: one of them says all."""
    return Y.shape[1] == 2 and bool((Y[:, 0] == -Y[:, 1]).all())


def _both(solved: Solved) -> Solved:
    """What was solved for the second column, for both."""
    alpha, points = (torch.cat([-a, a], 1) for a in (solved.solution.alpha, solved.alpha))
    return Solved(replace(solved.solution, alpha=alpha), points)


def _fit_float64(X, Y, regression: KernelRidge, engine: Local, rows: Rows) -> float64_fit.Float64Fit | None:
    """The solution of a small problem without copies and weights, by "auto" on torch; None of any other."""
    limit = regression.memory_limit
    plain = rows.plain and type(engine) is Local and regression.solver == "auto" and regression.kernel.radial
    usual = plain and regression.backend in ("auto", "torch")
    if not usual or (limit is not None and limit < float64_fit.bytes_of(X, Y)):
        return None
    return float64_fit.fit(regression.kernel, X, Y, float(regression.ridge))


def _fit_mixed(X, Y, regression: KernelRidge, engine: Local, rows: Rows, *, weights: bool) -> mixed_fit.MixedFit | str:
    """The solution of a usual problem of some thousand points; of any other why a float32 factor gave way, or ""."""
    if not (rows.plain and type(engine) is Local and takes_mixed(X, Y, regression)):
        return ""
    return mixed_fit.fit(regression.kernel, X, Y, float(regression.ridge), weights)


def takes_mixed(X: torch.Tensor, Y: torch.Tensor, regression: KernelRidge) -> bool:
    """Whether rows without copies, of one process, are solved by ``mixed_fit``, as ``table.of_full_refined`` says."""
    usual = regression.solver == "auto" and not regression.gave_way and regression.backend in ("auto", "torch")
    usual = usual and regression.kernel.radial and regression.ridge > 0 and Y.shape[1] > 0
    few_thousand = full_refined.FLOAT64_ROWS < len(X) <= problem.FULL_MATRIX_ROWS
    if not (usual and X.dtype == torch.float32 and X.device.type == "cpu" and few_thousand):
        return False
    needed, limit = mixed_fit.bytes_of(X, Y), regression.memory_limit
    return (limit is None and needed <= _READ) or fits(needed, limit, X.device)


def fit_and_agop(
    X: torch.Tensor,
    Y: torch.Tensor,
    regression: KernelRidge,
    engine: Local = LOCAL,
    *,
    rows: Rows | None = None,
    center: bool = False,
    diagonal: bool = False,
    mark: Callable[[str], None] = lambda stage: None,
) -> tuple[Solved, torch.Tensor, int]:
    """(what was solved, AGOP summed over rows, planned bytes); K becomes the weights where that loses nothing.

    The AGOP is float64: small eigenvalues of M, whose square roots come next, keep what rounding would take. Where no
    (n, n) matrix fits, or "cg" is asked for, conjugate gradients solve. Rows count in M by their weights.

    Args:
        X: points (r, d).
        Y: targets (n, K) of the rows given.
        rows: how those became points; default as they are.
        center: subtract the mean gradient.
        diagonal: the diagonal of the AGOP only, (d,).
        mark: called with "solve" and with "agop" when these are done.
    """
    rows = rows or copies.alone(X)
    if mirrored(Y):
        how = {"rows": rows, "center": center, "diagonal": diagonal, "mark": mark}
        solved, M, planned = fit_and_agop(X, Y[:, 1:], regression, engine, **how)
        return _both(solved), M.mul_(2.0), planned
    fitted = _fit_float64(X, Y, regression, engine, rows)
    if fitted is not None and (M := fitted.agop(center, diagonal)) is not None:
        mark("solve")
        mark("agop")
        return fitted.solved, M, float64_fit.bytes_of(X, Y)
    if isinstance(found := _fit_mixed(X, Y, regression, engine, rows, weights=True), mixed_fit.MixedFit):
        mark("solve")
        planned = mixed_fit.bytes_of(X, Y)
        if (M := found.agop(center, diagonal)) is not None:
            mark("agop")
            return found.solved, M, planned
        solved, matrix = found.solved, found.K
        del found
    else:
        solved, matrix, planned = engine.solve(regression.kernel, X, Y, _after(found, regression).options, rows)
        mark("solve")
    held = [Fit(solved, matrix, planned)]
    del matrix
    task = AgopTask("sum", center, limit=regression.memory_limit, weights=rows.weights)
    M, planned = _agop_after(held, X, regression, engine, task, diagonal)
    mark("agop")
    return solved, M, planned


def _agop_after(
    held: list[Fit], X: torch.Tensor, regression: KernelRidge, engine: Local, task: AgopTask, diagonal: bool
) -> tuple[torch.Tensor, int]:
    """(AGOP, planned bytes) of a solve, which is taken from the list: its matrix goes as soon as it is not needed."""
    solved, matrix, planned = held.pop()
    kernel, alpha, extreme = _of_usual_size(regression.kernel, X, solved.alpha)
    alpha, size = scale_targets(alpha, mixed_fit.SQUARABLE)
    kernel, X, _, unit = scale_points(kernel, X, X)
    weights, heaviest = _of_usual_weight(task.weights)
    task = replace(task, weights=weights)
    wide = extreme or _float64_pays(kernel, X, alpha, task.center, weights, engine)
    M = None
    if wide and not (extreme or diagonal) and type(engine) is Local and regression.backend in ("auto", "torch"):
        M = _beside_a_line(kernel, X, alpha, task)
    if M is None:
        K = None if diagonal else _weights_(kernel, matrix, X, alpha.shape[1], regression.memory_limit)
        if isinstance(K, torch.Tensor) and isinstance(matrix, SymmetricBlocks):
            planned = max(planned, _FULL * len(X) ** 2)
        del matrix  # it is given back where it has become something else
        predictor = _predictor(kernel, X, alpha, regression, wide)
        weights = None if weights is None else weights.to(predictor.X)
        task = replace(task, weights=weights, rounded=wide and X.dtype == torch.float32)
        M = engine.agop_diagonal(predictor, task) if diagonal else _agop(predictor, K, task, engine)
    return _of_size(M.double(), unit, size, heaviest), planned


def _predictor(kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, regression: KernelRidge, wide: bool) -> Predictor:
    """The predictor whose AGOP is taken: of float64 points, by whoever serves them, where that is due."""
    if not wide:
        return Predictor(kernel, X, alpha, regression.precision, regression.backend)
    said = "agop: float32 coefficients would cost more than %.0e of the gradients; computing in float64"
    log.info(said, rounding.LIMIT)
    return Predictor(kernel, X.double(), alpha, regression.precision, "auto")


def _beside_a_line(kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, task: AgopTask) -> torch.Tensor | None:
    """The AGOP of many float32 points and float64 coefficients with products in float32; None where they lose too much.

    ``python -m bench coefficients`` has it beside products in float64.
    """
    if len(X) <= problem.FULL_MATRIX_ROWS or not smooth.pays(X, alpha.shape[1]):
        return None
    with matmul_precision("highest", X.device):
        try:
            rows, _ = smooth.plan_rows(X, alpha, task.center, budget(task.limit, X.device))
        except MemoryError:
            return None
        if (line := rounding.line_of(kernel, X, alpha, task.center, task.weights)) is None:
            return None
        log.info("agop: weights are a + b r^2 and a rest, which is multiplied in float32 and the line in float64")
        roots = None if task.weights is None else task.weights.sqrt().to(X.dtype)
        return smooth.agop(line, X, alpha, rows, center=task.center, roots=roots)


def _of_usual_size(kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor) -> tuple[Kernel, torch.Tensor, bool]:
    """(kernel, coefficients, whether to take the AGOP in float64) of the same predictor, its kernel's values about 1.

    Values of a kernel that is not radial, or the points, may be of a size of which float32 does not hold the squares.
    """
    if kernel.radial or not len(X):
        return kernel, alpha, False
    unit, size = unit_of(kernel, X), checks.largest(X)
    if 1.0 / _MODERATE <= unit <= _MODERATE and 1.0 / mixed_fit.SQUARABLE <= size <= mixed_fit.SQUARABLE:
        return kernel, alpha, False
    return Multiple(1.0 / unit, kernel), alpha * unit, X.dtype != torch.float64


def _agop(
    predictor: Predictor, W: torch.Tensor | SymmetricBlocks | None, task: AgopTask, engine: Local
) -> torch.Tensor:
    """The AGOP from stored weights, which are overwritten, or from the points where there are none."""
    if W is None:
        return engine.agop(predictor, task)
    kernel, X, alpha, precision, backend = predictor
    operator = KernelOperator("agop", kernel, X, precision=precision, backend=backend)
    if isinstance(W, SymmetricBlocks):
        return operator.agop_from_tiles(_tiles_(W, X, alpha, task), alpha, task.center, task.weights)
    return operator.agop_from_weights_(W, alpha, task.center, task.weights, task.limit)


def _weights_(
    kernel: Profile, K: torch.Tensor | SymmetricBlocks | None, X: torch.Tensor, outputs: int, limit: float | None
) -> torch.Tensor | SymmetricBlocks | None:
    """Float64 kernel values become the weights, in place: they hold every small distance, so no pair is measured again.

    Half of a matrix becomes a full one where the gram form is faster and fits. None where values have been given up, or
    the kernel has no closed form for it.
    """
    if K is None or K.dtype != torch.float64:
        return None
    if isinstance(K, torch.Tensor):
        return tiles.weights_from_upper_(kernel, K)
    if kernel.weight_from_value_(X.new_empty(0)) is None:
        return None
    K.apply_(kernel.weight_from_value_, 0.0)
    return K.full() if full_bytes(X, outputs, limit) else K


def full_bytes(X: torch.Tensor, outputs: int, limit: float | None) -> int:
    """Bytes of a full float64 matrix beside half of it, where the gram form is faster and they fit, else 0.

    Products in X's dtype take no more: they are of numbers in the full one's memory.
    """
    products, needed = costs.products_of(X, None, symmetric=True), _FULL * len(X) ** 2
    seconds = costs.costs(X, X, outputs, products, symmetric=True)
    return needed if seconds["gram"] < seconds["gradient"] and needed <= budget(limit, X.device) else 0


def _tiles_(W: SymmetricBlocks, X: torch.Tensor, alpha: torch.Tensor, task: AgopTask):
    """(rows, their weights in X's dtype) of half of a matrix, in as many rows as fit beside it."""
    held = W.bytes if task.limit is not None and W.place == "device" else 0  # a limit is for the device's memory
    room = budget(task.limit, X.device) - held
    rows, _ = costs.gradient_form_beside(X, alpha, X, task.center, room)
    return W.row_tiles(rows, X.dtype)


def _float64_pays(kernel: Kernel, X, alpha, center: bool, weights, engine: Local) -> bool:
    """Whether the AGOP of float32 points is computed in float64; every rank says so where the first one does."""
    if X.dtype == torch.float64:
        return False
    wide = rounding.costs(kernel, X, alpha, center, weights)
    return bool(engine.broadcast(X.new_full((1,), float(wide))))


def _of_usual_weight(weights: torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    """(weights over a power of two, that power), so that float32 holds the largest; float32 has no 1e-60 and 1e40."""
    if weights is None or not len(weights):
        return weights, 1.0
    unit = math.ldexp(1.0, math.frexp(float(weights.max()))[1] - 1)
    return weights / unit, unit


def _of_size(M: torch.Tensor, unit: float, size: float, weight: float) -> torch.Tensor:
    """The AGOP of points, coefficients and weights that many times as large."""
    before = checks.largest(M)
    M = M.div_(unit).mul_(size).mul_(weight).div_(unit).mul_(size)
    if not checks.finite(M):
        raise ValueError(
            "y is so large that the AGOP of its predictor leaves float64; divide y, or sample_weight, by a constant, "
            "or multiply X by one"
        )
    if before >= _LEAST > checks.largest(M):
        raise ValueError(
            "y is so small that the AGOP of its predictor leaves float64; multiply y, or sample_weight, by a constant, "
            "or divide X by one"
        )
    return M


def agop_divisor(M: torch.Tensor, scale: str, n: float) -> float:
    """What ``agop_scale`` divides an AGOP summed over rows of total weight n by; 1 where "max" would divide by zero."""
    if scale == "max":
        largest = float(M.max())
        return largest if largest > 0 else 1.0
    return float(n) if scale == "mean" else 1.0


def holds(dtype: torch.dtype, size: float) -> bool:
    """Whether a dtype holds numbers of which the largest has that size, with all of its digits."""
    return size == 0 or torch.finfo(dtype).tiny <= size <= torch.finfo(dtype).max


def refuse_scale(size: float, scale: str, dtype: torch.dtype, what: str = "M") -> None:
    """Refuse M, or its root, of a size that the dtype of a fit does not hold: "mean" and "sum" leave the units of y."""
    if not holds(dtype, size):
        raise ValueError(
            f"agop_scale={scale!r} makes entries of {what} up to {size:.1e}, which {dtype} does not hold; use "
            "agop_scale='max', multiply y or X by a constant, or use dtype='float64'"
        )
