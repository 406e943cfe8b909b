"""Torch backend: the two formulas of gradients that fit into memory in one piece; blocks have ``gradients``, ``agop``.

Both are products in the dtype of their points, in as few steps as that takes: they are most of a small fit's work.
"""

from __future__ import annotations

import torch

from ..gemm import matmul_nt, symmetrise_

_ROWS = 256  # of a block of weights that are made wider


def differences_product(W: torch.Tensor, alpha: torch.Tensor, X: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """sum_j W_ij alpha_jc (x_j - z_i), (m, K, d), as W (alpha_c o X) - s_c o Z with s = W alpha, in X's dtype.

    The points lie around zero: what differences of near pairs lose grows with |x|. W (m, n) may be of a narrower dtype.
    """
    (n, d), K = X.shape, alpha.shape[1]
    right = torch.cat([(alpha[:, :, None] * X[:, None]).reshape(n, K * d), alpha], 1)  # s comes along
    if W.dtype == right.dtype:
        found = matmul_nt(W, right.T)
    else:
        found = torch.cat([torch.mm(part.to(right.dtype), right) for part in W.split(_ROWS)])
    del right
    G, s = found[:, : K * d].view(-1, K, d), found[:, K * d :]
    return torch.addcmul(G, s[:, :, None], Z[:, None], value=-1.0)


def outer_products(
    G: torch.Tensor, center: bool, weights: torch.Tensor | None = None, diagonal: bool = False
) -> torch.Tensor:
    """sum_i w_i sum_c g_ic g_ic^T (d, d), or its diagonal (d,), float64, of gradients G (m, K, d), which are changed.

    center: subtract the (weighted) mean gradient of each output; weights: w, of G's dtype, default 1.
    """
    if center:
        G -= G.mean(0) if weights is None else torch.tensordot(weights / weights.sum(), G, 1)
    if weights is not None:
        G *= weights.sqrt()[:, None, None]
    flat = G.view(-1, G.shape[2])
    if diagonal:
        return flat.square_().sum(0, dtype=torch.float64)
    return symmetrise_(matmul_nt(flat.T, flat.T).double())
