"""The plan of an estimator's fit: its layers or iterations, their seconds and memory, and what would not fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.base import clone

from fastagop import estimates
from fastagop.distributed.communicator import Communicator
from fastagop.estimates import assumption, on_meta, stand_in
from fastagop.estimators import inputs, mixed_fit
from fastagop.estimators.kernel_ridge import KernelRidge, full_bytes, takes_mixed
from fastagop.kernels import calibration, checks
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask, Plan, available_bytes, budget, format_bytes
from fastagop.kernels.precision import dtype_name
from fastagop.kernels.profile import Kernel, unsettled
from fastagop.kernels.torch_backend import costs
from fastagop.kernels.torch_backend import diagonal as torch_diagonal
from fastagop.solvers.bandwidth import settled_at
from fastagop.solvers.solve import PreparedSolve, prepare
from fastagop.solvers.table import Solver

_CLASSES = 10  # assumed of labels that hold no values


@dataclass(frozen=True)
class Data:
    """What a fit would train on: n rows, d features, K outputs, and tensors of these shapes that take no memory."""

    X: torch.Tensor
    Y: torch.Tensor
    assumed: tuple[str, ...]

    def of_width(self, width: int) -> torch.Tensor:
        """The rows of X with another number of features (n, width), which take no memory."""
        return self.X[:1, :1].expand(len(self.X), width)


@dataclass(frozen=True)
class Step:
    """One layer or iteration: seconds of its parts by name, peak bytes, how it solves, and what does not fit."""

    seconds: dict[str, float]
    peak_bytes: int
    solver: str
    refused: str = ""

    @property
    def total(self) -> float:
        """Seconds of the step, the sum over its parts."""
        return sum(self.seconds.values())


def explain_fit(estimator, X, y, sample_weight=None) -> str:
    """The text of ``fastagop.explain(estimator, X, y)``; parameters and data are checked as fit would."""
    fresh: Any = clone(estimator)  # the estimator stays as it is
    if isinstance(fresh.kernel, Kernel) and unsettled(fresh.kernel):  # no plan depends on a bandwidth
        fresh.set_params(kernel=settled_at(fresh.kernel, torch.zeros(1, 1, device="cpu")))
    planned = fresh._planned_fit()  # of checked parameters
    data = data_of(fresh, X, y, sample_weight)
    share = 1 if fresh.process_group is None else Communicator(fresh.process_group, "explain", data.X.device).size
    steps, held = planned(data, share)
    return text_of(type(fresh).__name__, data, steps, held, share)


def data_of(estimator, X, y, sample_weight) -> Data:
    """Shapes from tensors without numbers, everything else read as fit would."""
    assumed, device = [], estimator._device
    if on_meta(X):
        if X.ndim != 2 or 0 in X.shape or not X.is_floating_point():
            raise ValueError(f"X must be a floating matrix (n, d), got {X.dtype} of shape {tuple(X.shape)}")
        n, d = X.shape
    else:
        n, d = inputs.matrix(estimator, X, reset=True).shape
    if on_meta(X) or on_meta(y):
        assumed.append(assumption(device))
    classes, targets = hasattr(estimator, "class_weight"), y if on_meta(y) else estimator._validated_targets(y)
    inputs.same_length("y", targets, n)
    weights = None if on_meta(sample_weight) else inputs.weights(sample_weight, n)
    K = targets.shape[1] if targets.ndim == 2 else 1
    if classes and on_meta(y):
        K = _CLASSES
        assumed.append(f"labels on meta hold no classes: {_CLASSES} are taken for granted")
    elif classes:
        kept = slice(None) if weights is None else weights > 0
        Y, _, weights = estimator._targets(targets[kept], None if weights is None else weights[kept])
        n, K = Y.shape
    n = n if weights is None else int((weights > 0).sum())
    blank = torch.zeros((1, 1), dtype=inputs.dtype(estimator.dtype), device=device)
    return Data(blank.expand(n, d), stand_in(blank.expand(n, K), device), tuple(assumed))


def iteration_steps(
    data: Data,
    regression: KernelRidge,
    share: int,
    task: AgopTask,
    fit: tuple[int, bool],
    rows: tuple[int, int] | None = None,
) -> tuple[list[tuple[str, int, Step]], int]:
    """The steps of a recursive feature machine, and the bytes that it keeps.

    Args:
        fit: (iterations, diagonal).
        rows: (those that M is learnt from, those that are validated); default all and none.

    Fewer rows than features are learnt from in their span, in float64.
    """
    (n, d), (iterations, diagonal), steps = data.X.shape, fit, []
    learn, scored = rows or (n, 0)
    span = bool(iterations) and not diagonal and learn < d and regression.kernel.rotation_invariant
    width, blank = (learn, data.X[:1, :1].double()) if span else (d, data.X[:1, :1])
    X, Y = blank.expand(learn, width), blank.expand(learn, data.Y.shape[1])
    size, kept = X.element_size(), (width if diagonal else width * width) * X.element_size()
    if span:
        seconds = calibration.seconds(6.0 * d * learn * learn, 0.0, X.device, "gram", "float64")
        steps.append((f"span of {learn} rows", 1, Step({"factor": seconds}, 3 * 8 * learn * d, "")))
    score = {}
    if scored:
        work = calibration.seconds(2.0 * scored * learn * width, float(scored) * learn, X.device, "gradient", "float64")
        score = {"score": work + estimates.of_products(2.0 * scored * d * width, blank.double())}
    if iterations:
        step = step_of(X, Y, regression, share, task, diagonal)
        project = 0.0 if diagonal else estimates.of_products(2.0 * learn * width * width, X)
        root = 0.0 if diagonal else root_seconds(learn, width, X.device) + project
        step.seconds.update(root=root, **score)
        peak = step.peak_bytes + learn * width * size + (0 if diagonal else 4 * 8 * width * width)
        name = "iteration" if iterations == 1 else f"{iterations} iterations"
        steps.append((f"{name}, {width} features", iterations, dataclasses.replace(step, peak_bytes=peak)))
    last = solve_only(blank.expand(n, width), blank.expand(n, data.Y.shape[1]), regression)
    steps.append((f"last solve, {width} features", 1, last))
    # roots of all iterations, for staged_predict, and the last M
    held = kept * (iterations + 1 if iterations else 2) + 8 * (n + learn * iterations) * data.Y.shape[1]
    return steps, held + (8 * learn * d if span else 0)


def solve_only(X: torch.Tensor, Y: torch.Tensor, regression: KernelRidge) -> Step:
    """A kernel regression by itself."""
    try:
        prepared = prepare(regression.kernel, X, Y, regression.options)
    except MemoryError as error:
        return Step({}, 0, "", str(error))
    return Step({"solve": prepared.seconds()}, _solve_peak(prepared), _solver(prepared.plan))


def _solve_peak(prepared: PreparedSolve) -> int:
    """The plan's peak, or that of the float64 matrix which takes over where a float32 one is found too coarse."""
    needed = prepared.problem.needed_bytes(torch.float64)
    coarse = prepared.plan.method == "cholesky" and prepared.solver.dtype == torch.float32
    coarse = coarse and prepared.problem.fits(torch.float64)
    return max(prepared.plan.peak_bytes, needed) if coarse else prepared.plan.peak_bytes


def step_of(X, Y, regression: KernelRidge, share: int, task: AgopTask, diagonal: bool = False) -> Step:
    """A kernel regression and its AGOP; of ``share`` ranks each makes its part of the AGOP, and of products."""
    try:
        prepared = prepare(regression.kernel, X, Y, regression.options)
    except MemoryError as error:
        return Step({}, 0, "", str(error))
    plan = prepared.plan
    apart = prepared.seconds() / (share if prepared.solver.multiplies else 1)
    try:
        solver = prepared.solver
        seconds, peak = _agop_diagonal(X, Y, regression) if diagonal else _agop(X, Y, regression, task, solver)
    except MemoryError as error:
        return Step({"solve": apart}, plan.peak_bytes, _solver(plan), str(error))
    peak = max(_solve_peak(prepared), peak)
    if share == 1 and takes_mixed(X, Y, regression):
        peak = max(peak, mixed_fit.bytes_of(X, Y))
    return Step({"solve": apart, "agop": seconds / share}, peak, _solver(plan))


def _agop_diagonal(X, Y, regression: KernelRidge) -> tuple[float, int]:
    """(seconds, peak bytes) of the AGOP's diagonal."""
    (n, d), K = X.shape, Y.shape[1]
    limit = budget(checks.memory_limit(regression.memory_limit), X.device)
    _, peak = torch_diagonal.plan_rows(X, K, limit)
    flops = costs.flops(n, n, d, K, True)["gradient"] - 2.0 * n * K * d * d
    return calibration.seconds(flops, float(n) * n, X.device, "gradient", dtype_name(X.dtype)), peak


def _agop(X, Y, regression: KernelRidge, task: AgopTask, solver: Solver) -> tuple[float, int]:
    """(seconds, peak bytes) of the AGOP; the weights that a solver keeps were counted there."""
    if solver.keeps:
        products = costs.products_of(X, None, symmetric=True)
        seconds = min(costs.costs(X, X, Y.shape[1], products, symmetric=True).values())
        return seconds, full_bytes(X, Y.shape[1], regression.memory_limit) if solver.halves else 0
    served = {"precision": regression.precision, "backend": regression.backend}
    task = dataclasses.replace(task, limit=regression.memory_limit)
    call = KernelOperator("agop", regression.kernel, X, **served).agop(Y, task)
    return call.seconds(), call.plan.peak_bytes


def root_seconds(n: int, d: int, device: torch.device) -> float:
    """M^(1/2), in the span of the points where these are fewer than features."""
    r = min(n, d)
    return estimates.of_eigh(r, device) + calibration.seconds(6.0 * d * d * r, 0.0, device, "gram", "float64")


def memory_rate(device: torch.device) -> float:
    """Bytes a second that elementwise work reads and writes, roughly."""
    return 1e12 if device.type == "cuda" else 4e9


def _solver(plan: Plan) -> str:
    """What a plan of a solve says of method, backend and precision, and why."""
    return f"{plan.method} on {plan.backend}, {plan.precision}: {plan.why}"


def text_of(name: str, data: Data, steps: list[tuple[str, int, Step]], held: int, share: int) -> str:
    """The plan of a fit in words: a line for each step, totals, and what does not fit."""
    (n, d), K, device = data.X.shape, data.Y.shape[1], data.X.device
    lines = [f"{name}.fit: {n} rows, {d} features, {K} output(s), {dtype_name(data.X.dtype)} on {device}"]
    for label, times, step in steps:
        parts = ", ".join(f"{part} {seconds:.2g}" for part, seconds in step.seconds.items() if seconds)
        each = " each" if times > 1 else ""
        cost = f"about {step.total:.2g} s{each} ({parts}), {format_bytes(step.peak_bytes)}"
        lines.append(f"  {label}: {'does not fit, see below' if step.refused else cost}")
    total, peak = sum(times * step.total for _, times, step in steps), max(step.peak_bytes for *_, step in steps)
    solvers = list(dict.fromkeys(step.solver for *_, step in steps if step.solver))
    lines += [f"  solver     {solver}" for solver in solvers]
    fits, free = not any(step.refused for *_, step in steps), available_bytes(device)
    scope = "in all" if fits else "for what fits"
    lines.append(f"  seconds    about {total:.2g} {scope} ({calibration.source(device)})")
    scope = f"beyond X and y, {format_bytes(held)} of it kept" if fits else "for what fits"
    lines.append(f"  memory     {format_bytes(peak + held)} {scope}; {format_bytes(free)} are free now")
    if fits and peak + held > free:
        lines.append("  does not fit: all of it together; use fewer rows, a smaller memory_limit, or solver='cg'")
    if share > 1:
        lines.append(f"  ranks      {share}: each makes its part of AGOPs and of passes of cg; the first factors alone")
    lines += [f"  does not fit: {label}: {step.refused}" for label, _, step in steps if step.refused]
    lines += [f"  assumed    {scope}" for scope in data.assumed]
    return "\n".join(lines)
