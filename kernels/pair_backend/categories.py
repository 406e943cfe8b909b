"""Categories in kernels of sums over features: one-hot columns, of which a point has at most one, of any scales.

With h the distance between the two values of a column, |x_k - z_k|^p summed over the columns of a category is
h_a^p + h_b^p for two points of the categories a and b, and 0 where they are the same: one number in the place of a
difference for every column. At such a column, with bits that say which points have it, the gradient is

    h^(p-1) sum_j w_ij alpha_jc (bit_jk - bit_ik),

a product of matrices. Both are the numbers that differences give.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .pairs import add_combination

_COLUMNS = 4  # of a category, at least: fewer are faster by differences
# Points of either kind, and pairs, from which looking for categories costs less than it saves.
_POINTS, _PAIRS = 256, 2**20


class Categories:
    """The categories of centers X and points Z, X itself where they are the same.

    Args:
        columns: index of their columns, those of a category together.
        sizes: columns of each category.

    Attributes:
        columns: as given.
        others: index of all other columns.
    """

    def __init__(self, X: torch.Tensor, Z: torch.Tensor, power: float, columns: torch.Tensor, sizes: list[int]):
        self.columns = columns
        left = torch.ones(X.shape[1], dtype=torch.bool, device=X.device).index_fill_(0, columns, False)
        self.others = left.nonzero().squeeze(1)
        low, high = _range(X[:, columns], Z[:, columns])
        step = high - low
        self.step = torch.where(step > 0, step.pow(power - 1.0), 0.0)
        self.x = _bits(X[:, columns], low, high).to(X.dtype)
        self.z = self.x if Z is X else _bits(Z[:, columns], low, high).to(X.dtype)
        heights = step.pow(power).split(sizes)
        self.centers = [_codes(bits, h) for bits, h in zip(self.x.split(sizes, 1), heights, strict=True)]
        self.points = [_codes(bits, h) for bits, h in zip(self.z.split(sizes, 1), heights, strict=True)]

    @classmethod
    def of(cls, X: torch.Tensor, Z: torch.Tensor, power: float) -> Categories | None:
        """Those of the points; None where there are none, or too few pairs."""
        if min(len(X), len(Z)) < _POINTS or len(X) * len(Z) < _PAIRS:
            return None
        low, high = _range(X, Z)
        two = torch.stack([((t == low) | (t == high)).all(0) for t in (X, Z)]).all(0) & (high > low)
        index = two.nonzero().squeeze(1)
        bits = _bits(torch.cat([X[:, index], Z[:, index]]), low[index], high[index])
        found = [part for part in _exclusive(bits) if part.stop - part.start >= _COLUMNS]
        if not found:
            return None
        return cls(X, Z, power, torch.cat([index[part] for part in found]), [part.stop - part.start for part in found])

    def add_sums(self, row: slice, out: torch.Tensor) -> None:
        """Add the categories' sums of a block of points to out (b, width)."""
        width = out.shape[1]
        for (x, hx), (z, hz) in zip(self.centers, self.points, strict=True):
            out.add_((hz[row, None] + hx[:width]).masked_fill_(z[row, None] == x[:width], 0.0))

    def add_gradients(self, row: slice, w: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """Add these columns' gradients to out (b, K, d), from weights (b, n)."""
        part = out.new_zeros(len(out), out.shape[1], len(self.columns))
        add_combination(w, w.neg(), alpha, self.x, self.z[row], part)
        out.index_add_(2, self.columns, part.mul_(self.step))


def _range(X: torch.Tensor, Z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(least, largest) value of each column."""
    (low, high), other = torch.aminmax(X, dim=0), torch.aminmax(Z, dim=0)
    return torch.minimum(low, other.min), torch.maximum(high, other.max)


def _bits(X: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Where a column has the larger one of its two values."""
    return (high == X) & (high > low)


def _codes(bits: torch.Tensor, heights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of each point's category, 0 for none; its h^p)."""
    has, at = bits.max(1)
    return torch.where(has > 0, at + 1, 0).int(), has * heights[at]


def _exclusive(bits: torch.Tensor) -> Iterator[slice]:
    """Runs of columns, as long as they can be, of which no point has two."""
    taken, first = bits.new_zeros(len(bits)), 0
    for k, column in enumerate(bits.T.contiguous()):
        if bool((taken & column).any()):
            yield slice(first, k)
            taken, first = column.clone(), k
        else:
            taken |= column
    if bits.shape[1]:
        yield slice(first, bits.shape[1])
