"""Kernel profiles: a radial kernel is k(x, z) = phi(r) with r = ||x - z||_2.

A kernel is added by writing one class here (docs/pages/add_a_kernel.md). Everything else in the package asks a profile
three questions: its value and its gradient weight from squared distances, and, where a closed form exists, the
gradient weight from a stored value. Of these it takes for granted that phi(0) = 1 and that r enters as r / L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch


def _factor(value: float, like: torch.Tensor, beyond: float = math.inf) -> float:
    """A factor that a dtype holds: for larger ones ``beyond``, or its largest number, which times zero is zero."""
    most = torch.finfo(like.dtype).max
    return value if value <= most else min(beyond, most)


def _apart_(sq: torch.Tensor) -> torch.Tensor:
    """Overwrite zeros by infinity, where a profile and its weight vanish.

    A pair at distance zero adds nothing to a gradient; with a weight it would add w (x - x) in rounded parts, which may
    exceed everything else.
    """
    return sq.masked_fill_(sq == 0, math.inf)


def _over_square_(t: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """Overwrite t by -t / L^2, in two steps where that factor leaves the dtype."""
    factor = 1.0 / bandwidth / bandwidth
    if torch.finfo(t.dtype).tiny <= factor <= torch.finfo(t.dtype).max:
        return t.mul_(-factor)
    return t.mul_(-1.0 / bandwidth).mul_(1.0 / bandwidth)


@dataclass(frozen=True)
class Radial:
    """A radial kernel with a bandwidth; subclasses give the profile.

    The in-place methods below consume a tensor of squared distances (or kernel values) block by block, so that
    a block is transformed while it is in cache. The kernel's gradient at distance zero is zero by definition.
    """

    bandwidth: float

    def __post_init__(self):
        self._positive("bandwidth")

    def _positive(self, name: str, most: float = math.inf) -> None:
        """Make a parameter a float; refuse what is no number, not finite, or outside (0, most]."""
        given = value = getattr(self, name)
        try:
            if isinstance(value, (bool, str, bytes)):
                raise TypeError
            value = float(value)  # numpy scalars, zero-dimensional tensors
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a number, got {given!r}") from None
        except OverflowError:
            value = math.inf
        if not (math.isfinite(value) and 0 < value <= most):
            limit = "" if most == math.inf else f" up to {most:g}"
            raise ValueError(f"{name} must be a positive finite number{limit}, got {given!r}")
        object.__setattr__(self, name, float(value))

    @property
    def further_parameters(self) -> tuple[float, ...]:
        """What a kernel has beyond its bandwidth, in the order of its fields; devices get them in this order."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "bandwidth")

    def get_params(self, deep: bool = True) -> dict[str, float]:
        """The kernel's parameters by name, as scikit-learn asks for them; ``deep`` changes nothing."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def set_params(self, **params: float) -> Radial:
        """A changed copy: kernels never change themselves, so that they may be shared, hashed and compared.

        Raises:
            ValueError: a parameter that the kernel does not have. ValueError, TypeError: naming the parameter.
        """
        known = list(self.get_params())
        for name in params:
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r} for kernel {self!r}. Valid parameters are: {known!r}.")
        return replace(self, **params)

    def __sklearn_clone__(self) -> Radial:
        """Itself: what never changes needs no copy."""
        return self

    def __call__(self, X: torch.Tensor, Z: torch.Tensor | None = None) -> torch.Tensor:
        """Kernel matrix k(X, Z), shape (n, m); the same as ``fastagop.kernel_matrix(kernel, X, Z)``."""
        from .operations import kernel_matrix

        return kernel_matrix(self, X, Z)

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite squared distances r^2 by phi(r)."""
        raise TypeError(f"{type(self).__name__} defines no profile; use a subclass such as Laplace or Gaussian")

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite squared distances r^2 by the gradient weight w(r) = -phi'(r)/r, zero where r = 0."""
        raise TypeError(f"{type(self).__name__} defines no profile; use a subclass such as Laplace or Gaussian")

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor | None:
        """Overwrite kernel values by gradient weights; None where the profile has no closed form for it.

        The caller sets pairs at distance zero itself: the value 1 may also be a tiny distance rounded away.
        """
        return None


@dataclass(frozen=True)
class Laplace(Radial):
    r"""Laplace kernel of the Euclidean distance, k(x, z) = exp(-||x - z||_2 / L).

    Gradient weight w(r) = k / (L r). Paper, appendix C. This is not scikit-learn's ``laplacian``, which takes
    the l1 distance.

    Args:
        bandwidth: L > 0, in the units of the data.
    """

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r / L)."""
        return sq.sqrt_().mul_(-_factor(1.0 / self.bandwidth, sq)).exp_()

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r / L) / (L r), zero where r = 0."""
        t = sq.sqrt_().mul_(-1.0 / self.bandwidth)  # t = -r / L
        torch.div(torch.exp(t), t, out=t)
        _over_square_(t, self.bandwidth)
        return torch.nan_to_num_(t, posinf=0.0, neginf=0.0)  # only r = 0 makes an infinity

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor:
        """Overwrite k by -k / (L^2 ln k), zero where k = 1."""
        torch.div(value, torch.log(value), out=value)
        _over_square_(value, self.bandwidth)
        return torch.nan_to_num_(value, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Gaussian(Radial):
    r"""Gaussian kernel, k(x, z) = exp(-||x - z||_2^2 / (2 L^2)).

    Gradient weight w(r) = k / L^2, zero where r = 0. Paper, appendix C.

    Args:
        bandwidth: L > 0, in the units of the data.
    """

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r^2 / (2 L^2))."""
        return sq.mul_(-_factor(0.5 / self.bandwidth / self.bandwidth, sq)).exp_()

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-r^2 / (2 L^2)) / L^2, zero where r = 0 or where 1 / L^2 overflows, as k does then."""
        return self.value_(_apart_(sq)).mul_(_factor(1.0 / self.bandwidth / self.bandwidth, sq, beyond=0.0))

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor:
        """Overwrite k by k / L^2."""
        return value.mul_(_factor(1.0 / self.bandwidth / self.bandwidth, value, beyond=0.0))


@dataclass(frozen=True)
class GeneralisedLaplace(Radial):
    r"""Generalised Laplace kernel, k(x, z) = exp(-(||x - z||_2 / L)^p).

    Gradient weight w(r) = p r^(p-2) k / L^p, zero where r = 0. Exponent 1 is ``Laplace(L)`` and exponent 2 is
    ``Gaussian(L / sqrt(2))``; positive definite for every exponent in (0, 2].

    Args:
        bandwidth: L > 0, in the units of the data.
        exponent: p, 0 < p <= 2.
    """

    exponent: float

    def __post_init__(self):
        super().__post_init__()
        self._positive("exponent", most=2.0)

    def _power_(self, r: torch.Tensor) -> torch.Tensor:
        """Overwrite r by (r / L)^p."""
        if 1.0 / self.bandwidth < torch.finfo(r.dtype).tiny:  # few digits of 1 / L are left in the dtype
            return r.pow_(self.exponent).mul_(self.bandwidth**-self.exponent)
        return r.mul_(_factor(1.0 / self.bandwidth, r)).pow_(self.exponent)

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by exp(-(r / L)^p)."""
        return self._power_(sq.sqrt_()).neg_().exp_()

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by p t exp(-t) / r^2 with t = (r / L)^p, zero where r = 0."""
        t = self._power_(sq.sqrt())
        torch.div(torch.exp(-t).mul_(t).mul_(self.exponent), sq, out=sq)
        return torch.nan_to_num_(sq, nan=0.0, posinf=0.0)  # only r = 0 makes 0 / 0

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor | None:
        """Overwrite k by p k t^(1 - 2/p) / L^2 with t = -ln k, zero where k = 1; None for 1 < p < 2.

        There a value rounds to 1 at distances whose gradient still counts: t has the absolute error of k.
        """
        if 1.0 < self.exponent < 2.0:
            return None
        weight = torch.log(value).neg_().pow_(1.0 - 2.0 / self.exponent)
        value.mul_(weight).mul_(self.exponent / self.bandwidth / self.bandwidth)
        return torch.nan_to_num_(value, nan=0.0, posinf=0.0)


@dataclass(frozen=True)
class Matern52(Radial):
    r"""Matern kernel of smoothness 5/2, k(x, z) = (1 + s + s^2 / 3) exp(-s) with s = sqrt(5) ||x - z||_2 / L.

    Gradient weight w(r) = 5 (1 + s) exp(-s) / (3 L^2), zero where r = 0. It has no closed form in k.

    Args:
        bandwidth: L > 0, in the units of the data.
    """

    def _scaled_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by s, cut where exp(-s) is zero, so that its square stays finite."""
        return sq.sqrt_().mul_(_factor(math.sqrt(5.0) / self.bandwidth, sq)).clamp_(max=1e4)

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by (1 + s + s^2 / 3) exp(-s)."""
        s = self._scaled_(sq)
        decay = torch.exp(-s)
        return s.mul_(s / 3.0 + 1.0).add_(1.0).mul_(decay).clamp_(max=1.0)  # it may round upwards

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite r^2 by 5 (1 + s) exp(-s) / (3 L^2), zero where r = 0 or where that factor overflows."""
        s = self._scaled_(_apart_(sq))
        decay = torch.exp(-s)
        return s.add_(1.0).mul_(decay).mul_(_factor(5.0 / 3.0 / self.bandwidth / self.bandwidth, sq, beyond=0.0))


def named(name: str) -> type[Radial]:
    """The kernel class of that name, among those defined here or by an imported module."""
    known, todo = {}, [Radial]
    while todo:
        children = todo.pop().__subclasses__()
        known.update({child.__name__: child for child in children})
        todo += children
    if name not in known:
        raise ValueError(
            f"kernel {name!r} is not known, only {', '.join(sorted(known))}; import the module that defines it first"
        )
    return known[name]
