"""The low-rank preconditioner of conjugate gradients: pivoted Cholesky, and an eigenbasis of what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastagop.solvers.limits import finite_values

PROPOSALS = 128  # pivots drawn at once
ROWS = 4096  # rows of the preconditioner rotated at once
_WIDE = 1e6  # ratio of eigenvalues from which a Gram matrix is not enough to make columns orthogonal
_EPS = torch.finfo(torch.float64).eps

Matmul = Callable[[torch.Tensor], torch.Tensor]


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
        """The number of columns of U."""
        return self.U.shape[1]

    @property
    def largest(self) -> float:
        """The largest eigenvalue of P."""
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
        draw = torch.multinomial(left.cpu(), min(PROPOSALS, rank - r), replacement=True, generator=generator)
        index = draw.to(left.device)
        G = columns(index)
        finite_values(float(G.sum()))
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
    for start in range(0, len(F), ROWS):
        rows = F[start : start + ROWS]
        rows[:, : T.shape[1]] = rows @ T
    return F[:, : T.shape[1]]
