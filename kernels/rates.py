"""How fast each AGOP form runs: what the choice between them, and ``explain``, go by."""

from __future__ import annotations

import torch

from .calibration import measured

# Floating-point operations per second by form and products. Only ratios decide. The CPU's were measured by
# `python -m bench calibrate` (bench/results/rates_cpu.json: n = 4000, d = 784, K = 10, two cores of an AMD EPYC);
# CUDA's are the vendors' figures for library products and compiled estimates for ours, by compute capability: nothing
# was measured on a GPU yet.
_CPU = {
    "gradient float32": 3.8e11,
    "gram float32": 3.2e11,
    "gradient float64": 8.7e10,
    "gram float64": 8.9e10,
}
_CUDA = {
    8: {"float32": 19e12, "float64": 19e12, "fp16x3": 90e12, "bf16x3": 50e12, "tf32": 120e12},
    9: {"float32": 60e12, "float64": 60e12, "fp16x3": 220e12, "bf16x3": 160e12, "tf32": 400e12},
}
# Seconds of what every pair of points costs beside products of matrices (distance, profile), from the same runs; and
# KeOps' operations per second, from bench/results/keops_cpu.json. CUDA's are estimates from memory bandwidth.
_PAIR = {"cpu float32": 3.5e-9, "cpu float64": 6.5e-9, "cuda float32": 3e-11, "cuda float64": 6e-11}
_KEOPS = {"cpu": 6e9, "cuda": 1e12}


def rate(form: str, products: str, device: torch.device) -> float:
    """Floating-point operations per second of "gradient" or "gram" with products such as "float32" or "fp16x3"."""
    key = f"{form} {products}"
    if key in (own := measured(device).rates):
        return own[key]
    if device.type != "cuda":
        return _CPU.get(key, _CPU["gradient float32"])
    return _CUDA[9 if torch.cuda.get_device_capability(device) >= (9, 0) else 8][products]


def seconds(
    flops: float, pairs: float, device: torch.device, form: str, products: str, backend: str = "torch"
) -> float:
    """Estimated time of so many operations with products of a kind, on so many pairs of points."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    if backend == "keops":
        return flops / _KEOPS[kind]
    dtype = "float64" if products == "float64" else "float32"
    return flops / rate(form, products, device) + pairs * _PAIR[f"{kind} {dtype}"]


def source(device: torch.device) -> str:
    """Where the rates come from, in words."""
    own = measured(device)
    if own.rates:
        return f"rates measured on this device, {own.about.get('date', 'undated')}"
    return "default rates; `python -m bench calibrate` measures this device's"
