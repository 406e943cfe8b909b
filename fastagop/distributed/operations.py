"""The operations of fastagop, shared by the ranks of a group."""

from __future__ import annotations

import dataclasses
import functools

import torch

from fastagop.distributed.communicator import Communicator, RankLost
from fastagop.kernels import checks, operations
from fastagop.kernels.agop import agop as agop_here
from fastagop.kernels.agop import plan_agop, row_weights
from fastagop.kernels.gemm import symmetrise_
from fastagop.kernels.plan import Plan, block_rows
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.scaling import scale_points, scaled_
from fastagop.kernels.torch_backend import agop as torch_agop
from fastagop.kernels.torch_backend import gram as torch_gram
from fastagop.kernels.torch_backend import tiles
from fastagop.kernels.torch_backend.low_rank import LowRank
from fastagop.solvers import copies
from fastagop.solvers.cg import ConjugateGradients
from fastagop.solvers.solve import ADVICE, Solution, Solved, as_given, plan_solve, report, solve_stored, solve_unstored

__all__ = ["RankLost", "agop", "gradients", "kernel_matmul", "solve"]

_UNLIMITED = 2**62  # bytes: checks the arguments of a call whose memory another rank plans


def broadcast(value: torch.Tensor, group) -> torch.Tensor:
    """The first rank's tensor, on every rank."""
    return _ranks(group, "broadcast", value).broadcast(value)


def _ranks(group, op: str, X) -> Communicator:
    return Communicator(group, op, X.device if isinstance(X, torch.Tensor) else torch.device("cpu"))


def _other(X, Z):
    """Z where it is not X: ranks must also agree on that, as it decides who does what."""
    return None if isinstance(X, torch.Tensor) and isinstance(Z, torch.Tensor) and checks.same(X, Z) else Z


@torch.no_grad()
def agop(
    kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    center: bool = False,
    method: str = "auto",
    precision: str = "highest",
    backend: str = "auto",
    memory_limit: float | None = None,
    sample_weight: torch.Tensor | None = None,
    group=None,
) -> torch.Tensor:
    """``fastagop.agop``, shared by the ranks of a group; partial sums (d, d) are added in float64.

    The gradient form, 2 m n K d products, splits over the rows of Z. The gram form splits over the rows of S where
    Z is X and no point has a weight of its own: every rank holds the (n, n) weights and does n^2 d + n^3 / ranks
    products; elsewhere over the rows of Z: n^2 m / ranks + n^2 d. "auto" takes what is cheaper for one rank.

    Args:
        kernel, X, alpha, Z, reduction, center, method, precision, backend, sample_weight: as in ``fastagop.agop``, the
            same on every rank.
        memory_limit: bytes that each rank may take; default the least that any rank has free.
        group: a process group; default all processes.

    Returns:
        Tensor (d, d), the same bits on every rank.
    """
    options = {"reduction": reduction, "center": center, "precision": precision, "backend": backend}
    how = {"method": method, "memory_limit": memory_limit, **options}
    return agop_as(None, kernel, X, alpha, Z, weights=sample_weight, group=group, **how).to(X.dtype)


@torch.no_grad()
def agop_as(
    wide: torch.Tensor | None,
    kernel,
    X,
    alpha,
    Z=None,
    *,
    group,
    method="auto",
    memory_limit=None,
    weights=None,
    **options,
):
    """``agop`` in float64; ``wide`` is alpha in float64 where the caller has it: the gram form in float64 takes it.

    ``weights``: the public ``sample_weight``.
    """
    options = {"reduction": "mean", "center": False, "precision": "highest", "backend": "auto", **options}
    center, precision, backend = options["center"], options["precision"], options["backend"]
    ranks = _ranks(group, "agop", X)

    def prepare():
        checks.choice("method", method, ("auto", "gradient", "gram"))
        limits = {"memory_limit": memory_limit, "sample_weight": weights}
        return plan_agop(kernel, X, alpha, Z, method="gradient", **limits, **options)

    said = f"{kernel!r}, {options}, method={method!r}, memory_limit={memory_limit}"
    tensors = {"X": X, "alpha": alpha, "Z": _other(X, Z), "sample_weight": weights}
    (plan, (X, alpha, at, limit)), room = ranks.agree(prepare, said, **tensors)
    room = room if limit is None else limit
    kernel, X, at, unit = scale_points(kernel, X, at)
    scaled, divisor, exponent = row_weights(weights, at, options["reduction"])
    with matmul_precision(precision, X.device):
        M, stored = None, None
        if plan.backend == "torch" and ranks.size > 1 and weights is None:
            stored = _stored_weights(X, alpha, at, method, room, ranks.size)
        if stored is not None:
            M = _rows_of_gram(kernel, X, alpha if wide is None else wide, center, method, room, stored.block, ranks)
        if M is None:
            chosen = "gradient" if at is X and method == "auto" and ranks.size > 1 else method
            how = {"method": chosen, "precision": precision, "backend": backend, "memory_limit": room}
            M = _rows_of_points(kernel, X, alpha, at, scaled, center, ranks, how)
    M = symmetrise_(ranks.total(M))  # sums over ranks come in an order of their own for every entry
    return scaled_(M.div_(unit).div_(unit).div_(divisor), exponent)


def _stored_weights(X, alpha, Z, method: str, room: int, size: int) -> Plan | None:
    """The plan where every rank should hold the weights (n, n) and make its rows of S: asked for, or fits and pays.

    Room is the same on every rank, and so is the plan: ranks must cut S alike.
    """
    if Z is not X or method == "gradient":
        return None
    try:
        plan = torch_agop.plan(X, alpha, X, "gram", room, "", "")
    except MemoryError:
        if method == "gram":
            raise
        return None
    (n, d), K = X.shape, alpha.shape[1]
    gram = n * n * d * (1 + 1 / size) + (n**3 + 3.0 * n * n * K) / size + 2.0 * n * d * d / size
    pays = gram < torch_agop.flops(-(-n // size), n, d, K, False)["gradient"]
    return plan if pays or method == "gram" else None


def _rows_of_gram(kernel, X, alpha, center: bool, method: str, room: int, most: int, ranks: Communicator):
    """This rank's block rows of the gram form; None where it would lose digits, or another rank says so."""
    W = torch_agop.weights(kernel, X, X, most)
    dtypes = [X.dtype, torch.float64]
    mine = torch_agop.choose_form(W, X, alpha.to(X.dtype), X, center, method, room)
    rank = mine.smooth.rank if mine.smooth else 0
    rank, place = divmod(ranks.everyone(2 * rank + dtypes.index(mine.dtype))[0], 2)  # the first rank decides
    if rank == 0:
        return None
    rows, starts = ranks.blocks(len(X), most)
    wide = dtypes[place]
    P, Q = (ranks.broadcast(part) for part in _parts(mine.smooth, W.new_zeros(len(X), rank)))
    x, taken, first = X.to(wide), LowRank(P, Q, own=True).to(wide), ranks.rank == 0
    how = {"center": center, "rows": rows, "starts": starts, "all_else": first}
    return torch_gram.gram_form(W.to(wide), x, alpha.to(wide), x, taken, **how)


def _parts(smooth: LowRank | None, blank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, Q) as they can be sent or received, (n, rank) each."""
    if smooth is None or smooth.rank != blank.shape[1]:
        return blank, blank
    return smooth.P.contiguous(), smooth.Q.contiguous()


def _rows_of_points(kernel, X, alpha, Z, weights, center: bool, ranks: Communicator, how: dict) -> torch.Tensor:
    """This rank's rows of Z, centred by the mean over all of Z where asked; float64. weights (m,) or None for ones.

    Each share is centred by its own mean, and what its mean differs from that of all is added: variances merge so
    without losing digits.
    """
    first, last = ranks.rows(len(Z))
    own = Z[first:last] if ranks.size > 1 else Z
    mine = None if weights is None else weights[first:last]
    M = agop_here(kernel, X, alpha, own, reduction="sum", center=center, sample_weight=mine, **how).double()
    if center and ranks.size > 1 and len(Z) > 0:
        share = float(len(own) if mine is None else mine.sum(dtype=torch.float64))
        mean = X.new_zeros(alpha.shape[1], X.shape[1], dtype=torch.float64)
        if share > 0:
            mean += _mean_gradient(kernel, X, alpha, own, mine, how["memory_limit"])
        both = ranks.total(torch.cat([(share * mean).flatten(), mean.new_tensor([share])]))
        if both[-1] > 0:
            apart = mean - (both[:-1] / both[-1]).view_as(mean)
            M += share * (apart.T @ apart)
    return M


def _mean_gradient(kernel, X, alpha, Z, weights, limit: int) -> torch.Tensor:
    """mean_i grad f_c(Z[i]), weighted where there are weights, float64 (K, d)."""
    block = torch_agop.plan(X, alpha, Z, "gradient", limit, "", "").block

    def blocks():
        for row, tile in tiles.tiles(X, Z, block):
            W = kernel.weight_(tile)
            yield row, W if weights is None else W.mul_(weights[row, None])

    mean = torch_agop.mean_gradient(blocks(), alpha, X, Z, tiles.dominant_offset(X))
    return mean if weights is None else mean * (len(Z) / weights.sum(dtype=torch.float64))


@torch.no_grad()
def kernel_matmul(
    kernel,
    X: torch.Tensor,
    Z: torch.Tensor | None = None,
    V: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
    group=None,
) -> torch.Tensor:
    """``fastagop.kernel_matmul``, shared by the ranks of a group.

    Rows of X are shared out, and the rows of the result travel while the next ones are made. Where Z is X, the torch
    backend shares out half of the matrix instead, by equal area, and adds the partial results.

    Args:
        kernel, X, Z, V, precision, backend: as in ``fastagop.kernel_matmul``, the same on every rank.
        group: a process group; default all processes.

    Returns:
        Tensor (n, p), the same bits on every rank.
    """
    options = {"precision": precision, "backend": backend}
    ranks = _ranks(group, "kernel_matmul", X)
    (plan, (X, at, right)), room = ranks.agree(
        lambda: operations.plan_kernel_matmul(kernel, X, Z, V, **options),
        f"{kernel!r}, {options}",
        X=X,
        Z=_other(X, Z),
        V=V,
    )
    if at is not X or plan.backend != "torch":
        return ranks.concatenate(
            lambda first, last: operations.kernel_matmul(kernel, X[first:last], at, right, **options),
            len(X),
            (right.shape[1],),
            right,
        )
    kernel, X, _, _ = scale_points(kernel, X, X)
    with matmul_precision(precision, X.device):
        return ranks.total(_area(kernel, X, right, _block(X, right.shape[1], room), ranks))


def _block(X: torch.Tensor, p: int, room: int) -> int:
    """Rows of a block of k(X, X), the same on every rank."""
    n, size = len(X), X.element_size()
    return block_rows(tiles.BLOCKS_ALIVE * n * size, n * p * size, room, n, "kernel_matmul")


def _area(kernel, X: torch.Tensor, V: torch.Tensor, most: int, ranks: Communicator) -> torch.Tensor:
    """What this rank's part of the lower half of k(X, X), and its mirror image, contributes to k(X, X) V."""
    rows, starts = ranks.blocks(len(X), most)
    plan = tiles.plan_kernel_matmul(X, X, V, "", "")
    return tiles.kernel_matmul(kernel, X, X, V, dataclasses.replace(plan, block=rows), starts)


@torch.no_grad()
def gradients(
    kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
    group=None,
) -> torch.Tensor:
    """``fastagop.gradients``, shared by the ranks of a group: rows of Z; they travel while the next ones are made.

    Args:
        kernel, X, alpha, Z, precision, backend: as in ``fastagop.gradients``, the same on every rank.
        group: a process group; default all processes.

    Returns:
        Tensor (m, K, d), the same bits on every rank.
    """
    options = {"precision": precision, "backend": backend}
    ranks = _ranks(group, "gradients", X)
    (_, (X, alpha, at)), _ = ranks.agree(
        lambda: operations.plan_gradients(kernel, X, alpha, Z, **options),
        f"{kernel!r}, {options}",
        X=X,
        alpha=alpha,
        Z=_other(X, Z),
    )
    return ranks.concatenate(
        lambda first, last: operations.gradients(kernel, X, alpha, at[first:last], **options),
        len(at),
        (alpha.shape[1], X.shape[1]),
        X,
    )


def solve(
    kernel,
    X: torch.Tensor,
    Y: torch.Tensor,
    *,
    ridge: float = 0.0,
    method="auto",
    precision: str = "highest",
    backend: str = "auto",
    memory_limit: float | None = None,
    sample_weight: torch.Tensor | None = None,
    group=None,
) -> Solution:
    """``fastagop.solve``, shared by the ranks of a group.

    "cg" is the road that gains from more ranks: the first rank iterates and holds the preconditioner, and every
    product with k(X, X) is shared out by equal area. "cholesky" and "eigh" are not distributed: the first rank solves
    alone, with the memory it has, and the others wait for its result.

    Args:
        kernel, X, Y, ridge, method, precision, backend: as in ``fastagop.solve``, the same on every rank.
        memory_limit: bytes that the first rank may take; default most of what it has free.
        sample_weight: as in ``fastagop.solve``, the same on every rank.
        group: a process group; default all processes.

    Returns:
        Solution, the same bits on every rank.

    Warns:
        NumericalWarning: on every rank, where ``fastagop.solve`` would.
    """
    options = {"ridge": ridge, "method": method, "precision": precision, "backend": backend}
    options |= {"memory_limit": memory_limit, "sample_weight": sample_weight}
    solved, _ = solve_as(None, kernel, X, Y, group=group, **options)
    report(solved.solution)
    return solved.solution


@torch.no_grad()
def solve_as(
    out: torch.dtype | None,
    kernel,
    X,
    Y,
    *,
    group,
    memory_limit=None,
    sample_weight=None,
    rows=None,
    advice=ADVICE,
    **options,
) -> tuple[Solved, int]:
    """(solved with alpha in dtype ``out``, default X's; bytes planned), the same on every rank; nothing warns.

    ``rows``: where the caller has found copies already: X are the points that they say, Y the targets as given.
    """
    options = {"ridge": 0.0, "method": "auto", "precision": "highest", "backend": "auto", **options}
    ranks = _ranks(group, "solve", X)

    def prepare():
        checks.memory_limit(memory_limit)
        like = Y if rows is None else rows.take(Y)
        return plan_solve(kernel, X, like, memory_limit=_UNLIMITED, sample_weight=sample_weight, **options)

    said = f"{kernel!r}, {options}, memory_limit={memory_limit}"
    weight = sample_weight if rows is None else None if rows.plain else rows.each
    _, room = ranks.agree(prepare, said, X=X, Y=Y, sample_weight=weight)
    given, found = X, None  # rows as they were given, and their copies
    if rows is None:
        rows = found = copies.find(X, sample_weight)
        X = rows.take(X)
    units, points, _, _ = scale_points(kernel, X, X)
    wide = functools.cache(points.double)

    def job(request):
        plan, (_, _, ridge, how) = plan_solve(
            kernel, X, rows.take(Y), memory_limit=memory_limit, advice=advice, **options
        )
        with matmul_precision(options["precision"], X.device):
            if isinstance(how, ConjugateGradients):
                most = 0 if plan.backend == "keops" else _block(wide(), Y.shape[1], room)
                shared = functools.partial(_asked, request, most)
                solved = solve_unstored(kernel, X, Y, ridge, plan, how, out or X.dtype, rows, shared, apart=out is None)
            else:
                solved, _ = solve_stored(
                    kernel, X, Y, ridge, plan, how, options["precision"], out or X.dtype, rows, apart=out is None
                )
        if found is not None:
            solved = dataclasses.replace(solved, solution=as_given(solved.solution, kernel, given, Y, found))
        return solved.to(torch.device("cpu")), plan.peak_bytes

    def handle(V, most):
        return _area(units, wide(), V, most, ranks) if most else _rows(units, wide(), V, ranks)

    solved, planned = ranks.run_on_root(job, handle)
    return solved.to(X.device), planned


def _rows(kernel, X: torch.Tensor, V: torch.Tensor, ranks: Communicator) -> torch.Tensor:
    """This rank's rows of k(X, X) V by KeOps, zero elsewhere."""
    first, last = ranks.rows(len(X))
    out = torch.zeros_like(V)
    if last > first:
        out[first:last] = operations.kernel_matmul(kernel, X[first:last], X, V, backend="keops")
    return out


def _asked(request, most: int, kernel, X, Z, V: torch.Tensor, plan) -> torch.Tensor:
    """k(X, X) V as conjugate gradients want it, made by all ranks."""
    return request(V, most)
