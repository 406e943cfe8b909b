"""Triton backend: k(X, Z) V from stored row blocks of k(X, Z), each multiplied by the library's product.

The fused product makes one tile of k(X, Z) after the other in the registers of few rows, which leaves the tensor cores
waiting; the matrix kernel does not, and what it costs to store a block and read it again is less from some hundred
features on.
"""

from __future__ import annotations

import torch

from .. import calibration
from ..scaling import Points

# Share of the matrix kernel's rate that the fused product reaches, and bytes of a block a second that are written and
# read again: estimates from compiled code (95 ms and 40 ms on an H200, n = 50,000, d = 1024).
_FUSED = 0.25
_BYTES = 1e12


def seconds(n: int, m: int, d: int, p: int, products: str, device: torch.device) -> tuple[float, float]:
    """Estimated times of the fused product and of the stored one."""
    pairs, rate = float(n) * m, calibration.rate("gradient", products, device)
    fused = 2.0 * pairs * (d + p) / (_FUSED * rate)
    stored = 2.0 * pairs * d / rate + 2.0 * 4 * pairs / _BYTES
    return fused, stored + 2.0 * pairs * p / calibration.rate("gradient", "float32", device)


def kernel_matmul(at: Points, V: torch.Tensor, precision: str, rows: int) -> torch.Tensor:
    """k(X, Z) V, shape (n, p), from blocks of that many rows; where Z is X the part below the diagonal serves twice."""
    from .launch import DevicePoints, fill  # imports triton
    from .launch_config import PRODUCTS

    kernel, X, Z, _ = at
    symmetric, (n, m) = Z is X, (len(X), len(Z))
    x = DevicePoints(X, PRODUCTS[precision])
    z = x if symmetric else DevicePoints(Z, x.prec)
    out, buffer = X.new_zeros(n, V.shape[1]), X.new_empty(min(rows, n), m)
    if not out.numel() or not m:
        return out
    for start in range(0, n, rows):
        row = slice(start, min(n, start + rows))
        columns = row.stop if symmetric else m
        block = buffer[: row.stop - start, :columns]
        first = start if symmetric else None
        fill(kernel, x.part(row), z.part(slice(0, columns)), block, weight=False, first=first)
        out[row].addmm_(block, V[:columns])
        if symmetric and start:
            out[:start].addmm_(block[:, :start].T, V[row])
    return out
