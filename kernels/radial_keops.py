"""Kernel profiles in KeOps' language: the KeOps side of ``radial``, one formula for a value and one for a gradient.

In a formula x and z are a center and an evaluation point, and c holds 1 / L and then the kernel's further parameters
in the order of its fields. Distances are sums of squared differences, so near pairs keep their digits, and a pair at
distance zero has the difference zero.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from .radial import Gaussian, GeneralisedLaplace, Laplace, Matern52, Radial


@dataclass(frozen=True)
class Formulas:
    """phi(r), and w(r) (x - z) with w(r) = -phi'(r)/r, zero where r = 0."""

    value: str
    slope: str


_G = "Elem(c, 0)"
_R = f"({_G} * Sqrt(SqDist(x, z)))"  # r / L
_HALF = f"(IntInv(2) * SqNorm2({_G} * (x - z)))"
_T = f"Exp(Elem(c, 1) * Log({_R}))"  # KeOps' Powf, IntInv(3) and / IntCst(3) have float32's digits only
_S = f"({_G} * Sqrt(IntCst(5) * SqDist(x, z)))"

_FORMULAS: dict[type[Radial], Formulas] = {
    Laplace: Formulas(
        f"Exp(-{_R})",
        f"({_G} * Exp(-{_R})) * (Rsqrt(SqDist(x, z)) * (x - z))",  # KeOps defines Rsqrt(0) = 0
    ),
    Gaussian: Formulas(f"Exp(-{_HALF})", f"({_G} * Exp(-{_HALF})) * ({_G} * (x - z))"),
    GeneralisedLaplace: Formulas(
        f"Exp(-{_T})", f"(Elem(c, 1) * {_T} * Exp(-{_T}) * Square(Rsqrt(SqDist(x, z)))) * (x - z)"
    ),
    Matern52: Formulas(
        f"(IntCst(1) + {_S} + Inv(IntCst(3)) * Square({_S})) * Exp(-{_S})",
        f"(IntCst(5) * Inv(IntCst(3)) * {_G} * (IntCst(1) + {_S}) * Exp(-{_S})) * ({_G} * (x - z))",
    ),
}


def formulas(kernel: Radial) -> Formulas | None:
    """The formulas of a kernel's profile, or None where it has none."""
    return _FORMULAS.get(type(kernel))


def constants(kernel: Radial, like: torch.Tensor) -> torch.Tensor:
    """1 / L and the further parameters; times a difference of points (below 2^21, in units) 1 / L stays finite."""
    inverse = min(1.0 / kernel.bandwidth, torch.finfo(like.dtype).max * 2.0**-22)
    further = [getattr(kernel, field.name) for field in dataclasses.fields(kernel) if field.name != "bandwidth"]
    return like.new_tensor([inverse, *further])
