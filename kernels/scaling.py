"""Units of length and of coefficients in which no step leaves its dtype; all are powers of two, so nothing rounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch

from . import checks
from .profile import Kernel, Profile

_EXPONENT = 20  # numbers larger than 2^20 or smaller than 2^-20 are scaled before they are squared
# Bandwidths, in the points' unit, from which a kernel may be homogeneous at every distance.
_WIDE = {torch.float32: (30, 40, 60, 80), torch.float64: (60, 100, 200, 400)}
# Slopes of ln w over ln r at small and at large distances agree to that much: weights then do to 14 times as much.
_HOMOGENEOUS = {torch.float32: 2.0**-31, torch.float64: 1e-15}
# The largest coefficient is within 2^-b .. 2^b.
_COEFFICIENTS = {torch.float32: 45, torch.float64: 300}


def scaled_(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """Multiply by 2^exponent in place, in steps that stay within the dtype where the result does."""
    step = 100 if values.dtype == torch.float32 else 1000
    while exponent:
        now = max(-step, min(step, exponent))
        values.mul_(math.ldexp(1.0, now))
        exponent -= now
    return values


def is_usual(size: float) -> bool:
    """Whether numbers of that size, from 2^-20 to 2^20, need no unit of their own before they are squared."""
    return 2.0**-_EXPONENT <= size <= 2.0**_EXPONENT


class Points(NamedTuple):
    """A kernel, centers X and evaluation points Z (X itself where they are the same) in a unit of length."""

    kernel: Any
    X: torch.Tensor
    Z: torch.Tensor
    unit: float = 1.0


def scale_points(kernel: Kernel, X: torch.Tensor, Z: torch.Tensor) -> Points:
    """The points with lengths in a power-of-two unit, where squares of the points would leave their dtype.

    The kernel of scaled points with a scaled bandwidth is the same number; gradients come per unit. Only kernels of a
    distance over a bandwidth are scaled: radial ones, and those of an l_p distance.
    """
    if kernel.norm is None or not checks.readable(X):
        return Points(kernel, X, Z)
    largest = checks.largest(X) if Z is X else max(checks.largest(X), checks.largest(Z))
    if largest == 0 or is_usual(largest):
        return Points(kernel, X, Z)
    bandwidth: float = kernel.bandwidth  # pyright: ignore[reportAttributeAccessIssue] (who has a norm has it)
    exponent, wide = math.frexp(largest)[1], math.frexp(bandwidth)[1]
    if X.dtype == torch.float64:  # the bandwidth in that unit is a float64 number, too
        exponent = max(wide - 1000, min(wide + 1000, exponent))
    checks.spread(X, Z, largest)
    _check_lengths(kernel, exponent)
    symmetric, X = Z is X, scaled_(X.detach().clone(), -exponent)
    Z = X if symmetric else scaled_(Z.detach().clone(), -exponent)
    unit = math.ldexp(1.0, exponent)
    scaled = dataclasses.replace(kernel, bandwidth=_quotient(bandwidth, exponent))  # pyright: ignore[reportArgumentType]
    return Points(scaled, X, Z, unit)


def _check_lengths(kernel: Any, exponent: int) -> None:
    """Refuse a class of the user's own with a length beside its bandwidth, which does not follow into another unit.

    Its values must be the same where distances and the bandwidth are divided by 2^exponent.
    """
    power, found = (2.0 if kernel.radial else getattr(kernel, "power", None)), []
    if power is None:
        return
    length, exponent = max(1e-30, min(kernel.bandwidth, 1e30)), max(-100, min(100, exponent))
    for bandwidth in (length, math.ldexp(length, -exponent)):
        r = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64, device="cpu") * bandwidth
        try:
            found.append(dataclasses.replace(kernel, bandwidth=bandwidth).value_(r.pow_(power)))
        except (NotImplementedError, TypeError):  # a class without values
            return
    if bool(((found[0] - found[1]).abs() > 1e-9).any()):
        raise TypeError(
            f"kernel: {type(kernel).__name__}.value_ must depend on r / bandwidth alone where X is far from size 1 and "
            "is computed in another unit of length, as its other lengths would stay what they are; give these as "
            "multiples of the bandwidth, or bring X and all lengths to about 1"
        )


def _quotient(bandwidth: float, exponent: int) -> float:
    """bandwidth / 2^exponent, within what a float holds: float32 gradients are zero beyond."""
    try:
        return max(math.ldexp(bandwidth, -exponent), math.ulp(0.0))
    except OverflowError:
        return math.ldexp(1.0, 1023)


@dataclasses.dataclass(frozen=True)
class Amplitude:
    """How much larger gradients are than those that were computed: factor * 2^exponent."""

    factor: float
    exponent: int

    def restore(self, gradients: torch.Tensor) -> torch.Tensor:
        """The gradients themselves, written over those that are given."""
        if self.factor == 1.0 and self.exponent == 0:
            return gradients
        return scaled_(gradients.mul_(self.factor), self.exponent)

    def restore_squares(self, M: torch.Tensor, further: int = 0) -> torch.Tensor:
        """The sums of squares themselves, times 2^further, written over those that are given."""
        if self.factor != 1.0:
            M = M.mul_(self.factor).mul_(self.factor)
        return scaled_(M, 2 * self.exponent + further)


def in_range(
    kernel: Any, X: torch.Tensor, alpha: torch.Tensor, unit: float = 1.0, Z: torch.Tensor | None = None
) -> tuple[Any, torch.Tensor, Amplitude]:
    """(kernel, alpha, amplitude) whose weights and coefficients stay within X's dtype, for points in units.

    Weights of a kernel that is far wider than the points are homogeneous in the bandwidth: those of a narrower one are
    computed, and a factor makes up for it. The unit of length is part of the amplitude. Z, where gradients are asked
    for at other points than X, counts among the points.
    """
    exponent = 1 - math.frexp(unit)[1]
    if not checks.readable(X):
        return kernel, alpha, Amplitude(1.0, exponent)
    kernel, factor, more = _narrower(kernel, X, X if Z is None else Z) if kernel.radial else (kernel, 1.0, 0)
    exponent += more
    largest, bound = checks.largest(alpha), _COEFFICIENTS[X.dtype]
    if largest > 0:  # coefficients take what they can of the amplitude: results are then of their own size at once
        size = math.frexp(largest)[1]
        more = max(-bound, min(bound, size + exponent)) - size
        if more:
            alpha, exponent = scaled_(alpha.detach().clone(), more), exponent - more
    return kernel, alpha, Amplitude(factor, exponent)


def _narrower(kernel: Profile, X: torch.Tensor, Z: torch.Tensor) -> tuple[Profile, float, int]:
    """(kernel, factor, exponent): weights are factor * 2^exponent times those of the kernel returned.

    w(r) = L^-2 omega(r / L), and where omega(u) goes by u^q at all distances of the points, w goes by L^-(2 + q).
    """
    size = checks.largest(X) if Z is X else max(checks.largest(X), checks.largest(Z))
    if not 0 < size * math.ldexp(1.0, _WIDE[X.dtype][0]) < kernel.bandwidth:
        return kernel, 1.0, 0
    reach = 4.0 * size * X.shape[1] ** 0.5  # more than any distance
    for power in _WIDE[X.dtype]:
        other = dataclasses.replace(kernel, bandwidth=size * math.ldexp(1.0, power))
        if other.bandwidth >= kernel.bandwidth:
            break
        near, middle, far = (_weight(other, reach * math.ldexp(1.0, -e)) for e in (40, 20, 0))
        slopes = [math.log2(b / a) / 20 if min(a, b) > 0 else math.inf for a, b in ((near, middle), (middle, far))]
        if abs(slopes[1] - slopes[0]) <= _HOMOGENEOUS[X.dtype]:
            return other, *_power(kernel.bandwidth, other.bandwidth, -2.0 - _snapped(slopes[0]))
    return kernel, 1.0, 0


def _weight(kernel: Profile, r: float) -> float:
    return float(kernel.weight_(torch.tensor([r], dtype=torch.float64, device="cpu").square_()))


def _snapped(slope: float) -> float:
    """The multiple of a half that a slope is to rounding, else the slope."""
    whole = round(2.0 * slope) / 2.0
    return whole if abs(slope - whole) < 1e-12 else slope


def _power(a: float, b: float, power: float) -> tuple[float, int]:
    """(a / b)^power as factor * 2^exponent."""
    (m, e), (n, f) = math.frexp(a), math.frexp(b)
    steps = power * (e - f)
    exponent = math.floor(steps)
    return (m / n) ** power * 2.0 ** (steps - exponent), exponent
