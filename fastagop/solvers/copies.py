"""Rows that the dtype cannot tell apart are one point: found once, merged with their weights, and shared out again.

Copies with different targets have no common coefficient: at ridge 0 coefficients grow without bound, and as soon as
rounding moves the copies apart they pass for steep gradients. m copies under a ridge mu are one point under mu / m
that answers with their mean; with sample weights w, one point of weight sum w under mu / sum w with the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastagop.solvers import near_rows
from fastagop.solvers.limits import over_weights

_MIX = (-7046029254386353131, -4417276706812531889)  # odd 64-bit multipliers


@dataclass(frozen=True)
class Given:
    """Rows as they were given, for their coefficients and for the residual of the system before copies were merged.

    Attributes, of the rows that have a weight:
        group: the point of each row (n,). share: its part in the point's coefficient, float64 (n,).
        ridges: the ridge over the row's weight, float64 (n, 1).
        apart: mean target of the point - target, float64 (n, K).
        beyond: what a row's coefficient has beyond its share, because its target differs from the mean; None where
            copies share alone.
        size: norm of the targets.
    """

    group: torch.Tensor
    share: torch.Tensor
    ridges: torch.Tensor
    apart: torch.Tensor
    beyond: torch.Tensor | None
    size: float

    def rows(self, alpha: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Coefficients of the rows (n, K), in a dtype, from those of the points (r, K)."""
        found = alpha.double()[self.group].mul_(self.share[:, None])
        return (found if self.beyond is None else found.add_(self.beyond)).to(dtype)

    def summed(self, rows: torch.Tensor, points: int) -> torch.Tensor:
        """Coefficients of the points (r, K), float64, that coefficients of the rows add up to."""
        return rows.new_zeros(points, rows.shape[1], dtype=torch.float64).index_add_(0, self.group, rows.double())

    def squares(self, R: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, part: torch.Tensor) -> float:
        """Sum of squares of the rows' residuals, estimated from those R (s, K) of some points.

        A row's residual is its point's and what the row has of its own: its ridge times its coefficient in place of
        ``part`` (r, K), the point's, and its target in place of the mean.
        """
        beyond = (self.ridges * rows.double()).sub_(part[self.group]).add_(self.apart)
        count = torch.bincount(self.group, minlength=len(part)).double()
        shift = torch.zeros_like(part).index_add_(0, self.group, beyond)
        of_points = (count[index, None] * R.square() + 2.0 * R * shift[index]).sum()
        return max(0.0, len(part) / max(1, len(index)) * float(of_points) + float(beyond.square().sum()))


@dataclass(frozen=True)
class Rows:
    """Which of n rows are trained on, as what, and how results go back to all n.

    Attributes:
        kept: rows that stand for the points (r,), in the order of training.
        left: rows of weight 0 (e,).
        group: the point of each row (n,): below r one of ``kept``, from r on one of ``left``.
        weight: total weight of each point, float64 (r,).
        each: weight of each row, float64 (n,).
        equal: whether all rows of a point are equal to the bit (r,).
        plain: every row is a point of weight 1, in the order given.
    """

    kept: torch.Tensor
    left: torch.Tensor
    group: torch.Tensor
    weight: torch.Tensor
    each: torch.Tensor
    equal: torch.Tensor
    plain: bool

    @property
    def exact(self) -> bool:
        """Whether all copies are equal to the bit; else some are equal to rounding only."""
        return bool(self.equal.all())

    @property
    def live(self) -> torch.Tensor:
        """Whether each row has a weight above 0 (n,)."""
        return self.each > 0

    @property
    def share(self) -> torch.Tensor:
        """Each weighted row's part in its point's coefficient, float64."""
        return self.each[self.live] / self.weight[self.group[self.live]]

    @property
    def merged(self) -> int:
        """How many rows were merged into another one."""
        return len(self.group) - len(self.left) - len(self.kept)

    @property
    def weights(self) -> torch.Tensor | None:
        """Weights of the points (r,), None where all are 1."""
        return None if self.plain or bool((self.weight == 1).all()) else self.weight

    @property
    def total(self) -> float:
        """The sum of the weights of all rows."""
        return float(self.weight.sum())

    def take(self, A: torch.Tensor) -> torch.Tensor:
        """The points' rows of A (n, p), A itself where every row is one."""
        return A if self.plain else A[self.kept]

    def rest(self, A: torch.Tensor) -> torch.Tensor | None:
        """Rows of A (n, p) that have no weight, None where all have one."""
        return A[self.left] if len(self.left) else None

    def all(self, A: torch.Tensor, rest: torch.Tensor | None = None) -> torch.Tensor:
        """A (r, p) of the points and ``rest`` (e, p) of the rows without weight as (n, p), in the order given."""
        if self.plain:
            return A
        return (A if rest is None else torch.cat([A, rest]))[self.group]

    def shared(self, alpha: torch.Tensor) -> torch.Tensor:
        """Coefficients (n, K) of the rows from those of the points: in proportion to the weights."""
        if self.plain:
            return alpha
        share = (alpha[self.group[self.live]].double() * self.share[:, None]).to(alpha.dtype)
        return self.among_all(share)

    def among_all(self, rows: torch.Tensor) -> torch.Tensor:
        """What rows with a weight have, as (n, K) with zeros for the others."""
        out = rows.new_zeros(len(self.group), rows.shape[1])
        out[self.live] = rows
        return out

    def means(self, Y: torch.Tensor) -> torch.Tensor:
        """Weighted mean target of each point (r, K), the same bits for a row written twice and for a weight of 2."""
        if self.plain or self.merged == 0:
            return self.take(Y)
        group, w, y, keys = (a[self.live].cpu().numpy() for a in (self.group, self.each, Y.double(), _keys(Y)))
        order = np.lexsort((keys, group))
        fresh = np.append(True, (np.diff(group[order]) != 0) | (np.diff(keys[order]) != 0))
        first = order[fresh]  # one row for each target of each point; weights of equal ones are added first
        weight = np.add.reduceat(w[order], np.flatnonzero(fresh))
        total, count = np.zeros((len(self.kept), y.shape[1])), np.bincount(group[first], minlength=len(self.kept))
        np.add.at(total, group[first], weight[:, None] * y[first])
        sums = np.bincount(group[first], weight, len(self.kept))
        mean = total / sums[:, None]
        alone = first[count[group[first]] == 1]
        mean[group[alone]] = y[alone]  # to the bit
        return torch.from_numpy(mean).to(Y)

    def given(self, Y: torch.Tensor, mean: torch.Tensor, ridge: float, bound: float) -> Given | None:
        """How coefficients and residuals of the rows follow from those of the points; None where they are the same.

        Under a ridge mu the system of all rows gives row i the coefficient w_i (y_i - mean) / mu beyond its share. It
        has no part in the predictor, and is left out where it would exceed ``bound`` and drown the shares, and where
        rounding has moved the copies apart: it would pass for a steep gradient between them.
        """
        if self.plain or self.merged == 0:
            return None
        live, w = self.live, self.each[self.live][:, None]
        group = self.group[live]
        apart = mean.double()[group] - Y.double()[live]
        beyond = torch.where(self.equal[group, None], apart, 0.0) * w / -ridge if ridge > 0 else None
        if beyond is not None and not (beyond.numel() and float(beyond.abs().max()) <= bound):
            beyond = None
        return Given(
            group=group,
            share=self.share,
            ridges=over_weights(ridge, w),
            apart=apart,
            beyond=beyond,
            size=float(torch.linalg.vector_norm(Y.double()[live])),
        )

    def contradictions(self, Y: torch.Tensor, mean: torch.Tensor) -> int:
        """Rows whose target differs from their point's mean target by more than rounding."""
        if self.plain or self.merged == 0:
            return 0
        apart = (mean[self.group[self.live]] - Y[self.live]).abs()
        return int((apart > 8 * torch.finfo(Y.dtype).eps * Y.abs().max()).any(1).sum()) if Y.shape[1] else 0


def find(X: torch.Tensor, weights: torch.Tensor | None = None) -> Rows:
    """Find rows of X (n, d) that its dtype cannot tell apart: equal to the bit, or to a few eps of a row's size.

    A row joins the first row, in an order given by contents alone, that it is a copy of. Points with copies or weights
    come in that order, so that the order in which a row and its copies are given does not matter.

    Args:
        X: points.
        weights: of the rows (n,), finite and >= 0, not all 0; default 1 each.

    Returns:
        Rows. Cost: O(n d + n log n) time, O(n + block) memory, where no crowd of rows is within rounding of each other.
    """
    device, n = X.device, len(X)
    if weights is None and near_rows.all_apart(X):
        return alone(X)
    every = torch.arange(n, device=device)
    w = torch.ones(n, dtype=torch.float64, device=device) if weights is None else weights.to(device, torch.float64)
    live = every if weights is None else every[w > 0]
    left = every[:0] if weights is None else every[w <= 0]
    x = X if len(live) == n else X[live]
    point, first, equal = _points(x)
    count = torch.bincount(point, minlength=len(first))
    if len(first) == len(live) and bool((w[live] == 1).all()):  # nothing to merge, nothing to weigh: the order given
        first, point = torch.arange(len(live), device=device), torch.arange(len(live), device=device)
    group = torch.empty_like(every)
    group[live] = point
    group[left] = len(first) + torch.arange(len(left), device=device)
    weight = _sums(point, w[live], count)
    plain = len(first) == n and bool((w == 1).all())
    return Rows(kept=live[first], left=left, group=group, weight=weight, each=w, equal=equal, plain=plain)


def alone(X: torch.Tensor) -> Rows:
    """Every row of X a point of its own, of weight 1."""
    every, ones = torch.arange(len(X), device=X.device), torch.ones(len(X), dtype=torch.float64, device=X.device)
    return Rows(kept=every, left=every[:0], group=every, weight=ones, each=ones, equal=ones > 0, plain=True)


def _sums(point: torch.Tensor, w: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Total weight of each point; added on the host, in the order of size, so that the order given does not matter."""
    order = torch.argsort(w.cpu(), stable=True)
    total = np.bincount(point.cpu()[order].numpy(), w.cpu()[order].numpy(), len(count))
    return torch.from_numpy(total).to(w)


def _points(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(point of each row (n,), first row of each point (r,), whether all others equal it to the bit (r,)).

    Points are ordered by their contents.
    """
    keys, same = torch.unique(_keys(X), return_inverse=True)
    n, every = len(X), torch.arange(len(X), device=X.device)
    first = torch.full((len(keys),), n, device=X.device).scatter_reduce_(0, same, every, "amin")
    other = every[:0] > 0
    if len(first) < n:
        other = torch.cat([(X[s] != X[first[same[s]]]).any(1) for s in near_rows.slices(X)])
    if bool(other.any()):  # two different rows with one key
        same[other] = len(first) + torch.arange(int(other.sum()), device=X.device)
        first = torch.cat([first, every[other]])
    leader = torch.from_numpy(near_rows.leaders(X if len(first) == n and bool((first == every).all()) else X[first]))
    leader = leader.to(X.device)
    numbers, joined = torch.unique(leader, return_inverse=True)  # ascending: the order by contents stays
    return joined[same], first[numbers], torch.bincount(joined, minlength=len(numbers)) == 1


def _keys(X: torch.Tensor) -> torch.Tensor:
    """64 bits of each row's contents, by integer arithmetic: the same wherever a row stands, on every device."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (X.shape[1],), generator=generator, dtype=torch.int64, device="cpu")
    factors = (factors | 1).to(X.device)
    integers = torch.int32 if X.element_size() == 4 else torch.int64
    keys = torch.empty(len(X), dtype=torch.int64, device=X.device)
    for s in near_rows.slices(X):
        bits = (X[s] + 0.0).contiguous().view(integers).to(torch.int64)  # + 0: minus zero is zero
        for factor, shift in zip(_MIX, (32, 29), strict=True):  # round numbers differ in their high bits only
            bits.mul_(factor).bitwise_xor_(bits >> shift)
        keys[s] = bits.mul_(factors).sum(1)
    return keys
