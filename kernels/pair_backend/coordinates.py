"""Kernels of the sum over features of |x_k - z_k|^p: no product of matrices gives such a distance, nor its gradient.

With rho = sum_k |x_k - z_k|^p and k = phi(rho), the gradient at z has the features

    w |x_k - z_k|^(p-1) sign(x_k - z_k),    w = -p phi'(rho),

and sign(0) = 0: at a tie in a feature, where there is a kink for p <= 1, that feature's derivative is taken as 0. All
differences of a few points to a chunk of centers are formed at once, small enough to stay in a processor's cache, and
multiplied by the coefficients of all outputs. For p = 1 and a feature without ties, sign(x - z) = 2 [x > z] - 1: one
comparison in place of a difference and its sign. Equal rows, which tie in every feature, have the weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .categories import Categories
from .pairs import PairKernel, Pairs

_CACHED = 2**19  # differences that are formed at once
_GROUP = 256  # points whose coefficients are multiplied by weights at once, at most


class CoordinateProfile(PairKernel):
    """k(x, z) = phi(sum_k |x_k - z_k|^p), phi(0) = 1 >= phi >= 0; subclasses give p, phi and the gradient weight."""

    shift_invariant = True
    unit_diagonal = True
    nonnegative = True
    wide = False

    @property
    def power(self) -> float:
        """Power p of the differences |x_k - z_k| that are summed."""
        raise self._lacks("power, a property")

    def value_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite rho by phi(rho)."""
        raise self._lacks("value_(rho)")

    def weight_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite rho by w = -p phi'(rho), zero where rho = 0."""
        raise self._lacks("weight_(rho)")

    def blocks_alive(self) -> int:
        """Differences take a cache's worth beside these."""
        return 6

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """Blocks of sums over features."""
        return CoordinatePairs(self, X, Z)


class CoordinatePairs(Pairs):
    """A kernel of a sum over features at its points."""

    def __init__(self, kernel: CoordinateProfile, X: torch.Tensor, Z: torch.Tensor):
        super().__init__(X, Z)
        self.kernel = kernel
        self.categories = Categories.of(X, Z, kernel.power)
        others = slice(None) if self.categories is None else self.categories.others
        self.x = X[:, others]  # what is left to differences
        self.z = self.x if self.symmetric else Z[:, others]
        self.columns = self.x.T.contiguous()
        self.ties: torch.Tensor | None = None  # index of the features that tie, and these features of the centers
        self.tied = self.columns[:0]

    def _sums(self, row: slice, width: int | None) -> torch.Tensor:
        """rho of a block: 0 for equal rows."""
        z, x, p = self.z[row], self.columns[:, :width], self.kernel.power
        out = z.new_zeros(len(z), x.shape[1])
        for here, columns, work in self._steps(len(z), x.shape[1]):
            torch.sub(x[:, columns], z[here, :, None], out=work).abs_()
            torch.sum(work if p == 1.0 else work.pow_(p), 1, out=out[here, columns])
        if self.categories is not None:
            self.categories.add_sums(row, out)
        return out

    def _steps(self, points: int, width: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(points, centers, what their differences (points, d, centers) may be written to), a cache's worth each."""
        d = len(self.columns)
        if not d:
            return
        wide = max(1, min(width, _CACHED // d))
        many = max(1, min(points, _CACHED // (d * wide)))
        work = self.X.new_empty(many * d * wide)
        for start in range(0, points, many):
            here = slice(start, min(points, start + many))
            for first in range(0, width, wide):
                columns = slice(first, min(width, first + wide))
                shape = here.stop - start, d, columns.stop - first
                yield here, columns, work[: math.prod(shape)].view(shape)

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """phi of a block of sums."""
        return self.kernel.value_(self._sums(row, width))

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """For a few points at a time, coefficients times what the differences are turned into."""
        w = self.kernel.weight_(self._sums(row, None))
        if factor is not None:
            w.mul_(factor)
        if self.categories is None:
            return self._add_differences(row, w, alpha, out)
        self.categories.add_gradients(row, w, alpha, out)
        part = out.new_zeros(len(out), out.shape[1], len(self.columns))
        self._add_differences(row, w, alpha, part)
        out.index_add_(2, self.categories.others, part)

    def _add_differences(self, row: slice, w: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """The features that are left, from weights (b, n)."""
        z, (n, d), outputs = self.z[row], self.x.shape, alpha.T.contiguous()
        if self.kernel.power == 1.0 and self.ties is None:
            self.ties = tied_features(self.x, None if self.symmetric else self.z)
            self.tied = self.columns[self.ties]
        few = self.ties is not None and 2 * len(self.ties) < d
        group = max(1, min(_GROUP, _CACHED // max(1, n * len(outputs))))
        for begin in range(0, len(z), group):
            some = slice(begin, begin + group)
            weighted = w[some, None] * outputs
            if few:
                out[some].sub_(weighted.sum(2, keepdim=True))
                weighted.mul_(2.0)
            part = out[some]
            for here, columns, work in self._steps(len(part), n):
                turned = self._turned(columns, z[some][here], work, few)
                part[here].baddbmm_(weighted[here, :, columns], turned.transpose(1, 2))

    def _turned(self, columns: slice, z: torch.Tensor, out: torch.Tensor, few: bool) -> torch.Tensor:
        """|x_k - z_k|^(p-1) sign(x_k - z_k) of some centers and points, into out (points, d, centers).

        With ``few`` ties, (1 + sign(x_k - z_k)) / 2.
        """
        x = self.columns[:, columns]
        if not few:
            return signed_power_(torch.sub(x, z[:, :, None], out=out), self.kernel.power - 1.0)
        torch.gt(x, z[:, :, None], out=out)
        if self.ties is not None and len(self.ties):
            out[:, self.ties] = (self.tied[:, columns] - z[:, self.ties, None]).sign_().add_(1.0).mul_(0.5)
        return out


def tied_features(X: torch.Tensor, Z: torch.Tensor | None) -> torch.Tensor:
    """Index of the features in which a row of X ties with another one, or with a row of Z where there are such rows."""
    values = X if Z is None else torch.cat([X, Z])
    found = [(part[1:] == part[:-1]).any(0) for part in (c.sort(0).values for c in values.split(64, 1))]
    return torch.cat(found).nonzero().squeeze(1)


def signed_power_(t: torch.Tensor, power: float) -> torch.Tensor:
    """Overwrite t by |t|^power sign(t), zero where t = 0 whatever the power."""
    if power == 0.0:
        return t.sign_()
    if power == 1.0:
        return t
    size = t.abs().pow_(power)
    return t.sign_().mul_(size.masked_fill_(t == 0, 0.0))
