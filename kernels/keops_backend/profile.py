"""Kernel profiles in KeOps' language: the KeOps side of ``radial``, one formula for a value and one for a gradient.

In a formula x and z are a center and an evaluation point, and c holds 1 / L and then the kernel's further parameters
in the order of its fields. Distances are sums of squared differences, so near pairs keep their digits, and a pair at
distance zero has the difference zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..radial import Gaussian, GeneralisedLaplace, Laplace, Matern52, Radial


@dataclass(frozen=True)
class Formulas:
    """phi(r), and w(r) (x - z) with w(r) = -phi'(r)/r, zero where r = 0."""

    value: str
    slope: str


_G = "Elem(c, 0)"
_R = f"({_G} * Sqrt(SqDist(x, z)))"  # r / L
_HALF = f"(IntInv(2) * SqNorm2({_G} * (x - z)))"
# KeOps' Powf, IntInv(3) and / IntCst(3) have float32's digits only: powers by Log, thirds by roots.
_LN_T = f"(Elem(c, 1) * Log({_R}))"  # t = (r / L)^p
_S = f"ClampInt({_G} * Sqrt(IntCst(5) * SqDist(x, z)), 0, 10000)"  # cut where exp(-s) is zero: s^2 stays finite
_H = f"(Sqrt(IntCst(5)) * (Rsqrt(IntCst(3)) * {_G}))"  # sqrt(5 / 3) / L

_FORMULAS: dict[type[Radial], Formulas] = {
    Laplace: Formulas(
        f"Exp(-{_R})",
        f"({_G} * Exp(-{_R})) * (Rsqrt(SqDist(x, z)) * (x - z))",  # KeOps defines Rsqrt(0) = 0
    ),
    Gaussian: Formulas(f"Exp(-{_HALF})", f"({_G} * Exp(-{_HALF})) * ({_G} * (x - z))"),
    GeneralisedLaplace: Formulas(
        f"Exp(-Exp({_LN_T}))",
        f"(Elem(c, 1) * Exp({_LN_T} - Exp({_LN_T})) * Rsqrt(SqDist(x, z))) * (Rsqrt(SqDist(x, z)) * (x - z))",
    ),
    Matern52: Formulas(
        f"(IntCst(1) + {_S} + Square(Rsqrt(IntCst(3)) * {_S})) * Exp(-{_S})",
        f"({_H} * ((IntCst(1) + {_S}) * Exp(-{_S}))) * ({_H} * (x - z))",
    ),
}


def formulas(kernel: Radial) -> Formulas | None:
    """The formulas of a kernel's profile, or None where it has none."""
    return _FORMULAS.get(type(kernel))


def constants(kernel: Radial, like: torch.Tensor) -> torch.Tensor:
    """1 / L and the further parameters; times a difference of points (below 2^21, in units) 1 / L stays finite."""
    inverse = min(1.0 / kernel.bandwidth, torch.finfo(like.dtype).max * 2.0**-22)
    return like.new_tensor([inverse, *kernel.further_parameters])
