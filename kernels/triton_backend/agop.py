"""AGOP on CUDA: the output gradients of a row block, and the block rows of the gram form's S."""

from __future__ import annotations

import triton
import triton.language as tl

from .split import LOW, along, halves, inner_products, origin, power_of_two


@triton.jit
def _gradient_kernel(
    W, At, S, XA, XL, x_scale, Z, G, b, n, d, K, stride_w, stride_x, stride_z, stride_g, stride_gc,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """G[i, c] = sum_j W_ij A_jc x_j - s_ic z_i for one tile of rows and features and one output c.

    alpha is applied in the operand tile, which is then scaled row by row and split, so neither an (n, K d) right-hand
    side nor a weighted copy of W is ever in memory.
    """
    row, col, c = tl.program_id(0) * BM, tl.program_id(1) * BN, tl.program_id(2)
    i, k, f = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    row_in, col_in = row + i < b, col + f < d
    W, Z, G = origin(W, row, stride_w), origin(Z, row, stride_z) + col, origin(G, row, stride_g) + col + along(c, stride_gc)
    At = origin(At, c, n)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, n, BK):
        j = start + k
        j_in = j < n
        weight = tl.load(At + j, mask=j_in, other=0.0)
        x_at = along(k, stride_x)[:, None] + f[None, :]
        x_in = j_in[:, None] & col_in[None, :]
        x = tl.load(origin(XA, start, stride_x) + col + x_at, mask=x_in, other=0.0)
        w = tl.load(W + start + along(i, stride_w)[:, None] + k[None, :], mask=row_in[:, None] & j_in[None, :], other=0.0)
        if PREC == "fp16x3":
            w = w * (weight * tl.load(x_scale + j, mask=j_in, other=0.0))[None, :]
            power, inverse = power_of_two(tl.max(tl.abs(w), 1))
            high, low = halves(w * inverse[:, None])
            cross = tl.dot(low, x)
            cross = tl.dot(high, tl.load(origin(XL, start, stride_x) + col + x_at, mask=x_in, other=0.0), cross)
            acc += (tl.dot(high, x) + cross * LOW) * power[:, None]
        else:
            acc += tl.dot(w * weight[None, :], x, input_precision=PREC)
    inside = row_in[:, None] & col_in[None, :]
    s = tl.load(S + along(row + i, K) + c, mask=row_in, other=0.0)
    acc -= s[:, None] * tl.load(Z + along(i, stride_z)[:, None] + f[None, :], mask=inside, other=0.0)
    tl.store(G + along(i, stride_g)[:, None] + f[None, :], acc, mask=inside)


@triton.jit
def _gram_kernel(
    W, WA, WL, w_scale, A, S, weight, out, first, stop, n, K, stride_w, stride_wa, stride_out,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Lower tiles of S = (A A^T) o (W W) - W o (s A^T + A s^T) + diag, rows first..stop, diagonal halved.

    Columns right of the diagonal are written as zero, so that M = X_rows^T S X + its transpose.
    """
    row, col = first + tl.program_id(0) * BM, tl.program_id(1) * BN
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    rows, cols = row + i, col + j
    row_in, col_in = rows < stop, cols < stop
    mask = row_in[:, None] & col_in[None, :]
    out = origin(out, row - first, stride_out) + col + along(i, stride_out)[:, None] + j[None, :]
    if col > row + BM - 1:
        tl.store(out, tl.zeros((BM, BN), tl.float32), mask=mask)
        return
    acc = inner_products(WA, WL, WA, WL, row, col, stop, stop, n, stride_wa, stride_wa, PREC, BM, BN, BK)
    if PREC == "fp16x3":
        acc *= tl.load(w_scale + rows, mask=row_in, other=0.0)[:, None]
        acc *= tl.load(w_scale + cols, mask=col_in, other=0.0)[None, :]
    w = tl.load(origin(W, row, stride_w) + col + along(i, stride_w)[:, None] + j[None, :], mask=mask, other=0.0)
    outer = tl.zeros((BM, BN), tl.float32)
    for c in range(0, K):
        outer += (
            tl.load(A + along(rows, K) + c, mask=row_in, other=0.0)[:, None]
            * tl.load(A + along(cols, K) + c, mask=col_in, other=0.0)[None, :]
        )
    value = acc * outer
    for c in range(0, K):
        a_row, s_row = (
            tl.load(A + along(rows, K) + c, mask=row_in, other=0.0),
            tl.load(S + along(rows, K) + c, mask=row_in, other=0.0),
        )
        a_col, s_col = (
            tl.load(A + along(cols, K) + c, mask=col_in, other=0.0),
            tl.load(S + along(cols, K) + c, mask=col_in, other=0.0),
        )
        value -= w * (s_row[:, None] * a_col[None, :] + a_row[:, None] * s_col[None, :])
    symmetric = rows[:, None] == cols[None, :]
    value = tl.where(symmetric, 0.5 * (value + tl.load(weight + rows, mask=row_in, other=0.0)[:, None]), value)
    tl.store(out, tl.where(rows[:, None] >= cols[None, :], value, 0.0), mask=mask)
