"""Who can serve a call, and why not."""

from __future__ import annotations

import importlib.util

import torch

from .checks import choice
from .errors import BackendUnavailable
from .keops_backend import reductions
from .radial import Radial
from .triton_backend.launch_config import interpreted

# What each backend of this version serves; "auto" stays with torch until the Triton kernels were measured on a GPU.
SERVES = {
    "torch": ("kernel_matrix", "kernel_matmul", "gradients", "agop", "solve"),
    "triton": ("kernel_matrix", "kernel_matmul", "gradients", "agop", "solve"),
    "keops": ("kernel_matmul", "gradients", "agop"),
}
PRODUCTS = {"highest": "fp16x3", "high": "bf16x3", "medium": "tf32"}  # of the Triton backend
NAMES = ("auto", "torch", "triton", "keops")
# (device, operation) -> most features with which KeOps measured faster than torch, 0 for never:
# bench/results/keops_cpu.json, made by ``python -m bench keops``. A GPU has not been measured.
KEOPS_FEATURES = {("cpu", "kernel_matmul"): 0, ("cpu", "gradients"): 0, ("cpu", "agop"): 0}
# Pairs from which "auto" lets KeOps compile: that takes about ten seconds, and torch would then take longer.
KEOPS_PAIRS = 1e9


def choose(
    backend: str, op: str, kernel: Radial, X: torch.Tensor, precision: str = "highest", pairs: float = 0.0
) -> tuple[str, str]:
    """(backend, why) for a call that visits so many pairs of points, or BackendUnavailable."""
    choice("backend", backend, NAMES)
    if backend == "auto":
        most = KEOPS_FEATURES.get((X.device.type, op), 0)
        if X.shape[1] <= most and pairs >= KEOPS_PAIRS and reductions.missing(kernel, X) is None:
            return "keops", f"KeOps is faster up to {most} features here, and {pairs:.0e} pairs are worth compiling for"
        return "torch", "the torch backend serves every device"
    reason = None
    if op not in SERVES[backend]:
        reason = f"this version of fastagop has no {backend} kernel for it"
        if backend == "keops":
            reason = "it would store the kernel matrix and KeOps never does"
            reason += "; method='cg' solves without it" if op == "solve" else ""
    elif backend == "triton":
        reason = _no_triton(kernel, X, precision)
    elif backend == "keops":
        reason = reductions.missing(kernel, X)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {backend!r} cannot serve {op}: {reason}; use backend='torch' or 'auto' to compute without it"
        )
    return backend, "asked for"


def _no_triton(kernel: Radial, X: torch.Tensor, precision: str) -> str | None:
    """Why Triton cannot serve a call, and what to change; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux, CUDA)"
    if X.dtype != torch.float32:
        return f"it computes in float32 and X is {X.dtype}; convert with X.float()"
    if not interpreted():
        if X.device.type != "cuda":
            return f"X is on {X.device} and it runs on CUDA; move the tensors with .cuda()"
        if torch.cuda.get_device_capability(X.device) < (8, 0):
            return f"{torch.cuda.get_device_name(X.device)} is older than compute capability 8.0; use a newer GPU"
    if precision == "high" and "bf16x3" not in _input_precisions():
        return (
            "its Triton has no bf16x3 products, which precision='high' means; use another precision or a newer triton"
        )
    from .triton_backend.profile import kind

    return None if kind(kernel) else f"{type(kernel).__name__} has no device profile; add one to radial_triton.py"


def _input_precisions() -> tuple[str, ...]:
    """What the installed Triton's products can do with float32 factors."""
    if interpreted():
        from triton.runtime.interpreter import InterpreterOptions as Options
    else:
        from triton.backends.nvidia.compiler import CUDAOptions as Options
    return Options().allowed_dot_input_precisions


def triton_fills(dtype: torch.dtype) -> bool:
    """Whether the installed Triton can make a kernel matrix of that dtype: float64 products came with Triton 3.5."""
    if dtype == torch.float32:
        return True
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)


def describe_precision(precision: str, X: torch.Tensor, backend: str = "torch") -> str:
    """What a precision means for this tensor, in words."""
    if backend == "triton":
        words = {"highest": "three fp16 products", "high": "three bf16 products", "medium": "TF32"}
        return f"float32, {precision} ({words[precision]})"
    if X.dtype == torch.float64:
        return "float64 (float64 tensors always compute in float64)"
    if precision == "medium" and X.device.type == "cuda" and backend == "torch":
        return "float32, medium (TF32)"
    return "float32, highest" + (
        "" if precision == "highest" else f" ({precision!r} asked for: at least that accurate)"
    )
