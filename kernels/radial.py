"""Radial kernels: k(x, z) = phi(r) with r = ||x - z||_2. Each is one class, in the three languages that it computes in.

Docs/pages/add_a_kernel.md says how a kernel is added. ``value_``, ``weight_`` and the optional rest are torch's;
``triton`` is the body of a device function, and ``keops`` a pair of formulas:

* In ``triton``, ``sq`` is r^2, ``inverse_bandwidth`` is 1 / L, and further parameters go by their fields' names. The
  body sets ``value`` to phi(r), or with ``WEIGHT`` to the gradient weight, zero where r = 0. r^2 is infinite beyond the
  last point: the value there must be 0, not NaN.
* In ``keops``, x and z are a center and an evaluation point, and ``Elem(c, 0)`` is 1 / L, ``Elem(c, 1)``
  the first further parameter. Distances are sums of squared differences, so near pairs keep their digits, and a pair
  at distance zero has the difference zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, is_dataclass
from typing import ClassVar

import torch

from .families.composition import Combining
from .profile import Formulas, Kernel, Profile, bounded_factor, multiply_, without_duplicates_

# KeOps' Powf, IntInv(3) and / IntCst(3) have float32's digits only: powers are taken by Log, thirds by roots.
_INVERSE = "Elem(c, 0)"
_RADIUS = f"({_INVERSE} * Sqrt(SqDist(x, z)))"  # r / L
_HALF_SQUARE = f"(IntInv(2) * SqNorm2({_INVERSE} * (x - z)))"
_LOG_POWER = f"(Elem(c, 1) * Log({_RADIUS}))"  # ln t with t = (r / L)^p
_SCALED = f"ClampInt({_INVERSE} * Sqrt(IntCst(5) * SqDist(x, z)), 0, 10000)"  # cut where exp(-s) is zero: s^2 is finite
_ROOT_FACTOR = f"(Sqrt(IntCst(5)) * (Rsqrt(IntCst(3)) * {_INVERSE}))"  # sqrt(5 / 3) / L


@dataclass(frozen=True)
class Radial(Combining, Profile):
    """A radial kernel with a bandwidth; subclasses give the profile.

    ``kernel(X, Z)`` is its kernel matrix. The kernel's gradient at distance zero is zero by definition.
    """


@dataclass(frozen=True)
class Laplace(Radial):
    r"""Laplace kernel of the Euclidean distance, k(x, z) = exp(-||x - z||_2 / L).

    Gradient weight w(r) = k / (L r), zero where r = 0. Paper, appendix C. This is not scikit-learn's ``laplacian``,
    which takes the l1 distance.

    Args:
        bandwidth: L > 0, in the units of the data; or "median" or ("median", factor), which ``fit`` of an estimator and
            ``fastagop.settled`` make a number: the factor times the median distance of the points.
    """

    triton: ClassVar[str | None] = """
r = tl.sqrt(sq) * inverse_bandwidth
value = tl.exp(-r)
if WEIGHT:
    value = tl.where(r > 0.0, value / tl.where(r > 0.0, r, 1.0), 0.0) * inverse_bandwidth * inverse_bandwidth
"""
    keops: ClassVar[Formulas | None] = Formulas(
        f"Exp(-{_RADIUS})",
        f"({_INVERSE} * Exp(-{_RADIUS})) * (Rsqrt(SqDist(x, z)) * (x - z))",  # KeOps defines Rsqrt(0) = 0
    )

    @property
    def family_exponent(self) -> float:
        """The exponent of the generalised Laplace kernel that this is: 1."""
        return 1.0

    def with_exponent(self, exponent: float) -> Laplace | GeneralisedLaplace:
        """The generalised Laplace kernel of the same bandwidth; ``Laplace`` for the exponent 1."""
        return Laplace(self.bandwidth) if exponent == 1.0 else GeneralisedLaplace(self.bandwidth, exponent)

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r / L)."""
        return multiply_(sq.sqrt_(), -1.0 / self.bandwidth).exp_()

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r / L) / (L r), zero where r = 0."""
        return self.weight_beside_(sq, multiply_(sq.sqrt(), -1.0 / self.bandwidth).exp_())

    def weight_beside_(self, sq: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by k / (L r), zero where r = 0."""
        sq.rsqrt_().mul_(value)  # half the time of a root and a division
        multiply_(sq, 1.0 / self.bandwidth)
        return torch.nan_to_num_(sq, posinf=0.0, neginf=0.0)  # only r = 0 makes an infinity

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor:
        """Overwrite k by -k / (L^2 ln k), zero where k = 1."""
        torch.div(value, torch.log(value), out=value)
        multiply_(value, -1.0 / self.bandwidth, 1.0 / self.bandwidth)
        return torch.nan_to_num_(value, posinf=0.0, neginf=0.0)

    def _weight_slope(self, sq: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dw/dt = -w (1 / (L r) + 1 / r^2) / 2."""
        return -0.5 * weight * (1.0 / (self.bandwidth * sq.sqrt()) + 1.0 / sq)


@dataclass(frozen=True)
class Gaussian(Radial):
    r"""Gaussian kernel, k(x, z) = exp(-||x - z||_2^2 / (2 L^2)).

    Gradient weight w(r) = k / L^2, zero where r = 0. Paper, appendix C.

    Args:
        bandwidth: L > 0, in the units of the data; or "median" or ("median", factor), which ``fit`` of an estimator and
            ``fastagop.settled`` make a number: the factor times the median distance of the points.
    """

    triton: ClassVar[str | None] = """
u = tl.sqrt(sq) * inverse_bandwidth
value = tl.exp(-0.5 * u * u)
if WEIGHT:
    value = tl.where(sq > 0.0, value * inverse_bandwidth * inverse_bandwidth, 0.0)
"""
    keops: ClassVar[Formulas | None] = Formulas(
        f"Exp(-{_HALF_SQUARE})", f"({_INVERSE} * Exp(-{_HALF_SQUARE})) * ({_INVERSE} * (x - z))"
    )

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r^2 / (2 L^2))."""
        return multiply_(sq, -0.5 / self.bandwidth, 1.0 / self.bandwidth).exp_()

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r^2 / (2 L^2)) / L^2, zero where r = 0 or where 1 / L^2 overflows, as k does then."""
        return self.value_(without_duplicates_(sq)).mul_(
            bounded_factor(1.0 / self.bandwidth / self.bandwidth, sq, beyond=0.0)
        )

    def weight_beside_(self, sq: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by k / L^2, zero where r = 0."""
        duplicates, factor = sq == 0, bounded_factor(1.0 / self.bandwidth / self.bandwidth, sq, beyond=0.0)
        return torch.mul(value, factor, out=sq).masked_fill_(duplicates, 0.0)

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor:
        """Overwrite k by k / L^2."""
        return value.mul_(bounded_factor(1.0 / self.bandwidth / self.bandwidth, value, beyond=0.0))

    def _weight_slope(self, sq: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dw/dt = -w / (2 L^2)."""
        return weight * (-0.5 / self.bandwidth**2)

    @property
    def _weight_at_zero(self) -> float:
        """The limit of the weight at r = 0: 1 / L^2."""
        return 1.0 / self.bandwidth**2


@dataclass(frozen=True)
class GeneralisedLaplace(Radial):
    r"""Generalised Laplace kernel, k(x, z) = exp(-(||x - z||_2 / L)^p).

    Gradient weight w(r) = p r^(p-2) k / L^p, zero where r = 0. Exponent 1 is ``Laplace(L)`` and exponent 2 is
    ``Gaussian(L / sqrt(2))``; positive definite for every exponent in (0, 2].

    Args:
        bandwidth: L > 0, in the units of the data; or "median" or ("median", factor), which ``fit`` of an estimator and
            ``fastagop.settled`` make a number: the factor times the median distance of the points.
        exponent: p, 0 < p <= 2.
    """

    exponent: float

    triton: ClassVar[str | None] = """
r = tl.sqrt(sq) * inverse_bandwidth
t = tl.where(r > 0.0, tl.exp2(exponent * tl.log2(tl.where(r > 0.0, r, 1.0))), 0.0)
t = tl.minimum(t, 1e4)  # where exp(-t) is zero: it times infinity would be NaN
value = tl.exp(-t)
if WEIGHT:
    value = tl.where(sq > 0.0, exponent * t * value / tl.where(sq > 0.0, sq, 1.0), 0.0)
"""
    keops: ClassVar[Formulas | None] = Formulas(
        f"Exp(-Exp({_LOG_POWER}))",
        f"(Elem(c, 1) * Exp({_LOG_POWER} - Exp({_LOG_POWER})) * Rsqrt(SqDist(x, z))) * (Rsqrt(SqDist(x, z)) * (x - z))",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("exponent", largest=2.0)

    @property
    def family_exponent(self) -> float:
        """The kernel's own exponent p."""
        return self.exponent

    def with_exponent(self, exponent: float) -> Laplace | GeneralisedLaplace:
        """The kernel of the same bandwidth with another exponent; ``Laplace`` for the exponent 1."""
        return Laplace(self.bandwidth) if exponent == 1.0 else GeneralisedLaplace(self.bandwidth, exponent)

    def _power_(self, r: torch.Tensor) -> torch.Tensor:
        """Overwrite r by (r / L)^p."""
        if abs(math.log2(self.bandwidth)) < 0.25 * math.log2(torch.finfo(r.dtype).max):
            return r.mul_(1.0 / self.bandwidth).pow_(self.exponent)
        root = self.bandwidth ** (-0.5 * self.exponent)  # r / L may leave the dtype where its power does not
        return multiply_(r.pow_(self.exponent), root, root)

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-(r / L)^p)."""
        return self._power_(sq.sqrt_()).neg_().exp_()

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by p t exp(-t) / r^2 with t = (r / L)^p, zero where r = 0."""
        t = self._power_(sq.sqrt())
        torch.div(torch.exp(-t).mul_(t).mul_(self.exponent), sq, out=sq)
        return torch.nan_to_num_(sq, nan=0.0, posinf=0.0)  # only r = 0 makes 0 / 0

    def rough_weight(self, sq: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """p t k / r^2 with t = -ln k: a logarithm, where powers take longest. It has t's error, eps / t of t."""
        weight = torch.log(value).mul_(value).mul_(-self.exponent).div_(sq)
        return torch.nan_to_num_(weight, nan=0.0, posinf=0.0, neginf=0.0)  # k that underflows, and r = 0

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor | None:
        """Overwrite k by p k t^(1 - 2/p) / L^2 with t = -ln k, zero where k = 1; None for 1 < p < 2.

        There a value rounds to 1 at distances whose gradient still counts: t has the absolute error of k.
        """
        if 1.0 < self.exponent < 2.0:
            return None
        weight = torch.log(value).neg_().pow_(1.0 - 2.0 / self.exponent)
        value.mul_(weight).mul_(self.exponent / self.bandwidth / self.bandwidth)
        return torch.nan_to_num_(value, nan=0.0, posinf=0.0)

    def _weight_slope(self, sq: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dw/dt = w (p (1 - u) / 2 - 1) / r^2 with u = (r / L)^p."""
        u = (sq.sqrt() / self.bandwidth) ** self.exponent
        return weight * (0.5 * self.exponent * (1.0 - u) - 1.0) / sq

    @property
    def _weight_at_zero(self) -> float:
        """2 / L^2 for the exponent 2; there is a kink, or a singularity, for the others."""
        return 2.0 / self.bandwidth**2 if self.exponent == 2.0 else 0.0


@dataclass(frozen=True)
class Matern52(Radial):
    r"""Matern kernel of smoothness 5/2, k(x, z) = (1 + s + s^2 / 3) exp(-s) with s = sqrt(5) ||x - z||_2 / L.

    Gradient weight w(r) = 5 (1 + s) exp(-s) / (3 L^2), zero where r = 0. It has no closed form in k.

    Args:
        bandwidth: L > 0, in the units of the data; or "median" or ("median", factor), which ``fit`` of an estimator and
            ``fastagop.settled`` make a number: the factor times the median distance of the points.
    """

    triton: ClassVar[str | None] = """
s = tl.minimum(tl.sqrt(sq * 5.0) * inverse_bandwidth, 1e4)
value = tl.exp(-s)
if WEIGHT:
    value = tl.where(sq > 0.0, (1.0 + s) * value * (5.0 / 3.0) * inverse_bandwidth * inverse_bandwidth, 0.0)
else:
    value = tl.minimum((1.0 + s * (1.0 + s / 3.0)) * value, 1.0)  # it may round upwards
"""
    keops: ClassVar[Formulas | None] = Formulas(
        f"(IntCst(1) + {_SCALED} + Square(Rsqrt(IntCst(3)) * {_SCALED})) * Exp(-{_SCALED})",
        f"({_ROOT_FACTOR} * ((IntCst(1) + {_SCALED}) * Exp(-{_SCALED}))) * ({_ROOT_FACTOR} * (x - z))",
    )

    def _scaled_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by s, cut where exp(-s) is zero, so that its square stays finite."""
        return multiply_(sq.sqrt_(), math.sqrt(5.0) / self.bandwidth).clamp_(max=1e4)

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by (1 + s + s^2 / 3) exp(-s)."""
        s = self._scaled_(sq)
        decay = torch.exp(-s)
        return s.mul_(s / 3.0 + 1.0).add_(1.0).mul_(decay).clamp_(max=1.0)  # it may round upwards

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by 5 (1 + s) exp(-s) / (3 L^2), zero where r = 0 or where that factor overflows."""
        s = self._scaled_(without_duplicates_(sq))
        decay = torch.exp(-s)
        return s.add_(1.0).mul_(decay).mul_(bounded_factor(5.0 / 3.0 / self.bandwidth / self.bandwidth, sq, beyond=0.0))

    def _weight_slope(self, sq: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dw/dt = -25 exp(-s) / (6 L^4)."""
        s = math.sqrt(5.0) / self.bandwidth * sq.sqrt()
        return (-25.0 / 6.0 / self.bandwidth**4) * torch.exp(-s)

    @property
    def _weight_at_zero(self) -> float:
        """The limit of the weight at r = 0: 5 / (3 L^2)."""
        return 5.0 / 3.0 / self.bandwidth**2


def named(name: str) -> type[Kernel]:
    """The kernel class of that name, among those defined here or by an imported module."""
    known, todo = {}, [Kernel]
    while todo:
        children = todo.pop().__subclasses__()
        known.update({child.__name__: child for child in children})
        todo += children
    if name not in known:
        shown = ", ".join(sorted(other for other, kind in known.items() if _is_shown(kind)))
        raise ValueError(f"kernel {name!r} is not known: import the module that defines it first; known are {shown}")
    return known[name]


def _is_shown(kind: type[Kernel]) -> bool:
    """Whether a class is a kernel that users make: one of theirs, or of these no base, sum or product."""
    if not kind.__module__.startswith(f"{__package__}."):
        return True
    combined = kind.__module__ == Combining.__module__
    return issubclass(kind, Combining) and is_dataclass(kind) and kind is not Radial and not combined
