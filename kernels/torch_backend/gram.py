"""Torch backend: the AGOP in its gram form, from stored weights.

With W = E + P Q^T (``LowRank``), A = alpha, s = W A and u_rc = sum_j Q_jr A_jc x_j, the gradient of output c at z_i is

    g_ic = h_ic + sum_r P_ir u_rc,    h_ic = sum_j E_ij A_jc x_j - s_ic z_i,

and M = sum_ic g_ic g_ic^T consists of

    sum_ic h_ic h_ic^T = X^T [(A A^T) o (E^T E)] X - X^T T^T Z - Z^T T X + Z^T diag(sum_c s_c^2) Z,  T = E o (s A^T),

n^2 m products by symmetry, whatever K is; where Z is X, all of it is X^T S X with one matrix S; and of what u adds,
n r K d products in float64. The terms cancel: near collapse E has entries far larger than any gradient. The form
therefore runs only while ``CancellationEstimate`` says that the cancelled digits do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from ..errors import warn
from ..gemm import add_product_, matmul_nt, random_signs, symmetrise_
from ..plan import ROWS, longest_first
from .distance import squared_norms
from .low_rank import LowRank

_SQUARE = 128  # rows of the steps along the diagonal
_PROBES = 64
_CLIPPED = 2048  # features up to which M's eigenvalues are looked at


class CancellationEstimate:
    """How much larger the gram form's uncancelled terms are than M (centred where asked), in trace.

    The terms: sum_j |a_j|^2 (E^T E)_jj |x_j - mean|^2 and sum_i |s_i|^2 |z_i - mean|^2. The trace of M, sum |g_ic|^2,
    is estimated on a few evaluation points with one random sign vector over the outputs each, whose squared norm is
    unbiased.
    """

    def __init__(
        self, W: torch.Tensor, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor, center: bool, roots=None
    ):
        self.W, self.alpha, self.m, mean = W, alpha, len(Z), X.mean(0)
        self._mean = mean
        self._s = matmul_nt(W, alpha.T.to(W.dtype)).to(X.dtype)
        self._x2 = _squares_about(mean, X)
        self._z2 = self._x2 if Z is X else _squares_about(mean, Z)
        self._trace = self._estimate(X, Z, center, roots)

    def _estimate(self, X, Z, center: bool, roots) -> float:
        W, alpha, m = self.W, self.alpha, self.m
        index = torch.arange(0, m, max(1, m // _PROBES), device=X.device)
        signs = random_signs(alpha.shape[1], len(index), alpha)
        mean = self._mean
        rows, zs = W[index], Z[index] - mean
        s = (self._s[index] * signs.T).sum(1, keepdim=True) * zs
        if center:  # what all points share is subtracted before it can hide the rest
            along = centring_direction(m, W, roots)
            v = along[index, None]
            rows = rows - v * (along @ W)
            s -= v.to(s) * (signs.T @ _about(mean, (self._s * along[:, None].to(s)).T, Z))
        g = _about(mean, rows.to(X.dtype) * (alpha @ signs).T, X) - s
        return float(g.square().sum(dtype=torch.float64)) * m / len(index)

    def amplification(self, low_rank: LowRank) -> float:
        """For what is left when the low-rank part is taken out."""
        s = self._s + low_rank.diagonal().to(self._s.dtype) * self.alpha if low_rank.symmetric else self._s
        total = float((squared_norms(self.alpha).double() * low_rank.residual_column_norms(self.W) * self._x2).sum())
        total += float((squared_norms(s).double() * self._z2).sum())
        return total / self._trace if self._trace > 0 else (float("inf") if total > 0 else 0.0)


def _about(mean: torch.Tensor, A: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """A (X - mean), a few rows of X at a time."""
    return sum((a @ (x - mean) for a, x in zip(A.split(ROWS, 1), X.split(ROWS), strict=True)), X.new_zeros(()))


def _squares_about(mean: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return torch.cat([squared_norms(block - mean) for block in X.split(ROWS)])


def centring_direction(m: int, W: torch.Tensor, roots: torch.Tensor | None) -> torch.Tensor:
    """The unit vector v of length m whose part centring removes: g_ic - v_i sum_k v_k g_kc.

    It is constant, or proportional to the square roots of the points' weights, by which g is then scaled.
    """
    if roots is None:
        return W.new_full((m,), m**-0.5)
    return (roots.double() / torch.linalg.vector_norm(roots.double())).to(W.dtype)


def low_rank_flops(m: int, n: int, d: int, K: int, rank: int) -> float:
    """Float64 operations that a low-rank part costs."""
    return 2.0 * (n + max(m, n)) * rank * K * d


def low_rank_bytes(m: int, n: int, d: int, K: int, rank: int) -> int:
    """Memory that a low-rank part takes beyond one of rank 1."""
    return 8 * rank * (2 * (m + n) + 3 * K * d + ROWS * K)


def gram_form(
    W: torch.Tensor,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor,
    low_rank: LowRank,
    *,
    center: bool,
    rows: int,
    lower: Callable | None = None,
    starts: Iterable[int] | None = None,
    all_else: bool = True,
    roots: torch.Tensor | None = None,
) -> torch.Tensor:
    """The summed AGOP, float64 (d, d); W (m, n) is overwritten. Blocks of S exist one at a time, lower part only.

    Args:
        W, X, alpha, Z: of one dtype, that of the products.
        low_rank: what to take out of W; it says whether evaluation points are the centers (``symmetric``).
        center: subtract the mean gradient of each output.
        rows: of a block of S.
        lower: (E, alpha) -> the step (s, weight, start, stop) -> S[start:stop, :stop], diagonal halved; default
            torch's.
        starts: first rows of the blocks of S to add up, for Z = X; default all.
        all_else: also add the terms that are not blocks of S; exactly one of the ranks that share the blocks passes
            True.
        roots: square roots of the points' weights, by which the rows of W have been multiplied; W is then not
            symmetric.
    """
    symmetric = low_rank.symmetric
    mean = X.mean(0)
    X = X - mean  # a gradient sees differences of points only
    Z = X if symmetric else Z - mean
    n, d = X.shape
    s = matmul_nt(W, alpha.T)
    if symmetric:
        s.addcmul_(low_rank.diagonal(), alpha)
    E = low_rank.subtract_(W)
    along = centring_direction(len(Z), E, roots) if center else None
    weight = s.square().sum(1)  # sum_c s_ic^2
    step = (lower or lower_s)(E, alpha) if symmetric else _lower_s(E.T, None, alpha)
    half = X.new_zeros(d, d, dtype=torch.float64)  # M = half + half^T
    for start in longest_first(n, rows) if starts is None else starts:
        stop = min(n, start + rows)
        row = slice(start, stop)
        S = step(s, weight, start, stop)
        add_product_(half, X[row].T, matmul_nt(S, X[:stop].T).T)
    if not symmetric:
        for start in range(0, len(Z), rows):
            row = slice(start, min(len(Z), start + rows))
            z = Z[row]
            T = matmul_nt(s[row], alpha).mul_(E[row])
            add_product_(half, z.T, matmul_nt(T, X.T).addcmul_(weight[row, None], z, value=-0.5).T, -1.0)
    if all_else:
        _add_low_rank(half, E, X, alpha, Z, s, low_rank, rows, along)
        if along is not None:  # of h alone: b's part was centred before it was squared
            total = _total(along, E, X, alpha, None if symmetric else Z, s, rows)
            half.addmm_(total.T, total, alpha=-0.5)
    return symmetrise_(half).mul_(2.0)


def _total(along, E, X, alpha, Z, s, rows: int) -> torch.Tensor:
    """sum_i v_i h_ic for v = along, float64 (K, d); Z is None where evaluation points are the centers."""
    columns, alpha, s = (along @ E).double(), alpha.double(), s.double() * along.double()[:, None]
    if Z is None:
        return _moments(lambda row: alpha[row] * columns[row, None] - s[row], X, rows)
    of_centers = _moments(lambda row: alpha[row] * columns[row, None], X, rows)
    return of_centers - _moments(lambda row: s[row], Z, rows)


def _add_low_rank(half, E, X, alpha, Z, s, low_rank: LowRank, rows: int, along) -> None:
    """Add half of what g g^T has beyond h h^T, with b_i = sum_r P_ir u_r: sum_i (h_i + b_i / 2) b_i^T.

    With ``along``, P and thereby b are centred.
    """
    P, Q = low_rank.P.double(), low_rank.Q.double()
    if along is not None:
        v = along.double()[:, None]
        for _ in range(2):  # what rounding leaves of it is multiplied by the mean gradient, which may be far larger
            P = P - v * (v.T @ P)
    against = low_rank.project(E, P)
    alpha, s, d = alpha.double(), s.double(), X.shape[1]

    def of_centers(row: slice) -> torch.Tensor:
        h = _outer(against, alpha, row) - (_outer(P, s, row) if low_rank.symmetric else 0.0)
        return torch.cat([_outer(Q, alpha, row), h], 1)

    u, h = _moments(of_centers, X, rows).chunk(2)
    if not low_rank.symmetric:
        h = h - _moments(lambda row: _outer(P, s, row), Z, rows)
    u = u.reshape(low_rank.rank, -1)
    h = h + 0.5 * ((P.T @ P) @ u).view(-1, d)  # h was sum_i P_ir h_ic
    half.addmm_(h.T, u.view(-1, d))


def _outer(P: torch.Tensor, A: torch.Tensor, row: slice) -> torch.Tensor:
    """P_ir A_ic, (rows, r K)."""
    return (P[row, :, None] * A[row, None, :]).flatten(1)


def _moments(coefficients: Callable, X: torch.Tensor, rows: int) -> torch.Tensor:
    """sum_i b_i x_i^T for b = coefficients(rows), float64 (k, d): in float32 this would cancel."""
    total = coefficients(slice(0, rows)).T @ X[:rows].double()
    for start in range(rows, len(X), rows):
        row = slice(start, start + rows)
        total.addmm_(coefficients(row).T, X[row].double())
    return total


def warn_of_loss(loss: float) -> None:
    """Warn that the gram form was asked for where it loses digits, so that the gradient form runs."""
    warn(
        f"agop: the gram form loses about {loss:.0e} of M on these points; the gradient form ran instead, as with "
        "method='auto'"
    )


def nonnegative(M: torch.Tensor, eps: float) -> torch.Tensor:
    """M with its negative eigenvalues, which rounding made, clipped where the smallest is below -4 eps of the largest.

    Of up to _CLIPPED features: beyond, eigenvalues would take as long as the rest.
    """
    largest = float(M.diagonal().amax()) if len(M) else 0.0
    if len(M) > _CLIPPED or not 0 < largest < math.inf:
        return M
    shifted = M.clone()
    shifted.diagonal().add_(4 * eps * largest)
    if int(torch.linalg.cholesky_ex(shifted)[1]) == 0:
        return M
    del shifted
    values, vectors = torch.linalg.eigh(M)
    return symmetrise_(matmul_nt(vectors * values.clamp_(min=0.0), vectors))


def nonnegative_bytes(d: int) -> int:
    """Most memory that ``nonnegative`` takes for a (d, d) matrix."""
    return 4 * 8 * d * d if d <= _CLIPPED else 0


def lower_s(E: torch.Tensor, alpha: torch.Tensor) -> Callable:
    """The block rows of S where Z is X."""
    return _lower_s(E, E, alpha)


def _lower_s(Et: torch.Tensor, E: torch.Tensor | None, alpha: torch.Tensor) -> Callable:
    """The block rows of S up to the diagonal, which is halved; E where Z is X, and S then holds all of h h^T."""

    def lower(s, weight, start: int, stop: int) -> torch.Tensor:
        row = slice(start, stop)
        S = _lower_rows(Et, start, stop)
        S.mul_(matmul_nt(alpha[row], alpha[:stop]))
        if E is not None:  # T + T^T = E o (s A^T + A s^T)
            left, right = torch.cat([s[row], alpha[row]], 1), torch.cat([alpha[:stop], s[:stop]], 1)
            S.addcmul_(E[row, :stop], matmul_nt(left, right), value=-1.0)
            S.diagonal(start).add_(weight[row])
        S.diagonal(start).mul_(0.5)
        S[:, start:].tril_()
        return S

    return lower


def _lower_rows(Et: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows start:stop of E^T E up to the diagonal; of the square on the diagonal one half is mostly left undone."""
    width = stop - start
    if width < 2 * _SQUARE:
        return matmul_nt(Et[start:stop], Et[:stop])
    out = Et.new_zeros(width, stop)
    out[:, :start] = matmul_nt(Et[start:stop], Et[:start])
    for i in range(0, width, _SQUARE):
        j = min(width, i + _SQUARE)
        out[i:j, start : start + j] = matmul_nt(Et[start + i : start + j], Et[start : start + j])
    return out
