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

    torch knows full float32 and TF32 (on the CPU bf16); what is less accurate than asked for is not taken, so "high"
    computes like "highest" here, and the CPU always does.
    """
    medium = precision == "medium" and device.type == "cuda"
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    switches = [torch.backends.cuda.matmul, mkldnn]
    if all(hasattr(switch, "fp32_precision") for switch in switches):  # torch >= 2.9
        before = [switch.fp32_precision for switch in switches]
        wanted = ["tf32" if medium else "ieee", "ieee"]
        try:
            for switch, value in zip(switches, wanted, strict=True):
                switch.fp32_precision = value
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
        return
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)


def precision_words(precision: str, X: torch.Tensor) -> str:
    """What a precision means for this tensor, in words."""
    if X.dtype == torch.float64:
        return "float64 (float64 tensors always compute in float64)"
    if precision == "medium" and X.device.type == "cuda":
        return "float32, medium (TF32)"
    return "float32, highest" + (
        "" if precision == "highest" else f" ({precision!r} asked for: at least that accurate)"
    )
