"""Torch backend: the AGOP of float64 coefficients at float32 points, with nearly all of its products in float32.

Large coefficients of both signs cancel in a gradient, and where a kernel is smooth by more than float32 has digits for:
the weights w(r) of all pairs are nearly the same then. A line in r^2 takes out what they have in common,

    w(r) = a + b r^2 + rest(r).

The line's part of the gradients is made of a few moments of points and coefficients, 4 n K d^2 operations in float64.
The 2 n^2 K d of the product see the rest alone, whose values are made in float64, too, and lose as much less as it is
smaller than w: on MNIST (Gaussian, L = 2) a thousandth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..calibration import rate
from ..gemm import add_squares_, symmetrise_
from ..plan import RAISE_LIMIT, fitting_rows
from ..profile import Profile
from .agop import Means
from .costs import costs, gradient_form_bytes, products_of
from .distance import FEW, NEAR_OF_ROUNDED, around_mean, near_chunk, squared_norms, tile_bytes
from .gradients import Near, Nearness, block_gradients, gradient_aim, products_at_once
from .tiles import tiles

_ROWS, _COLUMNS = 64, 4096  # of the distances to which a line is fitted
_LEAST = 0.01  # of them, the smallest, do not count: weights may grow without bound there
_CHUNK = 2**18  # weights that are made at once, in float64
_MOMENTS_ROWS = 256  # points that join the moments at once


@dataclass(frozen=True)
class Line:
    """a + b r^2, close to a kernel's weights w(r) at the distances of some points."""

    kernel: Profile
    a: float
    b: float

    @classmethod
    def of(cls, kernel: Profile, X: torch.Tensor) -> Line | None:
        """The line of least squares; None where there are no distances, or no finite weights."""
        x, z = (X[:: -(-len(X) // count)].double() for count in (_COLUMNS, _ROWS))
        sq = torch.cat([block.flatten().clone() for _, block in tiles(x, z, _ROWS)])
        sq = sq[sq > 0].sort().values
        sq = sq[int(_LEAST * len(sq)) :]
        if len(sq) == 0:
            return None
        w = kernel.weight_(sq.clone())
        apart, level = sq - sq.mean(), w.mean()
        spread = float(apart @ apart)
        b = float(apart @ (w - level)) / spread if spread > 0 else 0.0
        a = float(level) - b * float(sq.mean())
        return cls(kernel, a, b) if math.isfinite(a) and math.isfinite(b) else None

    def rest_(self, sq: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write w(r) - a - b r^2 of float64 r^2, which is overwritten; zero where r = 0: such a pair adds nothing."""
        rows = max(1, _CHUNK // max(1, sq.shape[1]))
        for wide, part in zip(sq.split(rows), out.split(rows), strict=True):
            line, same = torch.mul(wide, self.b).add_(self.a), wide == 0
            part.copy_(self.kernel.weight_(wide).sub_(line).masked_fill_(same, 0.0))
        return out


@dataclass(frozen=True)
class Moments:
    """Sums over points x_j around a shift, weighted by coefficients A_jc, all float64.

    Attributes:
        line: whose part of the gradients they make.
        shift: (d,).
        count: sum_j A_jc, (K,).
        first: sum_j A_jc x_j, (K, d).
        second: sum_j x_j A_jc x_j^T, the outputs side by side (d, K d).
        square: sum_j A_jc ||x_j||^2, (K,).
        third: sum_j A_jc ||x_j||^2 x_j, (K, d).
    """

    line: Line
    shift: torch.Tensor
    count: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    square: torch.Tensor
    third: torch.Tensor

    @classmethod
    def of(cls, line: Line, X: torch.Tensor, alpha: torch.Tensor) -> Moments:
        """Those of points X (n, d) and float64 coefficients (n, K)."""
        (d, K), shift = (X.shape[1], alpha.shape[1]), X.mean(0, dtype=torch.float64)
        first, third = (alpha.new_zeros(K, d) for _ in range(2))
        second, square = alpha.new_zeros(d, K * d), alpha.new_zeros(K)
        for part, A in zip(X.split(_MOMENTS_ROWS), alpha.split(_MOMENTS_ROWS), strict=True):
            x = part.double() - shift
            longer = A * squared_norms(x)[:, None]
            first.addmm_(A.T, x)
            third.addmm_(longer.T, x)
            square += longer.sum(0)
            second.addmm_(x.T, (A[:, :, None] * x[:, None]).flatten(1))
        return cls(line, shift, alpha.sum(0), first, second, square, third)

    def added(self, G: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
        """G (m, K, d) plus sum_j (a + b r_ij^2) A_jc (x_j - z_i) at Z (m, d), float64.

        With r_ij^2 = ||x_j||^2 + ||z_i||^2 - 2 x_j z_i it is made of the moments.
        """
        a, b = self.line.a, self.line.b
        z = Z.double() - self.shift
        z2 = squared_norms(z)[:, None]
        found = torch.mm(z, self.second).view(len(z), *self.first.shape).mul_(-2.0 * b)
        found.addcmul_((a + b * z2)[:, :, None], self.first).add_(self.third, alpha=b)
        towards = a * self.count + b * (self.square + z2 * self.count - 2.0 * (z @ self.first.T))
        found.addcmul_(towards[:, :, None], z[:, None], value=-1.0)
        return found.add_(G)


def pays(X: torch.Tensor, K: int) -> bool:
    """Whether ``agop`` of float32 points is estimated to be faster than either form in float64."""
    (n, d), cpu = X.shape, X.device.type == "cpu"
    if X.dtype != torch.float32 or not cpu or d <= FEW or K == 0:
        return False
    x = torch.empty(0, dtype=torch.float64, device=X.device)
    narrow, wide = (costs(X, X, K, products_of(like, None, symmetric=True), symmetric=True) for like in (X, x))
    beside = (4.0 * n * K * d * d + 2.0 * n * n * d) / rate("gradient", "float64", X.device)
    return narrow["gradient"] + beside < min(wide.values())


def plan_rows(X: torch.Tensor, alpha: torch.Tensor, center: bool, room: int) -> tuple[int, int]:
    """(rows of a block, peak bytes) of ``agop``, or MemoryError."""
    (n, d), K, chunk = X.shape, alpha.shape[1], near_chunk(X.device)
    held = 8 * K * d * (d + 3 + 2 * _MOMENTS_ROWS) + 8 * n * (d + 2) + 32 * _CHUNK

    def bytes_of(rows: int) -> int:
        wide = 8 * rows * n + tile_bytes(rows, n, n, d, 8, chunk)  # distances in float64
        return held + 24 * rows * K * d + wide + gradient_form_bytes(rows, X, alpha, X, center)

    return fitting_rows(bytes_of, room, len(X), "agop", RAISE_LIMIT, gradient_aim(X.device, K * d))


def agop(
    line: Line, X: torch.Tensor, alpha: torch.Tensor, rows: int, *, center: bool, roots: torch.Tensor | None = None
) -> torch.Tensor:
    """sum_ic w_i g_ic g_ic^T over the points X (n, d), float64 (d, d); roots: square roots of w (n,), default 1.

    alpha (n, K) is float64, X float32; the gradients, centred, are rounded to float32.
    """
    d, K = X.shape[1], alpha.shape[1]
    M, means = X.new_zeros(d, d, dtype=torch.float64), Means(K * d, X) if center else None
    roots = None if roots is None else roots.double()
    moments, rounded, shift = Moments.of(line, X, alpha), alpha.to(X.dtype).contiguous(), X.mean(0)
    step = products_at_once(rounded, X, shift, min(rows, len(X)))
    buffer = X.new_empty(min(rows, len(X)), K, d)
    for row, W, near in _rest_tiles(line, X, X, rows, shift):
        G = block_gradients(W, near, rounded, X, X[row], shift, buffer[: len(W)], step)
        wide = moments.added(G, X[row])
        if roots is not None:
            wide.mul_(roots[row, None, None])
        if means is not None:
            add_squares_(M, means.centre_(wide.view(len(G), -1), None if roots is None else roots[row]).view(K, d))
        add_squares_(M, G.copy_(wide).view(-1, d))
    return symmetrise_(M)


def gradients(line: Line, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """The gradients that ``agop`` rounds and squares, at a few points Z: (m, K, d), float64."""
    shift, rounded = X.mean(0), alpha.to(X.dtype).contiguous()
    [(_, W, near)] = _rest_tiles(line, X, Z, len(Z), shift)
    out = block_gradients(W, near, rounded, X, Z, shift, X.new_empty(len(Z), alpha.shape[1], X.shape[1]))
    return Moments.of(line, X, alpha).added(out, Z)


def _rest_tiles(line: Line, X, Z, rows: int, shift) -> Iterator[tuple[slice, torch.Tensor, Near | None]]:
    """As ``tiles.weight_tiles``, of what the line leaves of the weights."""
    nearness, (x, origin) = Nearness(X, Z, shift), around_mean(X)
    z, buffer = x if Z is X else Z.double().sub_(origin), X.new_empty(min(rows, len(Z)), len(X))
    for row, sq in tiles(x, z, rows, near=NEAR_OF_ROUNDED):
        block = buffer[: len(sq)].copy_(sq)
        near = nearness.among(block, row)
        yield row, line.rest_(sq, block), near
