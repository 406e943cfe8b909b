"""Kernels of the sum over features of |x_k - z_k|^p: no product of matrices gives such a distance, nor its gradient.

With rho = sum_k |x_k - z_k|^p and k = phi(rho), the gradient at z has the features

    w |x_k - z_k|^(p-1) sign(x_k - z_k),    w = -p phi'(rho),

and sign(0) = 0: at a tie in a feature, where there is a kink for p <= 1, that feature's derivative is taken as 0. All
differences of a few points to a chunk of centers are formed at once, small enough to stay in a processor's cache, and
multiplied by the coefficients of all outputs.
"""

from __future__ import annotations

import torch

from .pairs import PairKernel, Pairs

_CACHED = 2**18  # differences that are formed at once


class CoordinateProfile(PairKernel):
    """k(x, z) = phi(sum_k |x_k - z_k|^p), phi(0) = 1 >= phi >= 0; subclasses give p, phi and the gradient weight."""

    shift_invariant = True
    unit_diagonal = True
    nonnegative = True
    wide = False

    @property
    def power(self) -> float:
        """p."""
        raise TypeError(f"{type(self).__name__} defines no power; use a subclass such as ProductLaplace")

    def value_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite rho by phi(rho)."""
        raise TypeError(f"{type(self).__name__} defines no phi; use a subclass such as ProductLaplace")

    def weight_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite rho by w = -p phi'(rho), zero where rho = 0."""
        raise TypeError(f"{type(self).__name__} defines no phi; use a subclass such as ProductLaplace")

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """Blocks of sums over features."""
        return CoordinatePairs(self, X, Z)


class CoordinatePairs(Pairs):
    """A kernel of a sum over features at its points."""

    def __init__(self, kernel: CoordinateProfile, X: torch.Tensor, Z: torch.Tensor):
        super().__init__(X, Z)
        self.kernel = kernel
        self.columns = X.T.contiguous()

    def _sums(self, row: slice, width: int | None) -> torch.Tensor:
        """rho of a block: 0 for equal rows."""
        p = self.kernel.power
        r = torch.cdist(self.Z[row], self.X[:width], p=p, compute_mode="donot_use_mm_for_euclid_dist")
        return r if p == 1.0 else r.pow_(p)

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """phi of a block of sums."""
        return self.kernel.value_(self._sums(row, width))

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """For a few points at a time, coefficients times what the differences are turned into."""
        w = self.kernel.weight_(self._sums(row, None))
        if factor is not None:
            w.mul_(factor)
        z, (n, d), p = self.Z[row], self.X.shape, self.kernel.power
        outputs = alpha.T.contiguous()
        width = min(n, max(1, _CACHED // d))
        points = max(1, _CACHED // (d * width))
        for start in range(0, len(z), points):
            some = slice(start, start + points)
            for first in range(0, n, width):
                columns = slice(first, first + width)
                apart = self.columns[:, columns] - z[some, :, None]
                weighted = w[some, None, columns] * outputs[:, columns]
                out[some].baddbmm_(weighted, signed_power_(apart, p - 1.0).transpose(1, 2))


def signed_power_(t: torch.Tensor, power: float) -> torch.Tensor:
    """Overwrite t by |t|^power sign(t), zero where t = 0 whatever the power."""
    if power == 0.0:
        return t.sign_()
    if power == 1.0:
        return t
    size = t.abs().pow_(power)
    return t.sign_().mul_(size.masked_fill_(t == 0, 0.0))
