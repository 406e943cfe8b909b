"""Who can serve a call, and why not."""

from __future__ import annotations

import contextlib
import importlib.util

import torch

from ._checks import BackendUnavailable, choice

# Backends built into this version, in the order "auto" considers them.
BUILT = ("torch",)
NAMES = ("auto", "torch", "triton", "keops")


def choose(backend: str, op: str) -> tuple[str, str]:
    """(backend, why) for a call, or BackendUnavailable."""
    choice("backend", backend, NAMES)
    if backend == "auto":
        return "torch", "the torch backend serves every device"
    if backend not in BUILT:
        installed = importlib.util.find_spec("pykeops" if backend == "keops" else backend) is not None
        raise BackendUnavailable(
            f"backend {backend!r} cannot serve {op}: this version of fastagop has no {backend} kernels "
            f"({backend} is {'' if installed else 'not '}installed); use backend='torch' or 'auto'"
        )
    return backend, "asked for"


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device):
    """Run torch's float32 products at the precision asked for, whatever the process has set globally.

    The CPU always computes at "highest": its faster modes round to bf16, which "high" does not allow.
    """
    wanted = precision if device.type == "cuda" else "highest"
    before = torch.get_float32_matmul_precision()
    if before == wanted:
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def precision_words(precision: str, X: torch.Tensor) -> str:
    """What a precision means for this tensor, in words."""
    if X.dtype == torch.float64:
        return "float64 (float64 tensors always compute in float64)"
    if X.device.type != "cuda" and precision != "highest":
        return f"float32 ({precision!r} asked for; the CPU computes float32 at its full precision)"
    return f"float32, {precision}"
