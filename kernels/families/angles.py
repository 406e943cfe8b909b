"""Kernels of wide ReLU networks: functions of the angle and the norms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import checks
from ..pair_backend.angle import AngleProfile, Angles
from ..profile import Formulas
from .composition import Combining

# In KeOps' words, with c = (the kernel's parameter, 1 / pi). A zero vector adds 1 to both distances of unit vectors,
# which makes a right angle; angles are those of their ratio.
_U, _V = "(Rsqrt(SqNorm2(x)) * x)", "(Rsqrt(SqNorm2(z)) * z)"
_LIVE = "Sign(SqNorm2(x) * SqNorm2(z))"
_APART = f"(Norm2({_U} - {_V}) + (IntCst(1) - {_LIVE}))"
_OPPOSITE = f"(Norm2({_U} + {_V}) + (IntCst(1) - {_LIVE}))"
_SQUARES = f"Inv(Square({_APART}) + Square({_OPPOSITE}))"  # 1 / 4, but for zero vectors
_SINE = f"(IntCst(2) * {_APART} * {_OPPOSITE} * {_SQUARES})"
_COSINE = f"((Square({_OPPOSITE}) - Square({_APART})) * {_SQUARES})"
_PER_PI = "Elem(c, 1)"
_LEFT = f"({_PER_PI} * IntCst(2) * Atan2({_OPPOSITE}, {_APART}))"  # (pi - theta) / pi
_OVER_SINE = f"({_PER_PI} * Inv({_SINE} + (IntCst(1) - Sign({_SINE}))))"  # 1 / (pi sine)
_FIRST = f"({_PER_PI} * {_SINE} + {_LEFT} * {_COSINE})"  # J_1 / pi
_SECOND = f"({_PER_PI} * IntCst(3) * {_SINE} * {_COSINE} + {_LEFT} * (IntCst(1) + IntCst(2) * Square({_COSINE})))"
# 1 where the sine exceeds 16 eps, and no vector is zero: elsewhere vectors are parallel to rounding.
_ACROSS = f"Step({' * '.join(['IntCst(65536)'] * 3)} * {_SINE} - IntCst(1)) * {_LIVE}"
_LENGTHS = ("", " * Sqrt(SqNorm2(x) * SqNorm2(z))", " * (SqNorm2(x) * SqNorm2(z))")  # by the degree
_SLOPE_LENGTHS = ("Rsqrt(SqNorm2(z))", "Norm2(x)", "SqNorm2(x) * Norm2(z)")


def _formulas(degree: int, height: str, tangent: str) -> Formulas:
    """||x||^s ||z||^s h, and its gradient ||x||^s ||z||^(s-1) (T (x^ - z^) + (T (1 - cos(theta)) + s h) z^)."""
    across = f"(({tangent}) * {_ACROSS})"
    along = f"({across} * IntCst(2) * Square({_APART}) * {_SQUARES}"
    along += f" + IntCst({degree}) * {height})" if degree else ")"
    slope = f"({_SLOPE_LENGTHS[degree]}) * ({across} * ({_U} - {_V}) + {along} * {_V})"
    return Formulas(f"{height}{_LENGTHS[degree]}", slope, (1.0 / math.pi,))


@dataclass(frozen=True)
class ArcCosine(Combining, AngleProfile):
    r"""Arc-cosine kernel of Cho and Saul (2009), k(x, z) = ||x||^n ||z||^n J_n(theta) / pi, n the order.

    J_0 = pi - theta, J_1 = sin(theta) + (pi - theta) cos(theta), J_2 = 3 sin(theta) cos(theta) + (pi - theta)
    (1 + 2 cos(theta)^2). k(x, x) is ||x||^(2 n) times 1, 1, 3. At a zero vector, and for order 0 where x and z are
    parallel (there is a kink), the gradient, or its part across z, counts as 0.

    Args:
        order: n = 0, 1 or 2.
    """

    order: int

    nonnegative = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", checks.integer("order", self.order, 0, 2))

    @property
    def degree(self) -> int:
        """Power of the norms ||x|| ||z||: the order."""
        return self.order

    @property
    def keops(self) -> Formulas:
        """Those of the order."""
        parts = ((_LEFT, _OVER_SINE), (_FIRST, _LEFT), (_SECOND, f"IntCst(4) * {_FIRST}"))
        return _formulas(self.order, *parts[self.order])

    def height(self, angles: Angles) -> torch.Tensor:
        """J_n(theta) / pi, a value of the kernel for points of length 1."""
        left = (math.pi - angles.theta).div_(math.pi)
        if self.order == 0:
            return left
        sine, cosine = angles.sine / math.pi, angles.cosine
        if self.order == 1:
            return left.mul_(cosine).add_(sine)
        return left.mul_(cosine.square().mul_(2.0).add_(1.0)).addcmul_(sine, cosine, value=3.0)

    def tangent(self, angles: Angles) -> torch.Tensor:
        """1 / (pi sin), (pi - theta) / pi, 4 J_1 / pi."""
        if self.order == 0:
            return angles.sine.mul(math.pi).reciprocal_()
        left = (math.pi - angles.theta).div_(math.pi)
        if self.order == 1:
            return left
        return left.mul_(angles.cosine).add_(angles.sine, alpha=1.0 / math.pi).mul_(4.0)


@dataclass(frozen=True)
class NTK(Combining, AngleProfile):
    r"""Neural tangent kernel of a fully connected ReLU network (Jacot et al. 2018), without biases.

    With kappa_0 = (pi - theta) / pi and kappa_1 = (sin(theta) + (pi - theta) cos(theta)) / pi, every hidden layer maps
    cos(theta) <- kappa_1(theta) and Theta <- Theta kappa_0(theta) + kappa_1(theta), from Theta = cos(theta); k(x, z) =
    ||x|| ||z|| Theta. Weights have variance 2 / width, so k(x, x) = (depth + 1) ||x||^2. Where x and z are parallel
    there is a kink: the part of the gradient across z counts as 0, and the gradient at a zero vector is 0.

    Args:
        depth: hidden layers, an integer >= 1.
    """

    depth: int

    nonnegative = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", checks.integer("depth", self.depth, 1))

    @property
    def degree(self) -> int:
        """Power of the norms ||x|| ||z||: 1 at every depth."""
        return 1

    @property
    def keops(self) -> Formulas | None:
        """Of one hidden layer: KeOps computes the angle wherever it is named, and the next one names it ten times."""
        if self.depth > 1:
            return None
        tangent = f"IntCst(2) * {_LEFT} + {_COSINE} * {_OVER_SINE}"
        return _formulas(1, f"({_COSINE} * {_LEFT} + {_FIRST})", tangent)

    def blocks_alive(self) -> int:
        """Those of a layer and of the next one."""
        return 18

    def _layers(self, angles: Angles) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(kappa_0, sine, kappa_1, Theta before) of every hidden layer."""
        theta, sine, total = angles.theta, angles.sine, angles.cosine
        for _ in range(self.depth):
            linear = (math.pi - theta).div_(math.pi)
            # 1 - kappa_1 = 1 - cos(theta) - (sin(theta) - theta cos(theta)) / pi, to the digits that theta has.
            half = torch.sin(0.5 * theta).square_().mul_(2.0)
            half.sub_(torch.sin(theta).sub_(torch.cos(theta).mul_(theta)).div_(math.pi))
            value = 1.0 - half
            half.mul_(0.5).clamp_(0.0, 1.0)
            yield linear, sine, value, total
            total = (total * linear).add_(value)
            rest = 1.0 - half
            sine = (half * rest).sqrt_().mul_(2.0)
            theta = torch.atan2(half.sqrt_(), rest.sqrt_()).mul_(2.0)
            del half, rest, value, linear

    def height(self, angles: Angles) -> torch.Tensor:
        """The tangent kernel Theta(theta) for points of length 1, by a recursion over the layers."""
        total = angles.cosine
        for linear, _, value, before in self._layers(angles):
            total = (before * linear).add_(value)
        return total

    def tangent(self, angles: Angles) -> torch.Tensor:
        """-dTheta / dtheta / sin(theta), from layer to layer: nothing in it cancels.

        With e the product of the kappa_0 so far, T <- T kappa_0 + Theta e / (pi sine) + e kappa_0, from T = 1.
        """
        slope, e = torch.ones_like(angles.theta), torch.ones_like(angles.theta)
        for linear, sine, _, before in self._layers(angles):
            slope.mul_(linear).add_((before * e).div_(math.pi * sine)).add_(e.mul_(linear))
        return slope
