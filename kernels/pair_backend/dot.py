"""Kernels of the dot product: k(x, z) = kappa(x.z). Their gradient is kappa'(x.z) x: u = kappa', v = 0."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..gemm import matmul_nt
from .pairs import PairKernel, Pairs, add_combination


class DotProfile(PairKernel):
    """k(x, z) = kappa(x.z); subclasses give kappa and its derivative, in place, for float64 blocks.

    Values may have either sign and grow with the points; sums of them cancel, so blocks are float64.
    """

    rotation_invariant = True
    agop_forms: ClassVar[tuple[str, ...]] = ("gradient", "gram")
    measure: ClassVar[str] = "dot"

    def value_(self, t: torch.Tensor) -> torch.Tensor:
        """Overwrite t = x.z by kappa(t)."""
        raise self._lacks("value_(t), kappa of x.z")

    def slope_(self, t: torch.Tensor) -> torch.Tensor:
        """Overwrite t = x.z by kappa'(t)."""
        raise self._lacks("slope_(t), the derivative of kappa at x.z")

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """Blocks of products of the points."""
        return DotPairs(self, X, Z)

    def diagonal(self, X: torch.Tensor) -> torch.Tensor:
        """k(x, x) = kappa(||x||^2) of every row."""
        return self.value_((X * X).sum(1))


class DotPairs(Pairs):
    """A kernel of the dot product at its points."""

    def __init__(self, kernel: DotProfile, X: torch.Tensor, Z: torch.Tensor):
        super().__init__(X, Z)
        self.kernel = kernel

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """kappa of a block of products."""
        return self.kernel.value_(matmul_nt(self.Z[row], self.X[:width]))

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """u = kappa' of a block of products."""
        u, _ = self.combination(row)
        add_combination(u if factor is None else u.mul_(factor), None, alpha, self.X, self.Z[row], out)

    def combination(self, row: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(kappa', None): the gradient is kappa'(x.z) x."""
        return self.kernel.slope_(matmul_nt(self.Z[row], self.X)), None
