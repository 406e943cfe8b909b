"""Bandwidths and distances: the one that points ask for, and those at which a kernel says nothing about them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fastagop.kernels import checks
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.profile import Kernel, median_factor, unsettled
from fastagop.kernels.scaling import Points, scale_points
from fastagop.kernels.torch_backend import tiles
from fastagop.solvers import copies
from fastagop.solvers.limits import zero_and_one

_SAMPLE = 1024  # points whose pairs stand for all in a median distance
_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)
_FEW = 64  # points whose pairs show in nearly every problem that values differ
_FEWEST, _SOME = 8, 512  # points whose values with so many others nearly always show that they are of use
_ROWS = 4096  # points whose distances to these are made at once
_FAINT = 0.01  # sum of the kernel values of a point with all others, beside its own, or what they are less than 1
_OUTWEIGHED = 0.1  # of the ridge: the trace of what the kernel matrix has beside its mean


@torch.no_grad()
def settled(kernel: Any, X: torch.Tensor) -> Any:
    """The kernel with a number for its bandwidth: itself, or one with the factor times the median distance of X's rows.

    That is the median of ||x - z||_2, or of the norm that the kernel goes by (l1 for ``ProductLaplace``), over the
    pairs of at most 1024 rows of X, one of each of as many equal stretches. Rows that the dtype cannot tell apart count
    as one, so that copies do not change it. Distances are differences in float64: an offset of X costs no digits. Where
    there are no two different rows the bandwidth is 1.

    Args:
        kernel: a kernel such as ``Laplace("median")`` or ``Laplace(("median", 0.5))``.
        X: points (n, d).

    Returns:
        The kernel that ``fit`` of an estimator would report as ``kernel_`` for these points.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checks.kernel(kernel, settled=False)
    checks.points(X, None)
    return settled_at(kernel, copies.find(X).take(X)) if unsettled(kernel) else kernel


def settled_at(kernel: Any, points: torch.Tensor) -> Any:
    """As ``settled`` for points that are checked, and of which no two are copies."""
    factor = median_factor(kernel)
    if factor is None:
        if not unsettled(kernel):
            return kernel
        parts = {name: part for name, part in kernel.get_params(deep=False).items() if isinstance(part, Kernel)}
        return replace(kernel, **{name: settled_at(part, points) for name, part in parts.items()})
    _, X, _, unit = scale_points(replace(kernel, bandwidth=1.0), points, points)
    apart = torch.pdist(X[_places(len(X)).to(X.device)].double(), p=kernel.norm)
    apart = apart[apart > 0]
    if len(apart) == 0:
        return replace(kernel, bandwidth=1.0)
    middle = 0.5 * (float(apart.median()) - float(apart.neg_().median()))  # torch takes the lower of two middle ones
    return replace(kernel, bandwidth=factor * (middle * unit))


def _places(n: int, most: int = _SAMPLE) -> torch.Tensor:
    """Positions of so many of n rows at most, one in each of as many stretches.

    Where in its stretch a row lies goes by the golden ratio: rows in a cycle, such as one of each class in turn,
    are met in all of its phases.
    """
    count = min(n, most)
    steps = torch.arange(count, dtype=torch.float64, device="cpu")
    return ((steps + steps.mul(_GOLDEN).frac()) * (n / max(1, count))).long().clamp_(max=n - 1)


def note(points: Points, given: Any, block: int = 256) -> str:
    """What to say where every k(x_i, x_j), i != j, is 0 or 1 to the rounding of X's dtype; "" elsewhere.

    A sample of the pairs answers for most problems; only where it holds nothing else are all pairs looked at.

    Args:
        points: scaled.
        given: the kernel as the user gave it.
        block: rows looked at together.
    """
    scaled, X, _, unit = points
    n = len(X)
    if n < 2 or not (given.radial or given.norm):
        return ""
    if not given.radial:
        return _note_of_pairs(points, given)
    few = X[torch.arange(min(n, _FEW), device=X.device) * n // min(n, _FEW)]
    distances = torch.pdist(few.double())
    zeros, ones, others = _counts(scaled.value_(distances.square().to(X.dtype)))
    if others:
        return ""
    if n > _FEW:
        with matmul_precision("highest", X.device):
            if any(_counts(scaled.value_(squares))[2] for _, squares in tiles.tiles(X, X, block)):
                return ""
    return _finding(given, float(distances.median()) * unit, zeros, ones)


@torch.no_grad()
def faint(kernel: Any, X: torch.Tensor, ridge: float = 0.0) -> str:
    """What to say where the outputs for new rows are all but constant, given points X (n, d); "" elsewhere.

    That is so where the kernel values of a point with all others sum to next to nothing, so that coefficients answer
    for their own points only; and where values differ so little from 1 that the ridge outweighs all that is left of
    the kernel matrix without its mean. A sample of the rows of the kernel matrix tells.
    """
    n = len(X)
    if n < 2 or not kernel.radial:
        return ""
    scaled, x, _, unit = scale_points(kernel, X, X)
    alike = min(_OUTWEIGHED * ridge, _FAINT * (n - 1))
    # Parts of the sums nearly always show that nothing is wrong; a point's own value is 1.
    some = x[:: -(-n // _SOME)].double()
    values = scaled.value_(torch.cdist(x[_places(n, _FEWEST).to(x.device)].double(), some).square_())
    sums = values.sum(1)
    if float(sums.median()) > 1.0 + _FAINT and len(some) - float(sums.mean()) > alike:
        return ""
    places = _places(n, _FEW).to(x.device)
    few, each = x[places].double(), torch.arange(len(places), device=x.device)
    sums = few.new_zeros(len(few))
    for start in range(0, n, _ROWS):
        values = scaled.value_(torch.cdist(few, x[start : start + _ROWS].double()).square_())
        own = (places >= start) & (places < start + _ROWS)
        values[each[own], places[own] - start] = 0.0
        sums += values.sum(1)
    sum_, left = float(sums.median()), float((n - 1 - sums).mean())
    if sum_ <= _FAINT:
        finding = f"a point's kernel values with all others sum to {sum_:.1e}: points say next to nothing about others"
    elif left <= alike:
        finding = (
            f"the kernel values of different points are 1 but for {left / (n - 1):.1e}, which the ridge {ridge:.3g} "
            "outweighs: points look alike"
        )
    else:
        return ""
    distance = float(torch.cdist(few, x[_places(n, _SAMPLE).to(x.device)].double()).median()) * unit
    return f"at bandwidth {kernel.bandwidth:.3g} {finding}. Their typical distance is {distance:.3g}"


def _note_of_pairs(points: Points, given: Any) -> str:
    """As ``note`` for a kernel that is not radial and has a bandwidth, from the pairs of a sample of the points."""
    scaled, X, _, unit = points
    for count in (_FEW, _SAMPLE):  # a matrix of many pairs is made only where those of few points do not tell
        few = X[_places(len(X), count).to(X.device)].double()
        i, j = torch.triu_indices(len(few), len(few), 1, device=few.device)
        zeros, ones, others = _counts(scaled(few)[i, j].to(X.dtype))
        if others:
            return ""
    return _finding(given, float(torch.pdist(few, p=given.norm).median()) * unit, zeros, ones)


def _finding(kernel: Any, typical: float, zeros: int, ones: int) -> str:
    """The warning text for kernel values that are all 0 or 1."""
    if ones and zeros:
        finding = "0 or 1 to rounding: points are equal to it or have nothing in common"
    elif zeros:
        finding = "0 to rounding: no point says anything about another"
    else:
        finding = "1 to rounding: all points look alike"
    text = f"at bandwidth {kernel.bandwidth:.3g} every kernel value of two different points is {finding}. "
    if typical == 0:
        return f"{text}Most of them are equal here, at any bandwidth: other or more features are needed"
    remedy = "take a bandwidth of that size or, where units of features differ, scale them first"
    return f"{text}Their typical distance is {typical:.3g}: {remedy}"


def _counts(values: torch.Tensor) -> tuple[int, int, int]:
    """(values of 0, values of 1, others) to rounding."""
    zero, one = zero_and_one(torch.finfo(values.dtype).eps)
    zeros, ones = int((values <= zero).sum()), int((values >= one).sum())
    return zeros, ones, values.numel() - zeros - ones
