"""Kernel profiles on the device: the Triton side of ``radial``, one function for every kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .radial import Gaussian, Laplace, Radial

_KINDS: dict[type[Radial], str] = {Laplace: "laplace", Gaussian: "gaussian"}


def kind(kernel: Radial) -> str | None:
    """The constexpr that names a kernel's profile below, or None where it has none."""
    return _KINDS.get(type(kernel))


@triton.jit
def profile(sq, inv, KIND: tl.constexpr, WEIGHT: tl.constexpr):
    """phi(r), or the gradient weight -phi'(r)/r (zero where r = 0), from r^2 and inv = 1 / L."""
    if KIND == "laplace":
        r = tl.sqrt(sq) * inv
        value = tl.exp(-r)
        if WEIGHT:
            value = tl.where(r > 0.0, value / tl.where(r > 0.0, r, 1.0), 0.0) * (inv * inv)
    else:
        tl.static_assert(KIND == "gaussian")
        value = tl.exp(sq * (-0.5 * inv * inv))
        if WEIGHT:
            value = value * (inv * inv)
    return value
