"""Seconds of steps that no operator plans, and tensors that stand for data which are not there yet."""

from __future__ import annotations

import torch

from fastagop.kernels import calibration
from fastagop.kernels.plan import available_bytes, format_bytes
from fastagop.kernels.precision import dtype_name


def of_eigh(d: int, device: torch.device) -> float:
    """A float64 eigendecomposition (d, d)."""
    return calibration.seconds(9.0 * d**3, 0.0, device, "gram", "float64")


def of_products(flops: float, X: torch.Tensor) -> float:
    """Products of matrices in X's dtype."""
    return calibration.seconds(flops, 0.0, X.device, "gram", dtype_name(X.dtype))


def default_device() -> torch.device:
    """What "auto" means: CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_meta(value) -> bool:
    """Whether a value is a tensor that holds no numbers."""
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def stand_in(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape and dtype that takes no memory: one item, repeated."""
    return torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)


def assumption(device: torch.device) -> str:
    """What is assumed of tensors on meta."""
    return f"tensors on meta are planned for {device}, where {format_bytes(available_bytes(device))} are free now"
