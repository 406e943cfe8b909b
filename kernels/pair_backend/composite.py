"""Pairs of sums, products and multiples of kernels: values combine, and so do gradients.

grad (k1 + k2) is the sum of the gradients, and grad (k1 k2) = k2 grad k1 + k1 grad k2, whose factors go into the sums
over pairs. A radial kernel's pairs are here, too, as parts of such kernels.
"""

from __future__ import annotations

import math

import torch

from .. import checks
from ..profile import Kernel, Profile
from ..scaling import scale_points, scaled_
from ..torch_backend.distance import common_offset, dominant_offset, norms_from, squared_distances
from ..torch_backend.gradients import Nearness
from .pairs import PairKernel, Pairs, add_differences


def pairs_of(kernel: Kernel, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
    """The pairs of any kernel."""
    if isinstance(kernel, Profile):
        return RadialPairs(kernel, X, Z)
    assert isinstance(kernel, PairKernel)
    return kernel.pairs(X, Z)


def diagonal_of(kernel: Kernel, X: torch.Tensor) -> torch.Tensor:
    """k(x, x) of each point (n,), for any kernel."""
    return kernel.diagonal(X) if isinstance(kernel, PairKernel) else X.new_ones(len(X))


_SQUARED = 400  # points beyond 2^-400 and 2^400 have differences whose squares float64 does not hold


class RadialPairs(Pairs):
    """A radial kernel at its points; in a unit of length only where squares would leave float64."""

    def __init__(self, kernel: Profile, X: torch.Tensor, Z: torch.Tensor):
        super().__init__(X, Z)
        size = max(map(checks.largest, (X, Z))) if checks.readable(X) else 1.0
        self.exponent = 0
        if 0 < size < 2.0**-_SQUARED or 2.0**_SQUARED < size < math.inf:
            kernel, X, Z, unit = scale_points(kernel, X, Z)
            self.exponent = math.frexp(unit)[1] - 1
        self.kernel, self.x, self.z, self.shift = kernel, X, Z, dominant_offset(X)
        self.origin = common_offset(X)
        self.x2 = norms_from(X, self.origin)
        self.z2 = self.x2 if self.symmetric else norms_from(Z, self.origin)
        self.near = Nearness(X, Z, self.shift)

    def _squares(self, row: slice, width: int | None) -> torch.Tensor:
        z, x = self.z[row], self.x[:width]
        sq = x.new_empty(len(z), len(x))
        start = row.start if self.symmetric else None
        norms = self.z2[row], self.x2[:width]
        return squared_distances(z, x, *norms, sq, start, origin=self.origin)

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """phi of a block of distances."""
        return self.kernel.value_(self._squares(row, width))

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """w (x - z), by the blocks of the radial kernels."""
        sq = self._squares(row, None)
        near = self.near.among(sq, row)
        w = self.kernel.weight_(sq)
        w = w if factor is None else w.mul_(factor)
        if not self.exponent:
            add_differences(w, near, alpha, self.x, self.z[row], out, self.shift)
            return
        part = torch.zeros_like(out)
        add_differences(w, near, alpha, self.x, self.z[row], part, self.shift)
        out.add_(scaled_(part, -self.exponent))

    def combination(self, row: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(w, -w): the gradient is w (x - z)."""
        w = scaled_(self.kernel.weight_(self._squares(row, None)), -2 * self.exponent)
        return w, w.neg()


class SumPairs(Pairs):
    """Blocks of a sum k1 + k2."""

    def __init__(self, left: Pairs, right: Pairs):
        super().__init__(left.X, left.Z)
        self.left, self.right = left, right

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """Values of a block: the sum of both kernels' values."""
        return self.left.values(row, width).add_(self.right.values(row, width))

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """Add the gradients of both kernels."""
        self.left.add_gradients(row, factor, alpha, out)
        self.right.add_gradients(row, factor, alpha, out)

    def combination(self, row: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sum of both kernels' combinations."""
        (u, v), (other, more) = self.left.combination(row), self.right.combination(row)
        return u.add_(other), v if more is None else more if v is None else v.add_(more)


class ProductPairs(Pairs):
    """Blocks of a product k1 k2."""

    def __init__(self, left: Pairs, right: Pairs):
        super().__init__(left.X, left.Z)
        self.left, self.right = left, right

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """Values of a block: the product of both kernels' values."""
        return self.left.values(row, width).mul_(self.right.values(row, width))

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """k2 grad k1 + k1 grad k2."""
        for one, other in ((self.left, self.right), (self.right, self.left)):
            times = other.values(row)
            one.add_gradients(row, times if factor is None else times.mul_(factor), alpha, out)

    def combination(self, row: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """k2 (u1, v1) + k1 (u2, v2)."""
        u: torch.Tensor | None = None
        v: torch.Tensor | None = None
        for one, other in ((self.left, self.right), (self.right, self.left)):
            times, (more, beside) = other.values(row), one.combination(row)
            u = more.mul_(times) if u is None else u.addcmul_(more, times)
            if beside is not None:
                v = beside.mul_(times) if v is None else v.addcmul_(beside, times)
        assert u is not None
        return u, v


class MultiplePairs(Pairs):
    """Blocks of a multiple c k."""

    def __init__(self, factor: float, inner: Pairs):
        super().__init__(inner.X, inner.Z)
        self.factor, self.inner = factor, inner

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """Values of a block: c times the kernel's values."""
        return self.inner.values(row, width).mul_(self.factor)

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """The gradient of the kernel itself with multiplied coefficients."""
        self.inner.add_gradients(row, factor, alpha * self.factor, out)

    def combination(self, row: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The kernel's combination, times c."""
        u, v = self.inner.combination(row)
        return u.mul_(self.factor), v if v is None else v.mul_(self.factor)
