"""Derivatives of the kernels' gradient weights, for second derivatives of kernel machines.

With t = r^2 a profile phi(r) has dphi/dt = -w / 2, w the gradient weight, and this file has dw/dt. A kernel of one's own
gets second derivatives by a function here; without one they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .radial import Gaussian, GeneralisedLaplace, Laplace, Matern52, Radial


def _laplace(kernel: Laplace, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """w = exp(-r / L) / (L r), dw/dt = -w (1 / (L r) + 1 / r^2) / 2."""
    r = t.sqrt()
    return -0.5 * w * (1.0 / (kernel.bandwidth * r) + 1.0 / t)


def _gaussian(kernel: Gaussian, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """w = k / L^2, dw/dt = -w / (2 L^2)."""
    return w * (-0.5 / kernel.bandwidth**2)


def _generalised(kernel: GeneralisedLaplace, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """w = p u k / r^2 with u = (r / L)^p, dw/dt = w (p (1 - u) / 2 - 1) / r^2."""
    u = (t.sqrt() / kernel.bandwidth) ** kernel.exponent
    return w * (0.5 * kernel.exponent * (1.0 - u) - 1.0) / t


def _matern52(kernel: Matern52, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """w = 5 (1 + s) exp(-s) / (3 L^2) with s = sqrt(5) r / L, dw/dt = -25 exp(-s) / (6 L^4)."""
    s = math.sqrt(5.0) / kernel.bandwidth * t.sqrt()
    return (-25.0 / 6.0 / kernel.bandwidth**4) * torch.exp(-s)


_SLOPES: dict[type[Radial], Callable] = {
    Laplace: _laplace,
    Gaussian: _gaussian,
    GeneralisedLaplace: _generalised,
    Matern52: _matern52,
}


def slope(kernel: Radial, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """dw/dt at squared distances t, w the weights there; zero where t = 0. Differentiable in both.

    Raises:
        TypeError: naming the kernel whose slope is not known.
    """
    found = next((_SLOPES[kind] for kind in type(kernel).__mro__ if kind in _SLOPES), None)
    if found is None:
        raise TypeError(
            f"kernel {type(kernel).__name__} has no second derivatives; add its slope to kernels/radial_slopes.py"
        )
    apart = t > 0
    return torch.where(apart, found(kernel, torch.where(apart, t, 1.0), w), 0.0)


def smooth_weight(kernel: Radial) -> float:
    """The gradient weight's limit at r = 0 where the kernel is twice differentiable there, and 0 where it is not."""
    if isinstance(kernel, Gaussian):
        return 1.0 / kernel.bandwidth**2
    if isinstance(kernel, Matern52):
        return 5.0 / 3.0 / kernel.bandwidth**2
    if isinstance(kernel, GeneralisedLaplace) and kernel.exponent == 2.0:
        return 2.0 / kernel.bandwidth**2
    return 0.0
