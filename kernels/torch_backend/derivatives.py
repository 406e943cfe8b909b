"""Squared distances, kernel values and gradient weights as autograd functions, with derivatives of any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..profile import Profile, weight_at_zero, weight_slope
from .distance import common_offset, norms_from, squared_distances


def distances(Z: Tensor, X: Tensor, offset: int | None) -> Tensor:
    """||z_i - x_j||^2; where Z are rows of X from an offset on, pairs of a point with itself are zero by index."""
    return _SquaredDistances.apply(Z, X, offset)  # pyright: ignore


def values(sq: Tensor, kernel: Profile) -> Tensor:
    """Kernel values of squared distances."""
    return _Value.apply(sq, kernel)  # pyright: ignore


def weights(sq: Tensor, kernel: Profile) -> Tensor:
    """Gradient weights of squared distances; at r = 0 their limit or, at a kink, 0."""
    return _Weight.apply(sq, kernel)  # pyright: ignore


class _SquaredDistances(torch.autograd.Function):
    """||z_i - x_j||^2 as accurate as the operations', with derivatives of any order: they are plain products."""

    @staticmethod
    def forward(ctx: Any, Z: Tensor, X: Tensor, offset: int | None) -> Tensor:
        ctx.save_for_backward(Z, X)
        out = Z.new_empty(len(Z), len(X))
        origin = common_offset(X)
        norms = norms_from(Z, origin), norms_from(X, origin)
        return squared_distances(Z, X, *norms, out, offset, origin=origin)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        # G grows like 1 / r where points nearly meet and the kernel has a kink: the differences cancel in float32.
        (G,), (Z, X) = cotangents, ctx.saved_tensors
        dtype, G, Z, X = Z.dtype, G.double(), Z.double(), X.double()
        origin = X.detach().mean(0)
        Z, X = Z - origin, X - origin
        to_z, to_x = 2.0 * (G.sum(1)[:, None] * Z - G @ X), 2.0 * (G.sum(0)[:, None] * X - G.T @ Z)
        return to_z.to(dtype), to_x.to(dtype), None


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
