"""Kernel profiles on the device: the Triton side of ``radial``, one function for every kernel.

A kernel is added by its line in ``_KINDS`` and its branch in ``profile``; launches pass on whatever parameters it has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..radial import Gaussian, GeneralisedLaplace, Laplace, Matern52, Radial

_KINDS: dict[type[Radial], str] = {
    Laplace: "laplace",
    Gaussian: "gaussian",
    GeneralisedLaplace: "generalised laplace",
    Matern52: "matern52",
}


def kind(kernel: Radial) -> str | None:
    """The constexpr that names a kernel's profile below, or None where it has none."""
    return _KINDS.get(type(kernel))


def constants(kernel: Radial, like: torch.Tensor) -> torch.Tensor:
    """1 / L and then the kernel's further parameters, on the device.

    They are stored in the dtype of the computation, since numbers of a launch have float32's digits only; and filled
    in, not copied, which a CUDA graph's capture allows.
    """
    values = (1.0 / kernel.bandwidth, *kernel.further_parameters)
    return torch.cat([like.new_full((1,), value) for value in values])


@triton.jit
def profile(sq, constants_at, KIND: tl.constexpr, WEIGHT: tl.constexpr):
    """phi(r), or the gradient weight -phi'(r)/r (zero where r = 0), from r^2 and what ``constants`` gave.

    r^2 is infinite beyond the last point: the value there must be 0, not NaN.
    """
    inv = tl.load(constants_at)
    if KIND == "laplace":
        r = tl.sqrt(sq) * inv
        value = tl.exp(-r)
        if WEIGHT:
            value = tl.where(r > 0.0, value / tl.where(r > 0.0, r, 1.0), 0.0) * (inv * inv)
    elif KIND == "generalised laplace":
        p = tl.load(constants_at + 1)
        r = tl.sqrt(sq) * inv
        t = tl.where(r > 0.0, tl.exp2(p * tl.log2(tl.where(r > 0.0, r, 1.0))), 0.0)
        value = tl.exp(-t)
        if WEIGHT:
            value = tl.where(sq > 0.0, p * t * value / tl.where(sq > 0.0, sq, 1.0), 0.0)
    elif KIND == "matern52":
        s = tl.minimum(tl.sqrt(sq * 5.0) * inv, 1e4)
        value = tl.exp(-s)
        if WEIGHT:
            value = tl.where(sq > 0.0, (1.0 + s) * value * (5.0 * inv * inv) / 3.0, 0.0)
        else:
            value = tl.minimum((1.0 + s * (1.0 + s / 3.0)) * value, 1.0)  # it may round upwards
    else:
        tl.static_assert(KIND == "gaussian")
        value = tl.exp(sq * (-0.5 * inv * inv))
        if WEIGHT:
            value = tl.where(sq > 0.0, value * (inv * inv), 0.0)
    return value
