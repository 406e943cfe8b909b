"""Triton backend: gradients and the AGOP of kernels that are not radial, from stored blocks of weights, float32.

The gradient of a kernel of the dot product is u = kappa'(x.z) times x: the radial kernels' products without their
second part. That of the l1 kernel has a device kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..memory.matrices import wide_rows
from ..pair_backend.blocks import checked, sum_of_squares
from ..scaling import Points
from .l1_gradient import _l1_gradient_kernel
from .launch import DevicePoints, _current, _grid, _rows, fill, output_gradients, products_of
from .launch_config import config


def gradient_blocks(at: Points, alpha: torch.Tensor, rows: int, precision: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of Z, their gradients (b, K, d)); each is overwritten by the next."""
    kernel, X, Z, _ = at
    x = DevicePoints(X, products_of(kernel, precision))
    z, step = x if Z is X else DevicePoints(Z, x.prec), _step(kernel.measure, x)
    buffer, W = X.new_empty(min(rows, len(Z)), alpha.shape[1], X.shape[1]), wide_rows(min(rows, len(Z)), len(X), X)
    for start in range(0, len(Z), rows):
        row = slice(start, min(len(Z), start + rows))
        block = fill(kernel, z.part(row), x, W[: row.stop - start], weight=True, first=None)
        yield row, step(block, alpha, X, Z[row], buffer[: row.stop - start])


def _step(measure: str, x: DevicePoints) -> Callable[..., torch.Tensor]:
    """(weights of a block, alpha, X, Z of the block, out) -> its gradients."""
    if measure == "l1":
        return _l1_gradients
    products = output_gradients(x)
    return lambda W, alpha, X, Z, out: products(W, alpha, X, Z, None, out, along_z=False)


def _l1_gradients(W, alpha, X, Z, out):
    alpha, Z, X, (b, n), (K, d) = alpha.contiguous(), _rows(Z), _rows(X), W.shape, out.shape[1:]
    c = config("l1 gradient", "fp32", out.device)
    with _current(out):
        _l1_gradient_kernel[_grid(c, b, d, K)](
            W, alpha, Z, X, out, b, n, d, K, W.stride(0), Z.stride(0), X.stride(0), out.stride(0), out.stride(1),
            BM=c.rows, BN=c.columns, **c.launch,
        )  # fmt: skip
    return out


def gradients(at: Points, alpha: torch.Tensor, rows: int, precision: str) -> torch.Tensor:
    """grad f_c(Z[i]), shape (m, K, d)."""
    result = at.X.new_zeros(len(at.Z), alpha.shape[1], at.X.shape[1])
    if result.numel() and len(at.X):
        for row, G in gradient_blocks(at, alpha, rows, precision):
            result[row] = G
    return checked(result, "gradients", result.dtype)


def agop(at: Points, alpha: torch.Tensor, rows: int, precision: str, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum_i w_i sum_c g_ic g_ic^T, float64 (d, d), by the gradient form; w = weights, default 1."""
    K, d = alpha.shape[1], at.X.shape[1]
    blocks = gradient_blocks(at, alpha, rows, precision) if len(at.Z) and K and len(at.X) else iter(())
    return checked(sum_of_squares(blocks, (K, d), at.X, weights=weights), "gradients", at.X.dtype)
