"""Conjugate gradients for (k(X, X) + ridge I) alpha = Y where no n x n matrix fits, with a low-rank preconditioner.

Nothing here knows how products with the kernel matrix are made: the operator is a callable, and so are the columns
that the preconditioner is built from. A sharded product serves as well as a local one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastagop.kernels import checks
from fastagop.kernels.plan import Plan, block_rows, format_bytes
from fastagop.kernels.torch_backend.tiles import BLOCKS_ALIVE

log = logging.getLogger("fastagop")

_PROPOSALS = 128  # pivots drawn at once
_STALL = 100  # steps without a smaller residual before the iteration is given up
_ROWS = 4096  # rows of the preconditioner rotated at once
_RANK = 2000  # of the preconditioner, at most, where none is asked for
STEPS = 50  # that a plan counts with: the number is known afterwards
_VECTORS = 10  # (n, K) matrices alive at once
_WIDE = 1e6  # ratio of eigenvalues from which a Gram matrix is not enough to make columns orthogonal
_EPS = torch.finfo(torch.float64).eps

Matmul = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ConjugateGradients:
    """How ``solve(..., method=ConjugateGradients(...))`` iterates; ``method="cg"`` takes the defaults.

    Args:
        tolerance: relative residual ||(k + ridge I) alpha - Y|| / ||Y|| to reach, of every output by itself.
        rank: pivots of the preconditioner, 0 for none; default a sixteenth of the points, at most 2000, less where
            memory is short. It takes 8 n rank bytes.
        max_iterations: steps at most; each is one pass over all pairs of points.
        progress: show a tqdm bar. Steps are logged at INFO to "fastagop" either way.
        seed: of the pivots' draw.
    """

    tolerance: float = 1e-6
    rank: int | None = None
    max_iterations: int = 1000
    progress: bool = False
    seed: int = 0

    def __post_init__(self):
        if not checks.nonnegative("tolerance", self.tolerance):
            raise ValueError("tolerance must be above 0, got 0; residuals end at rounding, about 1e-12")
        for name, least in (("rank", 0), ("max_iterations", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        checks.flag("progress", self.progress)


def plan(
    X, Y, options: ConjugateGradients, room: int, backend: str, why: str, advice
) -> tuple[Plan, ConjugateGradients]:
    """(road of method "cg", options with the rank settled), or MemoryError.

    Memory: the preconditioner 8 n r, r x r work, ten (n, K) matrices, and the blocks of one pass.
    """
    (n, d), K = X.shape, Y.shape[1]
    row, fixed = 8 * BLOCKS_ALIVE * n, 8 * n * (_VECTORS * K + 1) + (0 if X.dtype == torch.float64 else 8 * n * d)
    wish = min(_RANK, n // 16) if options.rank is None else min(options.rank, n)
    each = 8 * (n + min(n, _ROWS) + 5 * wish)  # per column: of F, of its rotated rows, of r x r matrices
    draw = 8 * 3 * n * min(_PROPOSALS, wish)
    if options.rank is None:
        wish = max(0, min(wish, (room - fixed - max(draw + row, 64 * row)) // max(1, each)))
    needed = fixed + wish * each + (draw if wish else 0)
    if needed + row > room:
        largest = int(room / ((fixed + wish * each + row) / n))
        raise MemoryError(
            f"solve with n = {n} needs {format_bytes(needed + row)} even without a kernel matrix (method 'cg', "
            f"preconditioner of rank {wish}), but {format_bytes(room)} may be used; n up to about {largest} fits. "
            f"{advice.iterative()}"
        )
    rows = block_rows(row, needed, room, n, "solve")
    step = 1.0 * n * n * (d + 2 * K)
    why = (
        f"{why}; preconditioner of rank {wish} ({format_bytes(8 * n * wish)}), one pass over all pairs a step "
        f"({step:.2g} flop), work given for {STEPS} steps"
    )
    work = STEPS * step + 4.0 * n * wish**2
    peak = max(needed, fixed + 8 * n * wish + rows * row)
    return Plan("solve", backend, "cg", why, "float64 passes", work, peak, rows), replace(options, rank=wish)


@dataclass(frozen=True)
class CGResult:
    """alpha (n, K) in float64, its residual (recomputed, Frobenius), steps taken, and why they ended early, or "".

    ``singular``: what stopped them is a matrix without a bounded solution, which a larger diagonal would cure.
    """

    alpha: torch.Tensor
    residual: float
    iterations: int
    stopped: str
    singular: bool = False


@dataclass(frozen=True)
class Preconditioner:
    """S^-1 P S^-1 with P = U diag(values) U^T + tail (I - U U^T), U (n, r) with orthonormal columns, S diagonal.

    ``scale``: the diagonal of S (n,), None for 1: weights W make it W^(1/2), as K + ridge W^-1 is
    S^-1 (S K S + ridge) S^-1.
    """

    U: torch.Tensor
    values: torch.Tensor
    tail: float
    scale: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of U."""
        return self.U.shape[1]

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.values[-1])

    def shifted(self, jitter: float) -> Preconditioner:
        """That of the matrix with jitter added to the diagonal."""
        return replace(self, values=self.values + jitter, tail=self.tail + jitter)

    def __call__(self, R: torch.Tensor) -> torch.Tensor:
        """tail P^-1 R. Conjugate gradients do not see the factor, and nothing is divided by a small number."""
        R = R if self.scale is None else R * self.scale[:, None]
        Z = R - self.U @ ((1.0 - self.tail / self.values)[:, None] * (self.U.T @ R))
        return Z if self.scale is None else Z * self.scale[:, None]


def pivoted_cholesky(columns: Matmul, diagonal: torch.Tensor, rank: int, enough: float, seed: int = 0) -> torch.Tensor:
    """F (n, r), r <= rank, with F F^T close to K from below: randomly pivoted Cholesky.

    Pivots are drawn with probabilities proportional to the diagonal of K - F F^T, a block at a time; a pivot of the
    block whose entry has shrunk meanwhile stays with the probability it shrank to, so the draw is that of one pivot
    at a time (Chen, Epperly, Tropp, Webber 2022; Epperly, Tropp, Webber 2024). Duplicates of a pivot are never drawn.

    Args:
        columns: index (b,) -> K[:, index], float64 (n, b).
        diagonal: of K, float64 (n,).
        rank: columns of F at most.
        enough: the trace of K - F F^T below which there is nothing left to approximate.
        seed: of the draw; the same on every device and rank.
    """
    generator = torch.Generator().manual_seed(seed)
    F, r, left = diagonal.new_empty(len(diagonal), rank), 0, diagonal.clone()
    floor = len(diagonal) * _EPS * float(diagonal.max())
    while r < rank and float(left.sum()) > max(enough, floor):
        draw = torch.multinomial(left.cpu(), min(_PROPOSALS, rank - r), replacement=True, generator=generator)
        index = draw.to(left.device)
        G = columns(index)
        kept, L = _accept(G[index].addmm_(F[index, :r], F[index, :r].T, alpha=-1.0), floor, generator)
        if not kept:
            break
        index, G = index[kept], G[:, kept]
        G.addmm_(F[:, :r], F[index, :r].T, alpha=-1.0)
        fresh = F[:, r : r + len(kept)].copy_(torch.linalg.solve_triangular(L.mT, G, upper=True, left=False))
        left.sub_(torch.einsum("ij,ij->i", fresh, fresh)).clamp_(min=0.0)
        left[index] = 0.0
        r += len(kept)
    return F[:, :r]


def _accept(H: torch.Tensor, floor: float, generator: torch.Generator) -> tuple[list[int], torch.Tensor]:
    """(proposals kept, Cholesky factor of their block) from the residual block H (b, b) of all proposals."""
    a, kept = H.cpu().numpy(), []
    bar = np.maximum(
        torch.rand(len(a), generator=generator, dtype=torch.float64, device="cpu").numpy() * a.diagonal(), floor
    )
    for i in range(len(a)):
        if a[i, i] > bar[i]:
            kept.append(i)
            a[i:, i] /= np.sqrt(a[i, i])
            a[i + 1 :, i + 1 :] -= np.outer(a[i + 1 :, i], a[i + 1 :, i])
    return kept, torch.from_numpy(np.tril(a[np.ix_(kept, kept)])).to(H.device)


def preconditioner_of(columns: Matmul, diagonal: torch.Tensor, ridge, options) -> Preconditioner | None:
    """The preconditioner of K + ridge, a number or one for each point (n,), from K's columns and diagonal."""
    if not isinstance(ridge, torch.Tensor):
        return preconditioner(pivoted_cholesky(columns, diagonal, options.rank or 0, ridge, options.seed), ridge)
    least = float(ridge.min())
    scale = (least / ridge).sqrt()
    F = pivoted_cholesky(columns, diagonal, options.rank or 0, least, options.seed)
    found = preconditioner(F.mul_(scale[:, None]), least)
    return None if found is None else replace(found, scale=scale)


def preconditioner(F: torch.Tensor, ridge: float) -> Preconditioner | None:
    """The preconditioner of F F^T + ridge I; F is overwritten. None where F has no columns.

    Directions outside F get the smallest eigenvalue inside: what F left out is no larger, and ridge 0 is no special
    case (Frangella, Tropp, Udell 2023).
    """
    if F.shape[1] == 0:
        return None
    values, vectors = torch.linalg.eigh(F.T @ F)
    keep = values > len(F) * _EPS * float(values[-1])
    values = values[keep]
    U = _rotate_(F, vectors[:, keep] / values.sqrt())
    if values[-1] > _WIDE * values[0]:  # the Gram matrix of F has lost half of the digits: U is not orthogonal yet
        L = torch.linalg.cholesky(U.T @ U)
        U = _rotate_(U, torch.linalg.inv(L).T)
    return Preconditioner(U, values + ridge, float(values[0]) + ridge)


def _rotate_(F: torch.Tensor, T: torch.Tensor) -> torch.Tensor:
    """F T, written over F's first columns block by block."""
    for start in range(0, len(F), _ROWS):
        rows = F[start : start + _ROWS]
        rows[:, : T.shape[1]] = rows @ T
    return F[:, : T.shape[1]]


class ProgressReporter:
    """Says how far the iteration is: a log line per step, and a bar where one was asked for."""

    def __init__(self, options: ConjugateGradients):
        self.bar = None
        if options.progress:
            from tqdm import tqdm

            self.bar = tqdm(desc="solve", unit="step")

    def step(self, count: int, error: float) -> None:
        """After a step."""
        log.info("solve: step %d, largest relative residual %.1e", count, error)
        if self.bar is not None:
            self.bar.set_postfix_str(f"residual {error:.1e}", refresh=False)
            self.bar.update()

    def close(self) -> None:
        """At the end, whatever it is."""
        if self.bar is not None:
            self.bar.close()


def conjugate_gradients(
    matmul: Matmul,
    Y: torch.Tensor,
    precondition: Matmul | None,
    options: ConjugateGradients,
    bound: float = float("inf"),
) -> CGResult:
    """Solve A alpha = Y for all columns at once, one product with A a step.

    The residual that decides is Y - A alpha itself: when the recursion says that the goal is reached, it is
    recomputed, and the iteration starts again from there if rounding had made the recursion drift.

    Args:
        matmul: V (n, K) -> A V, float64; A symmetric positive definite.
        Y: float64 (n, K).
        precondition: R -> P^-1 R up to a constant factor, or None.
        options: tolerance, max_iterations, progress.
        bound: largest coefficient to go on with. Targets that differ where A sees one point make them grow for ever.
    """
    watch = ProgressReporter(options)
    try:
        return _iterate(matmul, Y, precondition or torch.clone, options, bound, watch)
    finally:
        watch.close()


def _iterate(matmul: Matmul, Y, precondition: Matmul, options: ConjugateGradients, bound: float, watch) -> CGResult:
    size = torch.linalg.vector_norm(Y, dim=0)
    goal = options.tolerance * size
    alpha, R, step, since, stopped, singular = torch.zeros_like(Y), Y.clone(), 0, 0, "", False
    best, best_error, verified = alpha, _largest(Y, size), float("inf")
    direction, rho = torch.zeros_like(Y), torch.ones_like(size)
    while not stopped:
        active = torch.linalg.vector_norm(R, dim=0) > goal
        if not active.any():
            R = Y - matmul(alpha)
            error = _largest(R, size)
            if error <= options.tolerance:
                return CGResult(alpha, relative(R, Y), step, "")
            if error > 0.5 * verified:
                stopped = "rounding keeps the residual above the tolerance"
            best, best_error, verified = (alpha, error, error) if error < verified else (best, best_error, verified)
            direction.zero_()
            continue
        if step == options.max_iterations or since == _STALL:
            stopped = "it makes no progress" if since == _STALL else f"max_iterations = {step} steps were not enough"
            break
        Z = precondition(R)
        fresh = (R * Z).sum(0)
        if not bool((fresh > 0)[active].all()):
            stopped = "the preconditioner is not positive definite to rounding"
            break
        direction = Z.add_(direction * torch.where(active, fresh / rho, 0.0))
        product = matmul(direction)
        curvature = (direction * product).sum(0)
        if not bool((curvature > 0)[active].all()):
            singular, stopped = True, "the kernel matrix is not positive definite to rounding"
            break
        length = torch.where(active, fresh / curvature, 0.0)
        alpha, R, rho = alpha + direction * length, R.sub_(product.mul_(length)), fresh
        step, since, error = step + 1, since + 1, _largest(R, size)
        watch.step(step, error)
        if not float(alpha.abs().max()) <= bound:
            singular, stopped = True, f"coefficients grew past {bound:.0e}"
        elif error < best_error:
            best, best_error, since = alpha, error, 0
    return CGResult(best, relative(Y - matmul(best), Y), step, stopped, singular)


def _largest(R: torch.Tensor, size: torch.Tensor) -> float:
    """max_c ||R_c|| / size_c; a column of size 0 counts by its own length."""
    errors = torch.linalg.vector_norm(R, dim=0) / torch.where(size > 0, size, 1.0)
    return float(errors.max()) if errors.numel() else 0.0


def relative(R: torch.Tensor, Y: torch.Tensor) -> float:
    """||R|| / ||Y|| (Frobenius); 0 where Y is."""
    size = float(torch.linalg.vector_norm(Y))
    return float(torch.linalg.vector_norm(R)) / size if size > 0 else 0.0
