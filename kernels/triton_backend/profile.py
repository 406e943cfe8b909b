"""Kernel profiles on the device: the function that a kernel's ``triton`` text is the body of."""

from __future__ import annotations

import dataclasses
import functools
import linecache

import torch
import triton
import triton.language as tl

from ..profile import Profile, text


@functools.cache
def device_profile(kernel: type[Profile]):
    """The device function (sq, constants_at, WEIGHT) -> phi(r) or the gradient weight, of a kernel's class.

    Triton compiles functions from their source, so the text gets a name that Python's ``linecache`` finds it by.
    """
    loads = [f"{name} = tl.load(constants_at + {index})" for index, name in enumerate(_names(kernel))]
    lines = [*loads, *text(kernel, "triton").strip("\n").splitlines(), "return value"]
    source = f"def {kernel.__name__}(sq, constants_at, WEIGHT: tl.constexpr):\n"
    source += "".join(f"    {line}\n" for line in lines)
    path = f"<triton profile of {kernel.__module__}.{kernel.__qualname__} {id(kernel)}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    names = {"tl": tl, "__name__": __name__}
    exec(compile(source, path, "exec"), names)  # the text of a class that this process has imported
    return triton.jit(names[kernel.__name__])


def _names(kernel: type[Profile]) -> list[str]:
    """Names of what ``constants`` stores, in its order."""
    return ["inverse_bandwidth", *(field.name for field in dataclasses.fields(kernel)[1:])]


def constants(kernel: Profile, like: torch.Tensor) -> torch.Tensor:
    """1 / L, bounded so that times a difference of points it stays finite, and the kernel's further parameters.

    They are stored in the dtype of the computation, since numbers of a launch have float32's digits only; and filled
    in, not copied, which a CUDA graph's capture allows.
    """
    inverse = min(1.0 / kernel.bandwidth, torch.finfo(like.dtype).max * 2.0**-22)
    values = (inverse, *kernel.further_parameters)
    return torch.cat([like.new_full((1,), value) for value in values])
