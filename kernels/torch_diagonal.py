"""Torch backend: the diagonal of the AGOP, sum_ic g_ic[k]^2, without any d x d matrix.

Gradients are made block by block, a few outputs at a time, as in the AGOP's gradient form: 2 m n K d products, and
O(n K + K d + block) memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._plan import block_rows
from .radial import Radial
from .torch_agop import mean_gradient
from .torch_blocks import BLOCKS_ALIVE, dominant_offset, output_gradients, tiles

_COLUMNS = 2**16  # entries of one point's gradients that are made at once


def outputs_at_once(K: int, d: int) -> int:
    """Outputs whose gradients are made together."""
    return max(1, min(K, _COLUMNS // max(1, d)))


def plan_rows(X: torch.Tensor, K: int, limit: int) -> tuple[int, int]:
    """(rows of a block, peak bytes), or MemoryError."""
    (n, d), size = X.shape, X.element_size()
    fixed = 8 * d + (n + 2 * d) * K * size
    row = ((BLOCKS_ALIVE + 1) * n + 3 * outputs_at_once(K, d) * d) * size
    rows = block_rows(row, fixed, limit, n, "agop, its diagonal,")
    return rows, fixed + rows * row


def agop_diagonal(
    kernel: Radial,
    X: torch.Tensor,
    alpha: torch.Tensor,
    rows: int,
    *,
    center: bool = False,
    roots: torch.Tensor | None = None,
    W: torch.Tensor | None = None,
    span: tuple[int, int] | None = None,
    total: Callable = lambda value: value,
) -> torch.Tensor:
    """Diagonal of the AGOP at X, summed over points and outputs: (d,), float64.

    Args:
        kernel: of the predictor. X: points (n, d). alpha: coefficients (n, K), of X's dtype. rows: of a block.
        center: subtract the mean gradient of each output. roots: square roots of the points' weights (n,).
        W: the weights w(||x_i - x_j||) where they are stored (n, n), zero diagonal; default made block by block.
        span: first and last row that this process takes; ``total`` then adds values over the processes.
    """
    first, last = span or (0, len(X))
    Z = X if span is None else X[first:last]
    alpha, shift = alpha.contiguous(), dominant_offset(X)
    out = X.new_zeros(X.shape[1], dtype=torch.float64)
    roots = None if roots is None else roots[first:last].to(X.dtype)

    def blocks():
        if W is None:
            pairs = ((row, kernel.weight_(block)) for row, block in tiles(X, Z, rows))
        else:
            pairs = ((slice(i, min(len(W), i + rows)), W[i : i + rows].to(X.dtype)) for i in range(0, len(W), rows))
        for row, block in pairs:
            yield row, block if roots is None else block * roots[row, None]

    mean = None
    if center:
        count = float(len(Z)) if roots is None else float(roots.double() @ roots.double())
        mean = mean_gradient(blocks(), alpha, X, Z, shift, roots).double() if count else out.new_zeros(alpha.shape[1], 1)
        mean = (total(mean * count) / float(total(out.new_full((1,), count)))).to(X.dtype)
    step = outputs_at_once(*alpha.T.shape[:1], X.shape[1])
    for row, block in blocks():
        for start in range(0, alpha.shape[1], step):
            some = slice(start, start + step)
            buffer = X.new_empty(len(block), len(alpha[0, some]), X.shape[1])
            G = output_gradients(block, alpha[:, some], X, Z[row], shift, buffer)
            if mean is not None:
                G -= mean[some] if roots is None else roots[row, None, None] * mean[some]
            out += G.square_().sum((0, 1), dtype=torch.float64)
    return total(out)
