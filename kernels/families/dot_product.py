"""Kernels of the dot product, k(x, z) = kappa(x.z). Docs/pages/add_a_kernel.md says how one is added."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..pair_backend.dot import DotProfile
from ..profile import Formulas
from .composition import Combining


def _power(base: str, degree: int) -> str:
    """An integer power in KeOps' words, by squares: its Pow has float32's digits only on CUDA."""
    if degree < 2:
        return base if degree else "IntCst(1)"
    square = f"Square({_power(base, degree // 2)})"
    return f"({square} * {base})" if degree % 2 else square


class DotProduct(Combining, DotProfile):
    """k(x, z) = kappa(x.z): subclasses are frozen dataclasses with ``value_`` and ``slope_``."""


@dataclass(frozen=True)
class Polynomial(DotProduct):
    """Polynomial kernel, k(x, z) = (scale x.z + offset)^degree.

    Gradient at z: degree scale (scale x.z + offset)^(degree - 1) x. k(x, x) is not 1, and values may be negative.

    Args:
        degree: an integer >= 1.
        offset: >= 0; with 0 all terms have the same degree.
        scale: > 0, such as 1 / d.
    """

    degree: int
    offset: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "degree", checks.integer("degree", self.degree, 1))
        object.__setattr__(self, "offset", checks.nonnegative("offset", self.offset))
        self._positive("scale")

    @property
    def keops(self) -> Formulas:
        """With the degree written out."""
        base = "(Elem(c, 2) * (x | z) + Elem(c, 1))"
        slope = f"(Elem(c, 0) * Elem(c, 2) * {_power(base, self.degree - 1)})"
        return Formulas(_power(base, self.degree), f"{slope} * x")

    @property
    def triton(self) -> str:
        """With the degree written out."""
        return f"""
base = scale * dot + offset
value = tl.full(base.shape, 1.0, base.dtype)
if WEIGHT:
    value *= degree * scale
    for _ in tl.static_range({self.degree - 1}):
        value *= base
else:
    for _ in tl.static_range({self.degree}):
        value *= base
"""

    def value_(self, t: torch.Tensor) -> torch.Tensor:
        """Overwrite x.z by (scale x.z + offset)^degree."""
        return t.mul_(self.scale).add_(self.offset).pow_(self.degree)

    def slope_(self, t: torch.Tensor) -> torch.Tensor:
        """Overwrite x.z by degree scale (scale x.z + offset)^(degree - 1)."""
        return t.mul_(self.scale).add_(self.offset).pow_(self.degree - 1).mul_(self.degree * self.scale)
