"""Who does the work of a fit or a shared call: this process alone (Local), or the ranks of a group (Sharded).

Both have the same methods, and what they return is the same on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastagop.distributed.blocks import AskedBlocks, RankBlocks
from fastagop.distributed.communicator import Communicator, other
from fastagop.kernels import checks
from fastagop.kernels.gemm import symmetrise_
from fastagop.kernels.kernel_operator import KernelOperator, PointsProduct, scale_weights
from fastagop.kernels.operations import agop_call
from fastagop.kernels.pair_backend.backend import PairBackend
from fastagop.kernels.plan import AgopTask, Plan, block_rows, budget
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.profile import Kernel, Profile
from fastagop.kernels.scaling import Points, in_range, scaled_
from fastagop.kernels.torch_backend import agop as torch_agop
from fastagop.kernels.torch_backend import costs, matrix
from fastagop.kernels.torch_backend import diagonal as torch_diagonal
from fastagop.kernels.torch_backend import gram as torch_gram
from fastagop.kernels.torch_backend.low_rank import LowRank
from fastagop.kernels.torch_backend.tiles import BLOCKS_ALIVE
from fastagop.solvers import copies
from fastagop.solvers.copies import Rows
from fastagop.solvers.half import filler_of
from fastagop.solvers.places import check_alone
from fastagop.solvers.problem import Shared
from fastagop.solvers.solve import Solved, SolveOptions, as_given, prepare
from fastagop.solvers.symmetric_blocks import SymmetricBlocks

_UNLIMITED = 2**62  # bytes: checks the arguments of a call whose memory another rank plans
_SHARE = "its share"  # what a rank may fail to make, in words


class Predictor(NamedTuple):
    """f_c(z) = sum_j alpha[j, c] k(z, X[j]), and how its products are computed.

    ``alpha`` is float64 where the caller has it so: the gram form in float64 takes it.
    """

    kernel: Any
    X: torch.Tensor
    alpha: torch.Tensor
    precision: str = "highest"
    backend: str = "auto"

    @property
    def rounded(self) -> torch.Tensor:
        """alpha in X's dtype."""
        return self.alpha.to(self.X.dtype)


class Fit(NamedTuple):
    """What a solve of a fit came to.

    ``matrix`` has k(X, X) of the scaled points above its diagonal, or is half of it, or None; ``peak_bytes`` is the
    plan's figure.
    """

    solved: Solved
    matrix: torch.Tensor | SymmetricBlocks | None
    peak_bytes: int


class Local:
    """This process alone."""

    def solve(self, kernel: Kernel, X: torch.Tensor, Y: torch.Tensor, options: SolveOptions, rows: Rows) -> Fit:
        """The system at the points X (r, d) of given targets Y (n, K), alpha in float64."""
        prepared = prepare(kernel, X, rows.take(Y), options)
        return Fit(*prepared.run(Y, rows, torch.float64), prepared.plan.peak_bytes)

    def agop(self, predictor: Predictor, task: AgopTask) -> torch.Tensor:
        """The AGOP at X, of X's dtype at least."""
        kernel, X, _, precision, backend = predictor
        with torch.no_grad():
            return agop_call(kernel, X, predictor.rounded, None, task, precision=precision, backend=backend).run()

    def agop_diagonal(self, predictor: Predictor, task: AgopTask) -> torch.Tensor:
        """sum_i w_i sum_c (d f_c / d x_k)(X[i])^2 for each feature k: (d,), float64, O(d) memory beyond row blocks.

        Raises:
            MemoryError: a single block exceeds the task's limit.
        """
        return self._diagonal(predictor, task)

    def _diagonal(self, predictor: Predictor, task: AgopTask, **shared) -> torch.Tensor:
        kernel, X, alpha, precision, _ = predictor
        if not kernel.radial:
            task = replace(task, limit=checks.memory_limit(task.limit))
            with matmul_precision(precision, X.device):
                return PairBackend().diagonal(kernel, X, predictor.rounded, task)
        room = budget(checks.memory_limit(task.limit), X.device)
        rows, _ = torch_diagonal.plan_rows(X, alpha.shape[1], room)
        weights, _, exponent = scale_weights(task.weights, X, "sum")
        roots = None if weights is None else weights.sqrt()
        with matmul_precision(precision, X.device):
            M = torch_diagonal.agop_diagonal(
                kernel, X, predictor.rounded, rows, center=task.center, roots=roots, rounded=task.rounded, **shared
            )
        return scaled_(M, exponent)

    def agree(self, op: str, call: str, **tensors: torch.Tensor | None) -> None:
        """Refuse ranks that want different things."""

    def broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, on every rank."""
        return value

    def together(self, work: Callable[[], Any], what: str, device: torch.device) -> Any:
        """work(), which no rank goes on without; ``what`` it is in words."""
        return work()


class Sharded(Local):
    """The ranks of a ``torch.distributed`` group, each of which makes the same calls.

    Args:
        group: a process group, or None for all processes.
    """

    def __init__(self, group):
        self.group = group

    def communicator(self, op: str, X) -> Communicator:
        """This process among the others, for one operation."""
        device = X.device if isinstance(X, torch.Tensor) else torch.device("cpu")
        return Communicator(self.group, op, device)

    def agree(self, op: str, call: str, **tensors: torch.Tensor | None) -> None:
        """Refuse ranks that want different things."""
        self.communicator(op, next(iter(tensors.values()))).agree(lambda: None, call, **tensors)

    def broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, on every rank."""
        return self.communicator("broadcast", value).broadcast(value)

    def together(self, work: Callable[[], Any], what: str, device: torch.device) -> Any:
        """work(); where it fails on one rank, every rank learns which."""
        return Communicator(self.group, "fit", device).together(work, what)

    def agop_diagonal(self, predictor: Predictor, task: AgopTask) -> torch.Tensor:
        """As ``Local.agop_diagonal``; every rank takes its share of the rows."""
        ranks = self.communicator("agop", predictor.X)
        span = ranks.rows(len(predictor.X))
        return ranks.shared(lambda total: self._diagonal(predictor, task, span=span, total=total), _SHARE)

    def agop(self, predictor: Predictor, task: AgopTask, Z: torch.Tensor | None = None) -> torch.Tensor:
        """The AGOP at Z, default X, in float64; partial sums (d, d) are added in float64."""
        kernel, X, alpha, precision, backend = predictor
        ranks = self.communicator("agop", X)
        coefficients = predictor.rounded if isinstance(alpha, torch.Tensor) and isinstance(X, torch.Tensor) else alpha

        def checked() -> KernelOperator:
            _refuse_pairs(kernel)
            checks.choice("reduction", task.reduction, ("mean", "sum"))
            checks.choice("method", task.method, ("auto", "gradient", "gram"))
            checks.flag("center", task.center)
            operator = KernelOperator("agop", kernel, X, Z, precision=precision, backend=backend)
            operator.agop(coefficients, replace(task, method="gradient"))
            return operator

        options = {"reduction": task.reduction, "center": task.center, "precision": precision, "backend": backend}
        call = f"{kernel!r}, {options}, method={task.method!r}, memory_limit={task.limit}"
        tensors = {"X": X, "alpha": coefficients, "Z": other(X, Z), "sample_weight": task.weights}
        operator, room = ranks.agree(checked, call, **tensors)
        limit = checks.memory_limit(task.limit)
        task = replace(task, limit=room if limit is None else limit)
        at = operator.points
        inner, alpha, amplitude = in_range(at.kernel, at.X, alpha, at.unit, at.Z)
        at, scaled = at._replace(kernel=inner), predictor._replace(kernel=inner, X=at.X, alpha=alpha)
        weights, divisor, exponent = scale_weights(task.weights, at.Z, task.reduction)
        with operator.products():
            M, stored = None, None
            if operator.backend.shares_triangle and ranks.size > 1 and weights is None:
                stored = _stored_weights(at, scaled.rounded, task, ranks.size)
            if stored is not None:
                M = _rows_of_gram(scaled, task, stored.block, ranks)
            if M is None:
                alone = at.Z is at.X and task.method == "auto" and ranks.size > 1
                task = replace(task, method="gradient") if alone else task
                M = _rows_of_points(scaled, at.Z, weights, task, ranks)
        M = symmetrise_(ranks.total(M))  # sums over ranks come in an order of their own for every entry
        return amplitude.restore_squares(M.div_(divisor), exponent)

    @torch.no_grad()
    def solve(self, kernel, X, Y, options: SolveOptions, rows: Rows | None = None, **of_points) -> Fit:
        """As ``Local.solve``; nothing warns, and no matrix is kept.

        Args:
            rows: where the caller has found copies already: X are the points that they say, Y the targets as given.
            **of_points: where it has not: ``sample_weight``, and ``out``, the dtype of alpha.
        """
        sample_weight, out = of_points.get("sample_weight"), of_points.get("out", torch.float64)
        ranks, found = self.communicator("solve", X), None

        def checked():
            _refuse_pairs(kernel)
            checks.memory_limit(options.memory_limit)
            check_alone(options.method, ranks.size)
            like = Y if rows is None else rows.take(Y)
            prepare(kernel, X, like, replace(options, memory_limit=_UNLIMITED), sample_weight)

        weight = sample_weight if rows is None else None if rows.plain else rows.each
        _, room = ranks.agree(checked, f"{kernel!r}, {options}", X=X, Y=Y, sample_weight=weight)
        original = X
        if rows is None:
            rows = found = copies.find(X, sample_weight)
            X = rows.take(X)

        @functools.cache
        def product() -> Any:
            arguments = {"precision": options.precision, "backend": options.backend}
            operator = KernelOperator("solve with method 'cg'", kernel, X, **arguments)
            return operator.float64_product(block_of_product(operator.points.X.double(), Y.shape[1], room))

        @functools.cache
        def blocks() -> RankBlocks:
            operator = KernelOperator("solve", kernel, X, precision=options.precision, backend=options.backend)
            return RankBlocks(len(X), ranks, filler_of(operator))

        def part(V: torch.Tensor, number: int) -> torch.Tensor:
            return blocks().answer(V, number) if number < 0 else _part_of_product(product(), V, number, ranks)

        def job(request) -> tuple[Solved, int]:
            asked = Shared(ranks.size, lambda n, dtype: AskedBlocks(n, dtype, request, X.device))
            least = room if (limit := checks.memory_limit(options.memory_limit)) is None else limit
            mine = replace(options, shared=asked if ranks.size > 1 else None, memory_limit=least)
            prepared = prepare(kernel, X, rows.take(Y), mine)
            if found is not None and (small := prepared.solve_small_in_float64(Y, rows, out)) is not None:
                return small.to(torch.device("cpu")), prepared.plan.peak_bytes
            shared = {}
            if prepared.solver.multiplies:
                shared["share"] = functools.partial(SharedProduct, request, product().rows)
            solved, _ = prepared.run(Y, rows, out, apart=found is not None, **shared)
            if found is not None:
                solved = replace(solved, solution=as_given(solved.solution, kernel, original, Y, found))
            return solved.to(torch.device("cpu")), prepared.plan.peak_bytes

        solved, planned = ranks.run_on_root(job, part)
        return Fit(solved.to(X.device), None, planned)


@dataclass(frozen=True)
class SharedProduct:
    """k(X, X) as a solver sees it on the first rank; its products are made by all ranks.

    Attributes:
        request: (V, rows) -> the sum of what every rank makes.
        rows: of a block.
        local: the columns and the diagonal come from it.
    """

    request: Callable[[torch.Tensor, int], torch.Tensor]
    rows: int
    local: PointsProduct

    def __len__(self) -> int:
        return len(self.local)

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """k(X, X) V."""
        return self.request(V, self.rows)

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """k(X, X[index])."""
        return self.local.columns(index)

    def diagonal(self) -> torch.Tensor:
        """k(x, x) of each point (n,)."""
        return self.local.diagonal()


def _part_of_product(product: PointsProduct, V: torch.Tensor, rows: int, ranks: Communicator) -> torch.Tensor:
    """What this rank contributes to k(X, X) V: its area of the triangle, or its rows, zero elsewhere."""
    kernel, x, _, _ = product.at
    if product.backend.shares_triangle:
        return area_of_product(kernel, x, V, rows, ranks)
    first, last = ranks.rows(len(x))
    out = torch.zeros_like(V)
    if last > first:
        out[first:last] = product.backend.product(Points(kernel, x[first:last], x), V, rows)
    return out


def area_of_product(
    kernel: Profile, X: torch.Tensor, V: torch.Tensor, max_rows: int, ranks: Communicator
) -> torch.Tensor:
    """What this rank's part of the lower half of k(X, X), and its mirror image, contributes to k(X, X) V."""
    rows, starts = ranks.blocks(len(X), max_rows)
    return matrix.kernel_matmul(kernel, X, X, V, rows, starts)


def block_of_product(X: torch.Tensor, p: int, room: int) -> int:
    """Rows of a block of k(X, X), the same on every rank."""
    n, size = len(X), X.element_size()
    return block_rows(BLOCKS_ALIVE * n * size, n * p * size, room, n, "kernel_matmul")


def _refuse_pairs(kernel: Kernel) -> None:
    checks.kernel(kernel, settled=False)
    checks.radial(kernel, "fastagop.distributed", "compute it on one process, without a process group")


LOCAL = Local()


def engine_of(group) -> Local:
    """The engine of a fit: ``Local`` where there is no group."""
    return LOCAL if group is None else Sharded(group)


def _stored_weights(at: Points, alpha: torch.Tensor, task: AgopTask, size: int) -> Plan | None:
    """The plan where every rank should hold the weights (n, n) and make its rows of S: asked for, or fits and pays.

    The task's limit is the same on every rank, and so is the plan: ranks must cut S alike.
    """
    if at.Z is not at.X or task.method == "gradient":
        return None
    try:
        plan = costs.plan(at.X, alpha, at.X, AgopTask(method="gram", limit=task.limit), "", symmetric=True)
    except MemoryError:
        if task.method == "gram":
            raise
        return None
    (n, d), K = at.X.shape, alpha.shape[1]
    gram = n * n * d * (1 + 1 / size) + (n**3 + 3.0 * n * n * K) / size + 2.0 * n * d * d / size
    pays = gram < costs.flops(-(-n // size), n, d, K, False)["gradient"]
    return plan if pays or task.method == "gram" else None


def _rows_of_gram(predictor: Predictor, task: AgopTask, max_rows: int, ranks: Communicator) -> torch.Tensor | None:
    """This rank's block rows of the gram form; None where it would lose digits, or another rank says so."""
    kernel, X, alpha, _, _ = predictor
    dtypes = [X.dtype, torch.float64]

    def weighed() -> tuple[torch.Tensor, Any]:
        W = torch_agop.weights(kernel, X, X, max_rows)
        return W, torch_agop.choose_form(W, X, predictor.rounded, X, task, symmetric=True)

    W, here = ranks.together(weighed, _SHARE)
    rank = here.low_rank.rank if here.low_rank else 0
    rank, place = divmod(ranks.everyone(2 * rank + dtypes.index(here.dtype))[0], 2)  # the first rank decides
    if rank == 0:
        return None
    rows, starts = ranks.blocks(len(X), max_rows)
    wide = dtypes[place]
    P, Q = (ranks.broadcast(part) for part in _parts(here.low_rank, W.new_zeros(len(X), rank)))
    x, part, first = X.to(wide), LowRank(P, Q, symmetric=True).to(wide), ranks.rank == 0
    options = {"center": task.center, "rows": rows, "starts": starts, "all_else": first}
    return ranks.together(lambda: torch_gram.gram_form(W.to(wide), x, alpha.to(wide), x, part, **options), _SHARE)


def _parts(low_rank: LowRank | None, blank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, Q) as they can be sent or received, (n, rank) each."""
    if low_rank is None or low_rank.rank != blank.shape[1]:
        return blank, blank
    return low_rank.P.contiguous(), low_rank.Q.contiguous()


def _rows_of_points(predictor: Predictor, Z, weights, task: AgopTask, ranks: Communicator) -> torch.Tensor:
    """This rank's rows of Z, centred by the mean over all of Z where asked; float64. weights (m,) or None for ones.

    Each share is centred by its own mean, and what its mean differs from that of all is added: variances merge so
    without losing digits.
    """
    kernel, X, _, precision, backend = predictor
    alpha, (first, last) = predictor.rounded, ranks.rows(len(Z))
    share = Z[first:last] if ranks.size > 1 else Z
    part = None if weights is None else weights[first:last]
    merges = task.center and ranks.size > 1 and len(Z) > 0
    size = float(len(share) if part is None else part.sum(dtype=torch.float64))

    def of_share() -> tuple[torch.Tensor, torch.Tensor]:
        operator = KernelOperator("agop", kernel, X, share, precision=precision, backend=backend)
        M = operator.agop(alpha, replace(task, reduction="sum", weights=part)).run().double()
        mean = X.new_zeros(alpha.shape[1], X.shape[1], dtype=torch.float64)
        if merges and size > 0:
            gradient = AgopTask(method="gradient", limit=task.limit)
            rows = costs.plan(X, alpha, share, gradient, "", symmetric=False).block
            mean += operator.mean_gradient(alpha, part, rows)
        return M, mean

    M, mean = ranks.together(of_share, _SHARE)
    if merges:
        both = ranks.total(torch.cat([(size * mean).flatten(), mean.new_tensor([size])]))
        if both[-1] > 0:
            apart = mean - (both[:-1] / both[-1]).view_as(mean)
            M += size * (apart.T @ apart)
    return M
