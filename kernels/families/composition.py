"""Sums, products and multiples of kernels, k1 + k2, k1 * k2, 0.5 * k, and the operators that make them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..operations import kernel_matrix
from ..pair_backend.composite import MultiplePairs, ProductPairs, SumPairs, diagonal_of, pairs_of
from ..pair_backend.pairs import PairKernel, Pairs
from ..profile import Kernel


class Combining:
    """What every public kernel can do: be called, and be combined with others."""

    def __call__(self, X: torch.Tensor, Z: torch.Tensor | None = None) -> torch.Tensor:
        """Kernel matrix k(X, Z), shape (n, m); the same as ``fastagop.kernel_matrix(kernel, X, Z)``."""
        return kernel_matrix(self, X, Z)  # pyright: ignore[reportArgumentType]

    def __add__(self, other: Kernel) -> Sum:
        """The kernel k1 + k2."""
        return Sum(self, other) if isinstance(other, Kernel) else NotImplemented  # pyright: ignore

    def __mul__(self, other: Kernel | float) -> Product | Multiple:
        """k1 * k2, or a multiple of k."""
        if isinstance(other, Kernel):
            return Product(self, other)  # pyright: ignore[reportArgumentType]
        if isinstance(other, (bool, str)) or not hasattr(other, "__float__") or isinstance(other, torch.Tensor):
            return NotImplemented
        return Multiple(float(other), self)  # pyright: ignore[reportArgumentType]

    __rmul__ = __mul__


class _Combined(Combining, PairKernel):
    """A kernel made of others: what they all have, it has."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, Kernel):
                raise TypeError(f"{type(self).__name__} must be made of fastagop kernels, got {part!r}")

    def _all(self, name: str) -> bool:
        return all(getattr(part, name) for part in self.parts)

    @property
    def shift_invariant(self) -> bool:
        """Whether all parts are."""
        return self._all("shift_invariant")

    @property
    def rotation_invariant(self) -> bool:
        """Whether all parts are."""
        return self._all("rotation_invariant")

    @property
    def nonnegative(self) -> bool:
        """Whether all parts are."""
        return self._all("nonnegative")

    @property
    def wide(self) -> bool:
        """Whether a part is, or is radial."""
        return any(part.wide for part in self.parts)

    @property
    def agop_forms(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of all parts."""
        return tuple(form for form in ("gradient", "gram") if all(form in part.agop_forms for part in self.parts))

    def blocks_alive(self) -> int:
        """Those of the parts, and what combines them."""
        return 3 + sum(part.blocks_alive() if isinstance(part, PairKernel) else 8 for part in self.parts)


@dataclass(frozen=True)
class Sum(_Combined):
    """k(x, z) = k1(x, z) + k2(x, z): what ``k1 + k2`` makes.

    Args:
        left, right: kernels.
    """

    left: Kernel
    right: Kernel

    @property
    def parts(self) -> tuple[Kernel, ...]:
        """The two terms of the sum."""
        return self.left, self.right

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """Blocks of values and gradients of k1 + k2."""
        return SumPairs(pairs_of(self.left, X, Z), pairs_of(self.right, X, Z))

    def diagonal(self, X: torch.Tensor) -> torch.Tensor:
        """k1(x, x) + k2(x, x) of every row."""
        return diagonal_of(self.left, X) + diagonal_of(self.right, X)

    def __repr__(self) -> str:
        right = f"({self.right!r})" if isinstance(self.right, Sum) else f"{self.right!r}"
        return f"{self.left!r} + {right}"


@dataclass(frozen=True)
class Product(_Combined):
    """k(x, z) = k1(x, z) k2(x, z): what ``k1 * k2`` makes.

    Args:
        left, right: kernels.
    """

    left: Kernel
    right: Kernel

    @property
    def parts(self) -> tuple[Kernel, ...]:
        """The two factors of the product."""
        return self.left, self.right

    @property
    def unit_diagonal(self) -> bool:
        """Whether both have one."""
        return self._all("unit_diagonal")

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """Blocks of values and gradients of k1 k2."""
        return ProductPairs(pairs_of(self.left, X, Z), pairs_of(self.right, X, Z))

    def diagonal(self, X: torch.Tensor) -> torch.Tensor:
        """k1(x, x) k2(x, x) of every row."""
        return diagonal_of(self.left, X) * diagonal_of(self.right, X)

    def __repr__(self) -> str:
        left = f"({self.left!r})" if isinstance(self.left, Sum) else f"{self.left!r}"
        right = f"({self.right!r})" if isinstance(self.right, (Sum, Product, Multiple)) else f"{self.right!r}"
        return f"{left} * {right}"


@dataclass(frozen=True)
class Multiple(_Combined):
    """k(x, z) = c k1(x, z): what ``c * k1`` makes.

    Args:
        factor: c > 0.
        kernel: a kernel.
    """

    factor: float
    kernel: Kernel

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("factor")

    @property
    def parts(self) -> tuple[Kernel, ...]:
        """The kernel that is multiplied, alone."""
        return (self.kernel,)

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """Pairs of the kernel."""
        return MultiplePairs(self.factor, pairs_of(self.kernel, X, Z))

    def diagonal(self, X: torch.Tensor) -> torch.Tensor:
        """factor k(x, x) of every row."""
        return self.factor * diagonal_of(self.kernel, X)

    def __repr__(self) -> str:
        inner = f"({self.kernel!r})" if isinstance(self.kernel, (Sum, Product, Multiple)) else f"{self.kernel!r}"
        return f"{self.factor!r} * {inner}"
