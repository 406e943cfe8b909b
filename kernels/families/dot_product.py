"""Kernels of the dot product, k(x, z) = kappa(x.z). Docs/pages/add_a_kernel.md says how one is added."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..pair_backend.dot import DotProfile
from .composition import Combining


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

    def value_(self, t: torch.Tensor) -> torch.Tensor:
        """Overwrite x.z by (scale x.z + offset)^degree."""
        return t.mul_(self.scale).add_(self.offset).pow_(self.degree)

    def slope_(self, t: torch.Tensor) -> torch.Tensor:
        """Overwrite x.z by degree scale (scale x.z + offset)^(degree - 1)."""
        return t.mul_(self.scale).add_(self.offset).pow_(self.degree - 1).mul_(self.degree * self.scale)
