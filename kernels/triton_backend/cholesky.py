"""Column-block update of an in-place Cholesky on CUDA, at the precision asked for."""

from __future__ import annotations

import triton
import triton.language as tl

from .split import inner_products
from .tiles import along, origin, tile_of


@triton.jit
def _update_kernel(
    A, first, stop, n, stride,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of A[first:, first:stop] -= L[first:, :first] L[first:stop, :first]^T, on and below the diagonal.

    L's finished columns lie left of ``first`` in A itself; what is above the diagonal is neither read nor written.
    """
    row, col = tile_of(tl.program_id(0), tl.cdiv(n - first, BM), tl.cdiv(stop - first, BN), GROUP)
    row, col = first + row * BM, first + col * BN
    if col > row + BM - 1:
        return
    acc = inner_products(A, A, A, A, row, col, n, stop, first, stride, stride, PREC, BM, BN, BK)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    mask = (row + i < n)[:, None] & (col + j < stop)[None, :] & ((row + i)[:, None] >= (col + j)[None, :])
    at = origin(A, row, stride) + col + along(i, stride)[:, None] + j[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) - acc, mask=mask)
