"""Kernels of the angle and the norms: k(x, z) = ||x||^s ||z||^s h(theta), s the degree of homogeneity.

With T = -h'(theta) / sin(theta), unit vectors x^, z^ and r = ||x^ - z^||, the gradient at z is

    ||x||^s ||z||^(s-1) (T (x^ - cos(theta) z^) + s h z^) = ||x||^s ||z||^(s-1) (T (x^ - z^) + (T r^2 / 2 + s h) z^).

The angle comes from half-distances of unit vectors, theta = 2 atan2(||x^ - z^||, ||x^ + z^||), which keeps its digits
near 0 and near pi, where the arc cosine of a rounded cosine loses half of them; and the difference x^ - z^ goes by
near pairs, where T is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..torch_backend.distance import common_offset, norms_from, squared_distances, squared_norms
from ..torch_backend.gradients import Nearness
from .pairs import PairKernel, Pairs, add_differences

# Unit vectors that are this close, or this close to opposite, are parallel to rounding.
_PARALLEL = (16 * torch.finfo(torch.float64).eps) ** 2
_SQUARED = 400  # rows beyond 2^-400 and 2^400 have squares that float64 does not hold
_OPPOSITE = 3.0  # squared distances from which the one to the opposite vector is measured, too


@dataclass
class Angles:
    """Angles of a block of pairs, float64: theta, its sine, and r^2 = 2 (1 - cos(theta))."""

    theta: torch.Tensor
    sine: torch.Tensor
    sq: torch.Tensor

    @property
    def cosine(self) -> torch.Tensor:
        """Cosines of the angles."""
        return 1.0 - 0.5 * self.sq


class AngleProfile(PairKernel):
    """k(x, z) = ||x||^s ||z||^s h(theta); subclasses give h and T = -h' / sin.

    A zero vector is at a right angle to everything: k is h(pi / 2) with it for s = 0, and 0 for others; the gradient
    there is 0. Where one vector is a multiple of the other T counts as 0: its difference is 0, or there is a kink.
    """

    rotation_invariant = True
    agop_forms: ClassVar[tuple[str, ...]] = ("gradient", "gram")

    @property
    def degree(self) -> int:
        """s, of homogeneity in each point."""
        raise self._lacks("degree, a property")

    def height(self, angles: Angles) -> torch.Tensor:
        """h(theta), a tensor of its own."""
        raise self._lacks("height(angles)")

    def tangent(self, angles: Angles) -> torch.Tensor:
        """T(theta) = -h'(theta) / sin(theta), a tensor of its own; any number where vectors are parallel."""
        raise self._lacks("tangent(angles)")

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """Blocks of angles of the points."""
        return AnglePairs(self, X, Z)

    def diagonal(self, X: torch.Tensor) -> torch.Tensor:
        """k(x, x) = ||x||^(2 s) h(0) of every row."""
        zero, live = X.new_zeros(len(X)), (X != 0).any(1)
        right = Angles(*(torch.where(live, zero, number) for number in (0.5 * math.pi, 1.0, 2.0)))
        return self.height(right).mul_(lengths(X).pow_(2 * self.degree))


def lengths(X: torch.Tensor) -> torch.Tensor:
    """||x|| of each row, whatever its size (n,)."""
    return _unit(X)[1]


class AnglePairs(Pairs):
    """A kernel of the angle at its points."""

    def __init__(self, kernel: AngleProfile, X: torch.Tensor, Z: torch.Tensor):
        super().__init__(X, Z)
        self.kernel = kernel
        self.x, self.nx = _unit(X)
        self.z, self.nz = (self.x, self.nx) if self.symmetric else _unit(Z)
        self.origin = common_offset(self.x)
        self.x2 = norms_from(self.x, self.origin)
        self.z2 = self.x2 if self.symmetric else norms_from(self.z, self.origin)
        self.near = Nearness(self.x, self.z, self.origin)

    def _squares(self, row: slice, width: int | None) -> torch.Tensor:
        x, z = self.x[:width], self.z[row]
        sq = self.X.new_empty(len(z), len(x))
        start = row.start if self.symmetric else None
        return squared_distances(z, x, self.z2[row], self.x2[:width], sq, start, origin=self.origin)

    def _angles(self, row: slice, sq: torch.Tensor) -> Angles:
        """Angles of squared distances, which are kept; zero vectors are at right angles."""
        width = sq.shape[1]
        x, z = self.x[:width], self.z[row]
        sq.masked_fill_(self.nx[:width] == 0, 2.0).masked_fill_((self.nz[row] == 0)[:, None], 2.0)
        sq.clamp_(max=4.0)
        opposite = 4.0 - sq
        if bool((sq > _OPPOSITE).any()):
            far = squared_distances(z, -x, squared_norms(z), squared_norms(x), torch.empty_like(sq))
            opposite = torch.where(sq > _OPPOSITE, far.clamp_(max=4.0), opposite)
        sine = (sq * opposite).sqrt_().mul_(0.5)
        theta = torch.atan2(sq.sqrt(), opposite.sqrt_()).mul_(2.0)
        return Angles(theta, sine, sq)

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """Kernel values ||z||^s h(theta) ||x||^s of a block."""
        h = self.kernel.height(self._angles(row, self._squares(row, width)))
        s = self.kernel.degree
        return h.mul_(self.nz[row, None] ** s).mul_(self.nx[:width] ** s) if s else h

    def _parts(self, row: slice, sq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Angles]:
        """(T, s h, angles); T is zero where vectors are parallel or zero."""
        angles = self._angles(row, sq)
        tangent = self.kernel.tangent(angles)
        parallel = (angles.sq <= _PARALLEL).logical_or_(angles.sine.square() <= _PARALLEL)
        tangent.masked_fill_(parallel.logical_or_(self.nx == 0).logical_or_((self.nz[row] == 0)[:, None]), 0.0)
        return tangent, self.kernel.height(angles).mul_(self.kernel.degree), angles

    def _length(self, row: slice) -> torch.Tensor:
        """||z||^(s-1), zero where z is."""
        n = self.nz[row]
        return torch.where(n > 0, n, 1.0).pow(self.kernel.degree - 1).mul_(n > 0)

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """T (x^ - z^) by differences, and the rest along z^."""
        sq = self._squares(row, None)
        near = self.near.among(sq, row)
        w, along, angles = self._parts(row, sq)
        along.addcmul_(w, angles.sq, value=0.5)
        centers = self.nx**self.kernel.degree
        factor = centers.expand_as(w) if factor is None else factor * centers
        w.mul_(factor)
        along.mul_(factor)
        part, z = torch.zeros_like(out), self.z[row]
        add_differences(w, near, alpha, self.x, z, part, self.origin)
        part.addcmul_((along @ alpha)[:, :, None], z[:, None])
        out.addcmul_(part, self._length(row)[:, None, None])

    def combination(self, row: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """u = ||x||^(s-1) ||z||^(s-1) T, v = ||x||^s ||z||^(s-2) (s h - T cos)."""
        tangent, along, angles = self._parts(row, self._squares(row, None))
        s, nx, nz = self.kernel.degree, self.nx, self.nz[row, None]
        along.addcmul_(tangent, angles.cosine, value=-1.0).mul_(nx**s).mul_(self._length(row)[:, None])
        along.div_(torch.where(nz > 0, nz, 1.0))
        tangent.mul_(self._length(row)[:, None]).mul_(nx**s).div_(torch.where(nx > 0, nx, 1.0))
        return tangent, along


def _unit(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows over their lengths, lengths); a zero row stays zero."""
    if not X.numel():
        return X, X.new_zeros(len(X))
    size = X.abs().amax(1, keepdim=True)
    usual = (size == 0).logical_or_((size >= 2.0**-_SQUARED) & (size <= 2.0**_SQUARED))
    unit = torch.where(usual, 1.0, torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1))
    x = X / unit  # powers of two: nothing rounds
    n = torch.linalg.vector_norm(x, dim=1)
    return x / torch.where(n > 0, n, 1.0)[:, None], n * unit[:, 0]
