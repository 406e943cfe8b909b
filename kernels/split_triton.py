"""Operands of the device products: float32 as it is, or split once into two scaled fp16 halves.

A row x is written as e (h + l / 2048) with e a power of two just above the row's largest entry, h and l in fp16. The
product of two such rows takes three fp16 products (h h', h l', l h') and is as accurate as float32: the halves hold
22 bits below the row's largest entry, wherever in the exponent range that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOW = tl.constexpr(1.0 / 2048.0)
_PAD = 64  # columns of the halves are padded with zeros, so that inner loops need no mask and loads stay wide


@dataclass(frozen=True)
class Operand:
    """Rows for a device product: ``high`` and ``low`` (n, d padded) and ``scale`` (n,), or float32 rows thrice."""

    high: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    split: bool


def operand(X: torch.Tensor, split: bool) -> Operand:
    """X (n, d) float32 as an operand."""
    if not split:
        return Operand(X, X, X, False)
    n, d = X.shape
    largest = X.abs().amax(1) if d else X.new_zeros(n)
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent
    scaled = torch.ldexp(X, -exponent[:, None])
    high, low = (X.new_zeros(n, -(-max(d, 1) // _PAD) * _PAD, dtype=torch.float16) for _ in range(2))
    high[:, :d] = scaled
    low[:, :d] = (scaled - high[:, :d].float()).mul_(2048.0)
    return Operand(high, low, torch.ldexp(torch.ones_like(largest), exponent), True)


@triton.jit
def origin(pointer, row, stride):
    """Pointer to a row. This product is the one that passes 2^31 at 46,341 rows; offsets inside a tile never do."""
    return pointer + tl.cast(row, tl.int64) * stride


@triton.jit
def inner_products(
    A, AL, B, BL, row, col, m, n, d, stride_a, stride_b,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc[i, j] = sum_k A[row + i, k] B[col + j, k] in float32; the caller applies the scales of split operands."""
    acc = tl.zeros((BM, BN), tl.float32)
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a_at, b_at = i[:, None] * stride_a + k[None, :], j[None, :] * stride_b + k[:, None]
    a_in, b_in = (row + i < m)[:, None], (col + j < n)[None, :]
    A, AL, B, BL = (
        origin(A, row, stride_a),
        origin(AL, row, stride_a),
        origin(B, col, stride_b),
        origin(BL, col, stride_b),
    )
    for start in range(0, d, BK):
        if PREC == "fp16x3":  # padded with zeros: no tail
            a = tl.load(A + start + a_at, mask=a_in, other=0.0)
            b = tl.load(B + start + b_at, mask=b_in, other=0.0)
            cross = tl.dot(tl.load(AL + start + a_at, mask=a_in, other=0.0), b)
            cross = tl.dot(a, tl.load(BL + start + b_at, mask=b_in, other=0.0), cross)
            acc += tl.dot(a, b) + cross * LOW
        else:
            a = tl.load(A + start + a_at, mask=a_in & (start + k < d)[None, :], other=0.0)
            b = tl.load(B + start + b_at, mask=b_in & (start + k < d)[:, None], other=0.0)
            acc += tl.dot(a, b, input_precision=PREC)
    return acc
