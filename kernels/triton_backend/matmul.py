"""Kernel product on CUDA: tiles of the kernel matrix live in registers and are used up at once."""

from __future__ import annotations

import triton
import triton.language as tl

from .matrix import measured
from .tiles import along, origin


@triton.jit
def _matmul_kernel(
    Z, X, ZA, ZL, XA, XL, z_scale, x_scale, z2, x2, V, out, m, n, d, p,
    stride_z, stride_x, stride_za, stride_xa, stride_v, stride_out, near, constants_at,
    PROFILE: tl.constexpr, OF: tl.constexpr, SELF: tl.constexpr, PREC: tl.constexpr, SECOND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Rows of k(Z, X) V: one row tile, all column tiles."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BP
    i, j, c = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BP)
    acc = tl.zeros((BM, BP), tl.float32)
    for col in range(0, n, BN):
        found = measured(
            Z, X, ZA, ZL, XA, XL, z_scale, x_scale, z2, x2, row, col, m, n, d, stride_z, stride_x, stride_za, stride_xa,
            near, 0, OF, SELF, PREC, BM, BN, BK,
        )  # fmt: skip
        v_in = (col + j < n)[:, None] & (column + c < p)[None, :]
        v = tl.load(
            origin(V, col, stride_v) + along(j, stride_v)[:, None] + column + c[None, :],
            mask=v_in,
            other=0.0,
        )
        acc += tl.dot(PROFILE(found, constants_at, False), v, input_precision=SECOND)
    mask = (row + i < m)[:, None] & (column + c < p)[None, :]
    tl.store(origin(out, row, stride_out) + along(i, stride_out)[:, None] + column + c[None, :], acc, mask=mask)
