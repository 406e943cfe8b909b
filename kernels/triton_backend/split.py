"""Operands of the device products: float32 as it is, or split once into two scaled fp16 halves.

A row x is written as e (h + l / 2048) with e the power of two at its largest entry, h and l in fp16. The product of
two such rows takes three fp16 products (h h', h l', l h') and is as accurate as float32: the halves hold 22 bits
below the row's largest entry, wherever in the exponent range that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .tiles import along, origin

LOW = tl.constexpr(1.0 / 2048.0)
_PAD = 64  # columns of the halves are padded with zeros, so that inner loops need no mask and loads stay wide
_COLUMNS = 1024  # of a row that one step of the split holds


@dataclass(frozen=True)
class Operand:
    """Rows for a device product: ``high`` and ``low`` (n, d padded) and ``scale`` (n,), or three times the rows."""

    high: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    split: bool


def operand(X: torch.Tensor, split: bool, weights: torch.Tensor | None = None) -> Operand:
    """X (n, d), rows contiguous, as an operand; a split one takes the bytes of one more float32 copy and no other.

    With weights (K, d), rows contiguous, its rows are weights_c o x_i, (K n, d), which are never in memory as float32.
    """
    if not split:
        return Operand(X, X, X, False)
    (rows, d), w = X.shape, X if weights is None else weights
    n, width = rows if weights is None else rows * len(weights), padded(d)
    high, low = (torch.empty(n, width, dtype=torch.float16, device=X.device) for _ in range(2))
    scale = X.new_empty(n)
    if n:
        _split_kernel[(n,)](
            X, w, high, low, scale, d, width, rows, X.stride(0), w.stride(0), WEIGHTED=weights is not None,
            BLOCK=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return Operand(high, low, scale, True)


def padded(d: int) -> int:
    """Columns of the halves of d columns."""
    return -(-max(d, 1) // _PAD) * _PAD


@triton.jit
def power_of_two(largest):
    """The power of two at or below a float32 >= 0, and its inverse, exactly: by their exponent bits.

    Kept within 2^-126 and 2^125, where both are normal numbers; zero and the subnormals get 2^-126.
    """
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 0x00800000), 0x7E000000)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """The fp16 halves (h, l) of float32 values below 4: x = h + l / 2048 to 22 bits."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def _items(X, weights, at, d, WEIGHTED: tl.constexpr):
    """Items of a row, times their weights."""
    x = tl.load(X + at, mask=at < d, other=0.0)
    if WEIGHTED:
        x *= tl.load(weights + at, mask=at < d, other=0.0)
    return x


@triton.jit
def _split_kernel(
    X, weights, high, low, scale, d, width, rows, stride_x, stride_w, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """One row into its halves, zeros behind its end; with WEIGHTED all rows of X times each row of weights."""
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    X, weights = origin(X, row % rows, stride_x), origin(weights, row // rows, stride_w)
    high, low = origin(high, row, width), origin(low, row, width)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        largest = tl.maximum(largest, tl.abs(_items(X, weights, start + j, d, WEIGHTED)))
    power, inverse = power_of_two(tl.max(largest, 0))
    tl.store(scale + row, power)
    for start in range(0, width, BLOCK):
        h, l = halves(_items(X, weights, start + j, d, WEIGHTED) * inverse)
        tl.store(high + start + j, h, mask=start + j < width)
        tl.store(low + start + j, l, mask=start + j < width)


@triton.jit
def inner_products(
    A, AL, B, BL, row, col, m, n, d, stride_a, stride_b,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc[i, j] = sum_k A[row + i, k] B[col + j, k], float64 for PREC "fp64" and else float32.

    The caller applies the scales of split operands. Tensor cores are reported to cut off what they add up: products of
    the high halves are added outside them; those with a low half are 2048 times smaller, and may be one chain.
    """
    DTYPE: tl.constexpr = tl.float64 if PREC == "fp64" else tl.float32
    acc, cross = tl.zeros((BM, BN), DTYPE), tl.zeros((BM, BN), DTYPE)
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a_at, b_at = along(i, stride_a)[:, None] + k[None, :], along(j, stride_b)[None, :] + k[:, None]
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
            cross = tl.dot(tl.load(AL + start + a_at, mask=a_in, other=0.0), b, cross)
            cross = tl.dot(a, tl.load(BL + start + b_at, mask=b_in, other=0.0), cross)
            acc += tl.dot(a, b)
        else:
            a = tl.load(A + start + a_at, mask=a_in & (start + k < d)[None, :], other=0.0)
            b = tl.load(B + start + b_at, mask=b_in & (start + k < d)[:, None], other=0.0)
            if PREC == "fp64":
                acc += tl.dot(a, b, out_dtype=tl.float64)
            else:
                acc += tl.dot(a, b, input_precision=PREC)
    return acc + cross * LOW if PREC == "fp16x3" else acc
