"""AGOP on CUDA: the output gradients of a row block, and the block rows of the gram form's S."""

from __future__ import annotations

import triton
import triton.language as tl

from .split import LOW, halves, inner_products, power_of_two
from .tiles import along, origin, tile_of


@triton.jit
def _gradient_kernel(
    W, At, S, XA, XL, x_scale, Z, G, b, n, d, K, n_wide, d_wide, stride_w, stride_x, stride_z, stride_g, stride_gc,
    WIDER: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """G[i, c] = sum_j W_ij A_jc x_j - s_ic z_i for one tile of rows and features and one output c.

    alpha is applied in the operand tile, which is then scaled row by row and split, so neither an (n, K d) right-hand
    side nor a weighted copy of W is ever in memory. The outputs of a tile follow each other, as they read the same.
    Columns of W from n to ``n_wide`` can be read (WIDER: there are some), those of X from d to ``d_wide`` are zero:
    loads stay wide where these are multiples of 16.
    """
    program = tl.program_id(0)
    row, col = tile_of(program // K, tl.cdiv(b, BM), tl.cdiv(d, BN), GROUP)
    row, col, c = row * BM, col * BN, program % K
    i, k, f = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    row_in, col_in = row + i < b, col + f < d
    W, Z, At = origin(W, row, stride_w), origin(Z, row, stride_z) + col, origin(At, c, n)
    G = origin(G, row, stride_g) + along(c, stride_gc) + col
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, n, BK):
        j = start + k
        j_in = j < n
        weight = tl.load(At + j, mask=j_in, other=0.0)
        x_at = along(k, stride_x)[:, None] + f[None, :]
        x_in = j_in[:, None] & (col + f < d_wide)[None, :]
        x = tl.load(origin(XA, start, stride_x) + col + x_at, mask=x_in, other=0.0)
        w_in = row_in[:, None] & (j < n_wide)[None, :]
        w = tl.load(W + start + along(i, stride_w)[:, None] + k[None, :], mask=w_in, other=0.0)
        if WIDER:
            w = tl.where(j_in[None, :], w, 0.0)
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
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Lower tiles of S = (A A^T) o (W W) - W o (s A^T + A s^T) + diag, rows first..stop, diagonal halved.

    Columns right of the diagonal are written as zero, so that M = X_rows^T S X + its transpose.
    """
    row, col = tile_of(tl.program_id(0), tl.cdiv(stop - first, BM), tl.cdiv(stop, BN), GROUP)
    row, col = first + row * BM, col * BN
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
    outer, mixed = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    row_at, col_at = along(rows, K), along(cols, K)
    for c in range(0, K):  # without acc and w, whose layouts differ: they are converted once
        a_row = tl.load(A + row_at + c, mask=row_in, other=0.0)
        a_col = tl.load(A + col_at + c, mask=col_in, other=0.0)
        s_row = tl.load(S + row_at + c, mask=row_in, other=0.0)
        s_col = tl.load(S + col_at + c, mask=col_in, other=0.0)
        outer += a_row[:, None] * a_col[None, :]
        mixed += s_row[:, None] * a_col[None, :] + a_row[:, None] * s_col[None, :]
    w = tl.load(origin(W, row, stride_w) + col + along(i, stride_w)[:, None] + j[None, :], mask=mask, other=0.0)
    value = acc * outer - w * mixed
    symmetric = rows[:, None] == cols[None, :]
    value = tl.where(symmetric, 0.5 * (value + tl.load(weight + rows, mask=row_in, other=0.0)[:, None]), value)
    tl.store(out, tl.where(rows[:, None] >= cols[None, :], value, 0.0), mask=mask)
