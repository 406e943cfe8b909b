"""Kernel profiles on the device: the function that a kernel's ``triton`` text is the body of."""

from __future__ import annotations

import builtins
import functools
import hashlib
import linecache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import jit

from ..profile import Kernel, constants, text
from .launch_config import version


def device_profile(kernel: Kernel):
    """The device function (measure, constants_at, WEIGHT) -> the value or the gradient weight, of a kernel.

    The measure is the number of a pair that its text goes by: ``kernel.measure``.
    """
    return _compiled(type(kernel), kernel.measure, tuple(constants(kernel, torch.float64)), text(kernel, "triton"))


@functools.cache
def _compiled(kernel: type[Kernel], measure: str, names: tuple[str, ...], body: str):
    """Triton compiles functions from their source, so the text gets a name that Python's ``linecache`` finds it by.

    The function's name says what its text is: Triton 3.3 to 3.5 know a function that is an argument by its name alone,
    and launch what they have compiled for another text of that name.
    """
    digest = hashlib.sha256("\n".join((measure, *names, body)).encode()).hexdigest()[:16]
    name = f"{kernel.__name__}_{digest}"
    loads = [f"{name} = tl.load(constants_at + {index})" for index, name in enumerate(names)]
    lines = [*loads, *body.strip("\n").splitlines(), "return value"]
    source = f"def {name}({measure}, constants_at, WEIGHT: tl.constexpr):\n"
    source += "".join(f"    {line}\n" for line in lines)
    path = f"<triton profile of {kernel.__module__}.{kernel.__qualname__} {id(kernel)} {hash(body)}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    names_of = {"tl": tl, "__name__": __name__}
    exec(compile(source, path, "exec"), names_of)  # the text of a class that this process has imported
    _take_functions()
    return triton.jit(names_of[name])


def _take_functions() -> None:
    """Let Triton 3.2 take functions as arguments: it compiles them as later versions do, but for a check of its own."""
    if version() < (3, 3):
        runtime: Any = jit
        runtime.callable = lambda value: builtins.callable(value) and not isinstance(value, jit.JITFunction)


def constants_of(kernel: Kernel, like: torch.Tensor) -> torch.Tensor:
    """What the device function loads, in the order of the kernel's fields.

    They are stored in the dtype of the computation, since numbers of a launch have float32's digits only; and filled
    in, not copied, which a CUDA graph's capture allows.
    """
    return torch.cat([like.new_full((1,), value) for value in constants(kernel, like.dtype).values()])
