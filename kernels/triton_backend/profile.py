"""Kernel profiles on the device: the function that a kernel's ``triton`` text is the body of."""

from __future__ import annotations

import functools
import linecache

import torch
import triton
import triton.language as tl

from ..profile import Kernel, constants, text


def device_profile(kernel: Kernel):
    """The device function (measure, constants_at, WEIGHT) -> the value or the gradient weight, of a kernel.

    The measure is the number of a pair that its text goes by: ``kernel.measure``.
    """
    return _compiled(type(kernel), kernel.measure, tuple(constants(kernel, torch.float64)), text(kernel, "triton"))


@functools.cache
def _compiled(kernel: type[Kernel], measure: str, names: tuple[str, ...], body: str):
    """Triton compiles functions from their source, so the text gets a name that Python's ``linecache`` finds it by."""
    loads = [f"{name} = tl.load(constants_at + {index})" for index, name in enumerate(names)]
    lines = [*loads, *body.strip("\n").splitlines(), "return value"]
    source = f"def {kernel.__name__}({measure}, constants_at, WEIGHT: tl.constexpr):\n"
    source += "".join(f"    {line}\n" for line in lines)
    path = f"<triton profile of {kernel.__module__}.{kernel.__qualname__} {id(kernel)} {hash(body)}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    names_of = {"tl": tl, "__name__": __name__}
    exec(compile(source, path, "exec"), names_of)  # the text of a class that this process has imported
    return triton.jit(names_of[kernel.__name__])


def constants_of(kernel: Kernel, like: torch.Tensor) -> torch.Tensor:
    """What the device function loads, in the order of the kernel's fields.

    They are stored in the dtype of the computation, since numbers of a launch have float32's digits only; and filled
    in, not copied, which a CUDA graph's capture allows.
    """
    return torch.cat([like.new_full((1,), value) for value in constants(kernel, like.dtype).values()])
