"""Kernel profiles in KeOps' language: the KeOps side of ``radial``, one formula for a value and one for a gradient.

In a formula x and z are a center and an evaluation point and g = 1 / L; where a kernel has further parameters, g is a
vector, 1 / L and then they. Distances are sums of squared differences, so near pairs keep their digits, and a pair at
distance zero has the difference zero. KeOps keeps quotients of numbers in float32 (IntInv, 1/3): roots it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from .radial import Gaussian, GeneralisedLaplace, Laplace, Matern52, Radial


@dataclass(frozen=True)
class Formulas:
    """phi(r), and w(r) (x - z) with w(r) = -phi'(r)/r, zero where r = 0."""

    value: str
    slope: str


_LN_T = "(Elem(g, 1) * Log(Elem(g, 0) * Sqrt(SqDist(x, z))))"  # t = (r / L)^p
_S = "ClampInt(g * Sqrt(IntCst(5) * SqDist(x, z)), 0, 10000)"  # cut where exp(-s) is zero: s^2 stays finite
_G = "(Sqrt(IntCst(5)) * (Rsqrt(IntCst(3)) * g))"  # sqrt(5 / 3) / L
_FORMULAS: dict[type[Radial], Formulas] = {
    Laplace: Formulas(
        "Exp(-(g * Sqrt(SqDist(x, z))))",
        "(g * Exp(-(g * Sqrt(SqDist(x, z))))) * (Rsqrt(SqDist(x, z)) * (x - z))",  # KeOps defines Rsqrt(0) = 0
    ),
    Gaussian: Formulas(
        "Exp(-(IntInv(2) * SqNorm2(g * (x - z))))",
        "(g * Exp(-(IntInv(2) * SqNorm2(g * (x - z))))) * (g * (x - z))",
    ),
    GeneralisedLaplace: Formulas(
        f"Exp(-Exp({_LN_T}))",
        f"(Elem(g, 1) * Exp({_LN_T} - Exp({_LN_T})) * Rsqrt(SqDist(x, z))) * (Rsqrt(SqDist(x, z)) * (x - z))",
    ),
    Matern52: Formulas(
        f"(IntCst(1) + {_S} + Square(Rsqrt(IntCst(3)) * {_S})) * Exp(-{_S})",
        f"({_G} * ((IntCst(1) + {_S}) * Exp(-{_S}))) * ({_G} * (x - z))",
    ),
}


def formulas(kernel: Radial) -> Formulas | None:
    """The formulas of a kernel's profile, or None where it has none."""
    return _FORMULAS.get(type(kernel))
