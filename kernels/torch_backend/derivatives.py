"""Squared distances, kernel values and gradient weights as autograd functions, with derivatives of any order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..profile import Profile, weight_at_zero, weight_slope
from .distance import NEAR, common_offset, norms_from, squared_distances


def distances(Z: Tensor, X: Tensor, offset: int | None) -> Tensor:
    """||z_i - x_j||^2; where Z are rows of X from an offset on, pairs of a point with itself are zero by index."""
    return _SquaredDistances.apply(Z, X, offset)  # pyright: ignore


def values(sq: Tensor, kernel: Profile) -> Tensor:
    """Kernel values of squared distances."""
    return _Value.apply(sq, kernel)  # pyright: ignore


def weights(sq: Tensor, kernel: Profile) -> Tensor:
    """Gradient weights of squared distances; at r = 0 their limit or, at a kink, 0."""
    return _Weight.apply(sq, kernel)  # pyright: ignore


class Crowds(NamedTuple):
    """Points that are near each other share a centre, from which products see little more than what they differ by.

    Attributes:
        centres: (L, d) in float64, the first one that of all other points.
        of_z, of_x: which centre each point has (b,) and (n,).
    """

    centres: Tensor
    of_z: Tensor
    of_x: Tensor

    def swapped(self) -> Crowds:
        """With the points in each other's place."""
        return Crowds(self.centres, self.of_x, self.of_z)

    def around(self, Z: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        """The points less their centres."""
        if len(self.centres) == 1:
            return Z - self.centres[0], X - self.centres[0]
        return Z - self.centres[self.of_z], X - self.centres[self.of_x]


@torch.no_grad()
def crowds(sq: Tensor, Z: Tensor, X: Tensor, offset: int | None) -> Crowds:
    """The crowds of a block of points, by their squared distances: each has the first point that it is near to.

    Of float32 points there are none: float64 products have digits enough for these.
    """
    origin, nobody = X.mean(0, dtype=torch.float64), torch.zeros(len(Z), dtype=torch.long, device=Z.device)
    others = nobody.new_zeros(len(X))
    if sq.dtype != torch.float64 or sq.numel() == 0:
        return Crowds(origin[None], nobody, others)
    near = sq < NEAR[sq.dtype] * (norms_from(Z, origin)[:, None] + norms_from(X, origin))
    alone = near.sum(1) <= (0 if offset is None else 1)  # but for itself
    if bool(alone.all()):
        return Crowds(origin[None], nobody, others)
    near.masked_fill_(alone[:, None], False)
    first, which = near.byte().argmax(1)[~alone].unique(return_inverse=True)
    of_z = nobody.masked_scatter(~alone, which + 1)
    of_x = torch.where(near.any(0), of_z[near.byte().argmax(0)], others)
    return Crowds(torch.cat([origin[None], X[first].double()]), of_z, of_x)


def towards(W: Tensor, z: Tensor, x: Tensor, shared: Crowds) -> Tensor:
    """sum_j W_icj (x_j - z_i) for W (b, K, n), (b, K, d), all float64: plain products, with derivatives of any order.

    The points come less their centres. Weights of near pairs, which may be large, meet differences to a centre that the
    pair shares; what centres differ by counts for other pairs only.
    """
    centres, of_z, of_x = shared
    found = W @ x - W.sum(2)[:, :, None] * z[:, None]
    if len(centres) == 1:
        return found
    apart = torch.arange(len(centres), device=W.device) != of_z[:, None]
    sums = W.new_zeros(*W.shape[:2], len(centres)).index_add(2, of_x, W) * apart[:, None]
    between = centres - centres[0]
    return found + (sums @ between - sums.sum(2)[:, :, None] * between[of_z][:, None])


class _SquaredDistances(torch.autograd.Function):
    """||z_i - x_j||^2 as accurate as the operations', with derivatives of any order: they are plain products."""

    @staticmethod
    def forward(ctx: Any, Z: Tensor, X: Tensor, offset: int | None) -> Tensor:
        ctx.save_for_backward(Z, X)
        out = Z.new_empty(len(Z), len(X))
        origin = common_offset(X)
        norms = norms_from(Z, origin), norms_from(X, origin)
        squared_distances(Z, X, *norms, out, offset, origin=origin)
        ctx.crowds = crowds(out, Z, X, offset)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        # G grows like 1 / r where points nearly meet and the kernel has a kink: the differences cancel in float32.
        (G,), (Z, X) = cotangents, ctx.saved_tensors
        dtype, G = Z.dtype, G.double()
        Z, X = ctx.crowds.around(Z.double(), X.double())
        to_z = towards(G[:, None], Z, X, ctx.crowds)[:, 0]
        to_x = towards(G.T[:, None], X, Z, ctx.crowds.swapped())[:, 0]
        return (-2.0 * to_z).to(dtype), (-2.0 * to_x).to(dtype), None


class _Value(torch.autograd.Function):
    """phi as a function of r^2, whose derivative is -w / 2."""

    @staticmethod
    def forward(ctx: Any, sq: Tensor, kernel: Profile) -> Tensor:
        ctx.save_for_backward(sq)
        ctx.kernel = kernel
        return kernel.value_(sq.clone())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        (G,), (sq,) = cotangents, ctx.saved_tensors
        return -0.5 * G * _Weight.apply(sq, ctx.kernel), None  # pyright: ignore


class _Weight(torch.autograd.Function):
    """The gradient weight as a function of r^2, at r = 0 its limit or, at a kink, 0."""

    @staticmethod
    def forward(ctx: Any, sq: Tensor, kernel: Profile) -> Tensor:
        ctx.save_for_backward(sq)
        ctx.kernel = kernel
        weight = kernel.weight_(sq.clone())
        return weight.masked_fill_(sq == 0, weight_at_zero(kernel))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        (G,), (sq,) = cotangents, ctx.saved_tensors
        apart = sq > 0
        r2 = torch.where(apart, sq, torch.ones_like(sq))
        slope = weight_slope(ctx.kernel, r2, _Weight.apply(r2, ctx.kernel))  # pyright: ignore
        return torch.where(apart, G * slope, torch.zeros_like(G)), None
