"""Products of a blocked float32 factorisation on CUDA, of factors that were split once: C -= A B^T and A T^T."""

from __future__ import annotations

import triton
import triton.language as tl

from .split import inner_products
from .tiles import along, origin, tile_of


@triton.jit
def _panel_kernel(
    ZA, ZL, XA, XL, z_scale, x_scale, out, m, n, d, stride_za, stride_xa, stride_out, TRIANGLE: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out -= Z X^T; with TRIANGLE of out = Z X^T for a lower triangular X, whose zeros are left out."""
    row, col = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    row, col = row * BM, col * BN
    if TRIANGLE:
        d = tl.cdiv(tl.minimum(d, col + BN), 16) * 16  # a multiple, as d is, keeps the loop's counter short
    acc = inner_products(ZA, ZL, XA, XL, row, col, m, n, d, stride_za, stride_xa, PREC, BM, BN, BK)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    row_in, col_in = row + i < m, col + j < n
    mask = row_in[:, None] & col_in[None, :]
    acc *= tl.load(z_scale + row + i, mask=row_in, other=0.0)[:, None]
    acc *= tl.load(x_scale + col + j, mask=col_in, other=0.0)[None, :]
    at = origin(out, row, stride_out) + col + along(i, stride_out)[:, None] + j[None, :]
    if TRIANGLE:
        tl.store(at, acc, mask=mask)
    else:
        tl.store(at, tl.load(at, mask=mask, other=0.0) - acc, mask=mask)
