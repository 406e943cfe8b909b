"""Gradients of kernels of the l1 distance on CUDA: sums of signs of differences, which no product of matrices makes."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import along, origin


@triton.jit
def _l1_gradient_kernel(
    W, A, Z, X, G, b, n, d, K, stride_w, stride_z, stride_x, stride_g, stride_gc, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """G[i, c] = sum_j W_ij A_jc sign(x_j - z_i) for one tile of rows and features and one output c; sign(0) = 0."""
    program, c = tl.program_id(0) // K, tl.program_id(0) % K
    row, col = program // tl.cdiv(d, BN) * BM, program % tl.cdiv(d, BN) * BN
    i, f = tl.arange(0, BM), tl.arange(0, BN)
    inside = (row + i < b)[:, None] & (col + f < d)[None, :]
    z = tl.load(origin(Z, row, stride_z) + col + along(i, stride_z)[:, None] + f[None, :], mask=inside, other=0.0)
    w_at, x_at = origin(W, row, stride_w) + along(i, stride_w), X + col + f
    acc = tl.zeros((BM, BN), tl.float32)
    for j in range(0, n):
        w = tl.load(w_at + j, mask=row + i < b, other=0.0) * tl.load(origin(A, j, K) + c)
        apart = tl.load(origin(x_at, j, stride_x), mask=col + f < d, other=0.0)[None, :] - z
        acc += w[:, None] * ((apart > 0.0).to(tl.float32) - (apart < 0.0).to(tl.float32))
    out = origin(G, row, stride_g) + along(c, stride_gc) + col
    tl.store(out + along(i, stride_g)[:, None] + f[None, :], acc, mask=inside)
