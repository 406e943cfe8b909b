"""Kernel profiles in KeOps' language: the KeOps side of ``radial``, one formula for a value and one for a gradient.

In a formula x and z are a center and an evaluation point and g = 1 / L. Distances are sums of squared differences,
so near pairs keep their digits, and a pair at distance zero has the difference zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from .radial import Gaussian, Laplace, Radial


@dataclass(frozen=True)
class Formulas:
    """phi(r), and w(r) (x - z) with w(r) = -phi'(r)/r, zero where r = 0."""

    value: str
    slope: str


_FORMULAS: dict[type[Radial], Formulas] = {
    Laplace: Formulas(
        "Exp(-(g * Sqrt(SqDist(x, z))))",
        "(g * Exp(-(g * Sqrt(SqDist(x, z))))) * (Rsqrt(SqDist(x, z)) * (x - z))",  # KeOps defines Rsqrt(0) = 0
    ),
    Gaussian: Formulas(
        "Exp(-(IntInv(2) * SqNorm2(g * (x - z))))",
        "(g * Exp(-(IntInv(2) * SqNorm2(g * (x - z))))) * (g * (x - z))",
    ),
}


def formulas(kernel: Radial) -> Formulas | None:
    """The formulas of a kernel's profile, or None where it has none."""
    return _FORMULAS.get(type(kernel))
