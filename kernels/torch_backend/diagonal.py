"""Torch backend: the diagonal of the AGOP, sum_ic w_i g_ic[k]^2, without any d x d matrix.

Gradients are made block by block, as in the AGOP's gradient form, for a few outputs at a time: 2 n^2 K d products, and
O(n K + d + block) memory. Those that fit into memory in one piece have ``products.outer_products``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..plan import RAISE_LIMIT, ROWS, block_rows
from ..profile import Profile
from .agop import Means
from .distance import dominant_offset
from .gradients import LEAST_ROWS, block_gradients, columns_at_once, products_at_once
from .tiles import BLOCKS_ALIVE, weight_tiles

_COLUMNS = 2**16  # entries of one point's gradients that are made at once


def outputs_at_once(K: int, d: int) -> int:
    """Outputs whose gradients are made together."""
    return max(1, min(K, _COLUMNS // max(1, d)))


def plan_rows(X: torch.Tensor, K: int, limit: int) -> tuple[int, int]:
    """(rows of a block, peak bytes), or MemoryError."""
    (n, d), size = X.shape, X.element_size()
    some = outputs_at_once(K, d)
    fixed = 8 * d * (1 + 3 * some) + n * (K + d) * size
    factor = n * -(-columns_at_once(min(ROWS, n), d, some, X.device) // LEAST_ROWS)  # as if it grew with the rows
    row = ((BLOCKS_ALIVE + 1) * n + factor + 3 * some * d) * size
    rows = block_rows(row, fixed, limit, n, "agop, its diagonal,", RAISE_LIMIT)
    return rows, fixed + rows * row


def agop_diagonal(
    kernel: Profile,
    X: torch.Tensor,
    alpha: torch.Tensor,
    rows: int,
    *,
    center: bool = False,
    roots: torch.Tensor | None = None,
    span: tuple[int, int] | None = None,
    total: Callable = lambda value: value,
    rounded: bool = False,
) -> torch.Tensor:
    """Diagonal of the AGOP at X, summed over points and outputs: (d,), float64.

    Args:
        kernel: of the predictor.
        X: points (n, d).
        alpha: coefficients (n, K), of X's dtype.
        rows: of a block.
        center: subtract the mean gradient of each output.
        roots: square roots of the points' weights (n,).
        span: first and last row that this process takes; ``total`` then adds a tensor over the processes.
        rounded: as of ``plan.AgopTask``.
    """
    shift, d = dominant_offset(X), X.shape[1]
    out = X.new_zeros(d, dtype=torch.float64)
    first, last = span or (0, len(X))
    Z = X if span is None else X[first:last]
    roots = None if roots is None else roots[first:last].to(X.dtype)
    step = outputs_at_once(alpha.shape[1], d)
    for some in alpha.split(step, dim=1) if alpha.shape[1] else ():
        coefficients, means = some.contiguous(), Means(some.shape[1] * d, X) if center else None
        products = products_at_once(coefficients, X, shift, min(rows, len(Z)))
        for row, W, near in weight_tiles(kernel, X, Z, rows, shift, rounded):
            if roots is not None:
                W.mul_(roots[row, None])
            buffer = X.new_empty(len(W), some.shape[1], d)
            G = block_gradients(W, near, coefficients, X, Z[row], shift, buffer, products)
            if means is not None:
                apart = means.centre_(G.view(len(G), -1), None if roots is None else roots[row])
                out += apart.view(-1, d).square_().sum(0)
            out += G.square_().sum((0, 1), dtype=torch.float64)
        if means is not None and span is not None:  # by what this process's mean differs from that of all
            weight, everyone = means.weight, total(means.weight.reshape(1))
            apart = means.mean - total(means.mean * weight) / everyone
            out += weight * apart.view(-1, d).square().sum(0)
    return total(out)
