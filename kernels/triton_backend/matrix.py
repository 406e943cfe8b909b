"""Kernel matrix on CUDA: distance, profile and store in the epilogue of one product, near pairs measured in place.

Kernels of the dot product take the product as it is, and those of the l1 distance sum differences feature by feature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .split import inner_products
from .tiles import along, origin, tile_of

STEP = tl.constexpr(4)  # features of near pairs that are loaded at once


@triton.jit
def measured(
    Z, X, ZA, ZL, XA, XL, z_scale, x_scale, z2, x2, row, col, m, n, d, stride_z, stride_x, stride_za, stride_xa, near,
    first, OF: tl.constexpr, SELF: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """What a kernel is a function of, at the pairs of one tile: OF is "sq", "dot" or "l1", as kernels name it.

    Pairs beyond the last point have any number.
    """
    if OF == "dot":
        found = scaled_products(
            ZA, ZL, XA, XL, z_scale, x_scale, row, col, m, n, d, stride_za, stride_xa, PREC, BM, BN, BK
        )
    elif OF == "l1":
        found = absolute_differences(Z, X, row, col, m, n, d, stride_z, stride_x, BM, BN)
    else:
        found = squared_distances(
            Z, X, ZA, ZL, XA, XL, z_scale, x_scale, z2, x2, row, col, m, n, d, stride_z, stride_x, stride_za, stride_xa,
            near, first, SELF, PREC, BM, BN, BK,
        )  # fmt: skip
    return found


@triton.jit
def scaled_products(
    ZA, ZL, XA, XL, z_scale, x_scale, row, col, m, n, d, stride_za, stride_xa,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Z[row + i] . X[col + j] of one tile."""
    acc = inner_products(ZA, ZL, XA, XL, row, col, m, n, d, stride_za, stride_xa, PREC, BM, BN, BK)
    if PREC == "fp16x3":
        rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
        acc *= tl.load(z_scale + rows, mask=rows < m, other=0.0)[:, None]
        acc *= tl.load(x_scale + cols, mask=cols < n, other=0.0)[None, :]
    return acc


@triton.jit
def absolute_differences(
    Z, X, row, col, m, n, d, stride_z, stride_x, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Sum_k |Z[row + i, k] - X[col + j, k]| of one tile; d is a multiple of ``STEP``."""
    rows, cols = tl.minimum(row + tl.arange(0, BM), m - 1), tl.minimum(col + tl.arange(0, BN), n - 1)
    z_at, x_at = Z + along(rows, stride_z), X + along(cols, stride_x)
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, d, STEP):
        for ahead in tl.static_range(STEP):
            total += tl.abs(tl.load(z_at + ahead)[:, None] - tl.load(x_at + ahead)[None, :])
        z_at, x_at = z_at + STEP, x_at + STEP
    return total


@triton.jit
def squared_distances(
    Z, X, ZA, ZL, XA, XL, z_scale, x_scale, z2, x2, row, col, m, n, d, stride_z, stride_x, stride_za, stride_xa, near,
    first, SELF: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """||Z[row + i] - X[col + j]||^2 of one tile; pairs below the near bound by direct differences.

    With SELF, row 0 of Z is row ``first`` of X, and these pairs are zero by index.
    """
    acc = scaled_products(ZA, ZL, XA, XL, z_scale, x_scale, row, col, m, n, d, stride_za, stride_xa, PREC, BM, BN, BK)
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    row_in, col_in = rows < m, cols < n
    # Rows beyond the end have norm infinity, so that they are never near.
    zz, xx = tl.load(z2 + rows, mask=row_in, other=float("inf")), tl.load(x2 + cols, mask=col_in, other=float("inf"))
    sq = zz[:, None] + xx[None, :] - 2.0 * acc
    if SELF:
        sq = tl.where((first + rows)[:, None] == cols[None, :], float("inf"), sq)
    close = sq < near * (zz[:, None] + xx[None, :])
    if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
        direct = tl.zeros((BM, BN), acc.dtype)
        z_at, x_at = Z + along(tl.minimum(rows, m - 1), stride_z), X + along(tl.minimum(cols, n - 1), stride_x)
        whole = d // STEP * STEP
        for _ in range(0, whole, STEP):  # features of a step share its addresses
            for ahead in tl.static_range(STEP):
                z, x = tl.load(z_at + ahead), tl.load(x_at + ahead)
                direct += (z[:, None] - x[None, :]) * (z[:, None] - x[None, :])
            z_at, x_at = z_at + STEP, x_at + STEP
        for _ in range(whole, d):
            z, x = tl.load(z_at), tl.load(x_at)
            direct += (z[:, None] - x[None, :]) * (z[:, None] - x[None, :])
            z_at, x_at = z_at + 1, x_at + 1
        sq = tl.where(sq < near * (zz[:, None] + xx[None, :]), direct, sq)
    if SELF:
        sq = tl.where((first + rows)[:, None] == cols[None, :], 0.0, sq)
    return sq


@triton.jit
def _matrix_kernel(
    Z, X, ZA, ZL, XA, XL, z_scale, x_scale, z2, x2, out, m, n, d, stride_z, stride_x, stride_za, stride_xa, stride_out,
    near, constants_at, diagonal_at, first,
    PROFILE: tl.constexpr, WEIGHT: tl.constexpr, OF: tl.constexpr, SELF: tl.constexpr, LOWER: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of k(z, x) (or of the weights); with LOWER the lower tiles only, each stored to both halves.

    With SELF the pairs of a point with itself get the value at ``diagonal_at``; it and the kernel's constants are on
    the device, since numbers of a launch have float32's digits only.
    """
    row, col = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    row, col = row * BM, col * BN
    if LOWER and col > row + BM - 1:
        return
    found = measured(
        Z, X, ZA, ZL, XA, XL, z_scale, x_scale, z2, x2, row, col, m, n, d, stride_z, stride_x, stride_za, stride_xa,
        near, first, OF, SELF, PREC, BM, BN, BK,
    )  # fmt: skip
    value = PROFILE(found, constants_at, WEIGHT)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    mask = (row + i < m)[:, None] & (col + j < n)[None, :]
    if SELF:
        value = tl.where((first + row + i)[:, None] == (col + j)[None, :], tl.load(diagonal_at), value)
    if LOWER:
        mask = mask & ((row + i)[:, None] >= (col + j)[None, :])
        tl.store(origin(out, col, stride_out) + row + along(j, stride_out)[None, :] + i[:, None], value, mask=mask)
    tl.store(origin(out, row, stride_out) + col + along(i, stride_out)[:, None] + j[None, :], value, mask=mask)
