"""One error vocabulary: what is wrong with an argument, what was given, what to do."""

from __future__ import annotations

import functools
import math
import numbers

import numpy as np
import torch

from . import first_use
from .errors import BackendUnavailable
from .profile import Kernel, unsettled

PRECISIONS = ("highest", "high", "medium")
_POINTS = ("X", "Z")  # arguments whose rows are points


def choice(name: str, value, allowed: tuple[str, ...], other: str = "") -> None:
    """Refuse a word that is not one of the allowed ones; ``other``: what else the argument may be."""
    if not isinstance(value, str) or value not in allowed:
        beside = f", or {other}" if other else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}{beside}, got {shown(value)}")


def shown(value) -> str:
    """A value as errors say it: as it is written, or its kind and size where that is long."""
    kind = type(value).__name__
    if isinstance(value, (list, tuple, set, dict)) and len(value) > 8:
        return f"a {kind} of {len(value)} items"
    text = repr(value)
    if len(text) <= 100 and "\n" not in text:
        return text
    shape = getattr(value, "shape", None)
    return f"an object of the class {kind}" if shape is None else f"{kind} of shape {tuple(shape)}"


def kernel(value, *, settled: bool = True) -> None:
    """Refuse what is no kernel, and (``settled``) one whose bandwidth is still to be chosen from points."""
    if not isinstance(value, Kernel):
        of_class = isinstance(value, type) and issubclass(value, Kernel)
        given = f"the class; use {value.__name__}(...) with its parameters" if of_class else shown(value)
        raise TypeError(f"kernel must be a fastagop kernel such as fastagop.Laplace(2.0), got {given}")
    if not unsettled(value):
        for part in value.parts:
            kernel(part)
        first_use.try_once(value)
    elif settled:
        raise ValueError(
            f"kernel must have a number for a bandwidth here, got {value!r}; use fastagop.settled(kernel, X), which "
            "takes the median distance of points, or a number"
        )


def radial(value: Kernel, operation: str, remedy: str) -> None:
    """Refuse a kernel that is not a function of ||x - z||_2 where only those are served."""
    if not value.radial:
        raise BackendUnavailable(f"{operation} serves radial kernels only, got {value!r}; {remedy}")


def nonnegative(name: str, value) -> float:
    """A finite number >= 0, as float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def integer(name: str, value, least: int, largest: int | None = None) -> int:
    """An integer from ``least`` to ``largest``, or without an upper bound, as int; a bool is none."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (largest is not None and int(value) > largest):
        bounds = f">= {least}" if largest is None else f"from {least} to {largest}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
    return int(value)


def ridge(value, dtype: torch.dtype) -> float:
    """A ridge that the kernel matrix's dtype holds, as float."""
    found = nonnegative("ridge", value)
    if found > torch.finfo(dtype).max:
        raise ValueError(f"ridge {value!r} is beyond {dtype}; take a smaller one or float64")
    return found


def memory_limit(value) -> int | None:
    """Bytes as int, or None."""
    if value is None:
        return None
    if value == float("inf"):
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 1:
        raise ValueError(f"memory_limit must be a positive number of bytes or None, got {value!r}")
    return int(float(value))


def plain(name: str, value) -> None:
    """Refuse anything but a dense tensor whose items lie in memory one by one."""
    if not isinstance(value, torch.Tensor):
        remedy = ""
        if hasattr(value, "alpha"):
            remedy = "; pass its alpha"
        elif hasattr(value, "to_numpy"):  # torch reads no DataFrame
            remedy = f"; use torch.as_tensor({name}.to_numpy())"
        elif hasattr(value, "__array__") or isinstance(value, (list, tuple, numbers.Number)):
            remedy = f"; use torch.as_tensor({name})"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{remedy}")
    if type(value) is torch.Tensor and value.layout == torch.strided and not (value.is_nested or value.is_quantized):
        return
    refusals = (
        (value.is_nested, "a nested tensor", "use torch.nested.to_padded_tensor, or one of its parts"),
        (value.layout != torch.strided, f"layout {value.layout}", f"convert it with {name}.to_dense()"),
        (value.is_quantized, f"a quantized one ({value.dtype})", f"convert it with {name}.dequantize()"),
        (_is_wrapper(value), f"a {type(value).__name__}", f"pass what it holds (of a DTensor, {name}.full_tensor())"),
    )
    for refused, kind, remedy in refusals:
        if refused:
            raise TypeError(f"{name} must be a dense torch.Tensor, got {kind}; {remedy}")


def unmasked(name: str, value) -> None:
    """Refuse arrays of which entries are masked: NumPy takes the numbers that lie beneath."""
    if np.ma.is_masked(value):
        raise ValueError(
            f"{name} holds masked entries, {np.ma.count_masked(value)} of them; leave such rows out, or fill them in "
            "by numpy.ma.filled"
        )


def tensor(value, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor where it is, other numbers on the CPU; ``torch.as_tensor`` would take the process's default device."""
    if isinstance(value, torch.Tensor):
        return value if dtype is None else value.to(dtype)
    return torch.as_tensor(value, dtype=dtype, device="cpu")


def _is_wrapper(value: torch.Tensor) -> bool:
    """Whether a class of its own carries out the tensor's operations: its items may be elsewhere, or masked."""
    dispatch = getattr(type(value), "__torch_dispatch__", None)
    return type(value) is not torch.Tensor and dispatch is not getattr(torch.Tensor, "__torch_dispatch__", None)


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's does not."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def matrix(name: str, value, *, like: torch.Tensor | None = None, rows=None, columns=None) -> None:
    """Refuse anything but a finite (n, d) tensor of a supported dtype that fits its neighbours.

    rows and columns, where given, are (count, what it must agree with).
    """
    plain(name, value)
    if value.ndim != 2:
        more = f"; use {name}[:, None] for a single column" if value.ndim == 1 else ""
        if value.ndim == 1 and name in _POINTS:
            more = f"; {name}[None] is one point, {name}[:, None] is {len(value)} points of one feature"
        elif value.ndim == 1 and name == "Y" and not value.is_floating_point():
            more = (
                "; for labels use 2.0 * torch.nn.functional.one_hot(Y.long()).to(X) - 1.0, a column for each class; "
                "for numbers Y[:, None].to(X)"
            )
        raise ValueError(f"{name} must be a matrix, got shape {tuple(value.shape)}{more}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}; convert it with {name}.float()")
    if like is not None and (value.dtype != like.dtype or value.device != like.device):
        raise ValueError(
            f"{name} is {value.dtype} on {value.device} but X is {like.dtype} on {like.device}; "
            f"move it with {name}.to(X)"
        )
    if value.device.type == "meta":
        raise TypeError(f"{name} must hold numbers, got a tensor on meta; only fastagop.explain takes those")
    if not has_float64(value.device):
        raise TypeError(
            f"{name} must be on a device with float64, got {value.device}: AGOPs are summed and systems solved in "
            f"float64; move it with {name}.cpu()"
        )
    for axis, agreement in ((0, rows), (1, columns)):
        if agreement is not None and value.shape[axis] != agreement[0]:
            raise ValueError(
                f"{name} must have {agreement[0]} {('rows', 'columns')[axis]} to agree with {agreement[1]}, "
                f"got shape {tuple(value.shape)}"
            )
    if not finite(value):
        raise ValueError(f"{name} holds NaN or infinity{first_bad(value)}; leave such rows out, or fill them in")


def first_bad(value: torch.Tensor) -> str:
    """Which row holds NaN or infinity first, in words."""
    bad = value.isfinite().reshape(len(value), -1).all(1).logical_not_().nonzero()
    return f" in {len(bad)} of {len(value)} rows, of which row {int(bad[0])} is the first"


def output(name: str, value, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Refuse a result tensor that is not dense, or of another shape, dtype or device."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested
    if not dense or value.shape != shape:
        raise ValueError(f"{name} must be a dense tensor of shape {shape}, got {_describe(value)}")
    if value.dtype != like.dtype or value.device != like.device:
        raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {_describe(value)}")


def _describe(value) -> str:
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, torch.Tensor) and value.layout != torch.strided:
        return f"layout {value.layout}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def sample_weight(value, Z: torch.Tensor, reduction: str) -> None:
    """Refuse anything but finite weights >= 0, one for each point, of which a mean and a solve need one above zero."""
    if value is None:
        return
    plain("sample_weight", value)
    if value.shape != (len(Z),):
        raise ValueError(
            f"sample_weight must have shape ({len(Z)},), one weight for each point, got {tuple(value.shape)}"
        )
    if value.dtype != Z.dtype or value.device != Z.device:
        raise ValueError(
            f"sample_weight must be {Z.dtype} on {Z.device} like X, got {value.dtype} on {value.device}; "
            "move it with sample_weight.to(X)"
        )
    if not readable(value):
        return
    if not finite(value) or bool((value < 0).any()):
        raise ValueError("sample_weight must be finite and >= 0, got NaN, infinity or a negative weight; correct these")
    if reduction == "sum" or bool((value > 0).any()):
        return
    if reduction == "mean":
        raise ValueError("sample_weight must have a weight above 0 for reduction='mean', got none; use reduction='sum'")
    raise ValueError("sample_weight must have a weight above 0, got none: no row is left to solve for")


def readable(value: torch.Tensor) -> bool:
    """Whether values may be looked at: not while a CUDA graph is captured, when the host must not wait."""
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def finite(value: torch.Tensor) -> bool:
    """Whether every item is finite (taken for granted in a capture); the extremes say it without a mask."""
    for axis, stride in enumerate(value.stride()):  # an expanded axis repeats its items
        value = value.narrow(axis, 0, min(1, value.shape[axis])) if stride == 0 else value
    return not readable(value) or math.isfinite(largest(value))


def largest(value: torch.Tensor) -> float:
    """The size of the largest item of a tensor, 0 where it has none, NaN where one is NaN."""
    if not value.numel():
        return 0.0
    low, high = torch.aminmax(value)
    return max(abs(low.item()), abs(high.item()))


def spread(X: torch.Tensor, Z: torch.Tensor, largest: float) -> None:
    """Refuse points of which a few are so far out that squares of the others' distances vanish beside theirs."""
    bound = torch.finfo(X.dtype).tiny ** -0.33  # 2e12 in float32, 3e101 in float64
    typical = max(float(points.abs().amax(1).median()) for points in (X, Z) if len(points))
    if 0 < typical < largest / bound:
        name, points = ("Z", Z) if Z is not X and float(X.abs().max()) < largest else ("X", X)
        row, wider = int(points.abs().amax(1).argmax()), " or use float64" if X.dtype != torch.float64 else ""
        raise ValueError(
            f"{name}[{row}] has an entry of size {largest:.1e} while half of the rows stay below {typical:.1e}: "
            f"{X.dtype} cannot hold the distances of both; remove such rows (fill values?){wider}"
        )


def flag(name: str, value) -> None:
    """Refuse what is neither True nor False, NumPy's own included."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def apart(name: str, value: torch.Tensor, *others: torch.Tensor) -> None:
    """Refuse a tensor to be written whose items share memory, or whose memory reaches into one that is read."""
    axes = sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1)
    if any(stride == 0 for stride, _ in axes) or (len(axes) == 2 and axes[1][0] <= axes[0][0] * (axes[0][1] - 1)):
        raise ValueError(f"{name} overlaps itself (strides {tuple(value.stride())}); pass a tensor of its own")
    first, last = _span(value)
    for other in others:
        start, end = _span(other)
        if first < end and start < last:
            raise ValueError(
                f"{name} shares memory with an input, which would change while it is read; pass a new tensor"
            )


def _span(value: torch.Tensor) -> tuple[int, int]:
    if value.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (reach + 1) * value.element_size()


def points(X, Z) -> torch.Tensor:
    """Check centers and evaluation points; returns the evaluation points, X itself where they are the same."""
    matrix("X", X)
    if len(X) == 0 or X.shape[1] == 0:
        raise ValueError(f"X must have at least 1 row(s) and one column, got shape {tuple(X.shape)}")
    if Z is None or Z is X:
        return X
    matrix("Z", Z, like=X, columns=(X.shape[1], "X"))
    return X if same(X, Z) else Z


def same(X: torch.Tensor, Z: torch.Tensor) -> bool:
    """Whether two tensors are one piece of memory seen the same way."""
    seen = X.shape == Z.shape and X.stride() == Z.stride() and X.is_neg() == Z.is_neg()
    return X is Z or (seen and X.data_ptr() == Z.data_ptr())
