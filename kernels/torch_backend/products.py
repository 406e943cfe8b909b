"""Torch backend: the two formulas of gradients that fit into memory in one piece; blocks have ``gradients``, ``agop``.

Both are products in the dtype of their points, in as few steps as that takes: they are most of a small fit's work.
"""

from __future__ import annotations

import torch

from ..gemm import matmul_nt, symmetrise_

_ROWS = 256  # of a block of weights that are made wider
# Products of large matrices with few columns take up to a third longer where these are not a multiple of so many (MKL).
_COLUMNS = 8
# Terms of a sum that is made at a time where ``short``: the roundings of a sum grow with what it has come to. Sums of
# 2000 terms lose 1e-5 of an AGOP where these lose 4e-6, and take 3 ms where these take 4 (2000 points, d = 100; in
# float64 10).
_TERMS = 256


def differences_product(W: torch.Tensor, alpha: torch.Tensor, X: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """sum_j W_ij alpha_jc (x_j - z_i), (m, K, d), as W (alpha_c o X) - s_c o Z with s = W alpha, in X's dtype.

    The points lie around zero: what differences of near pairs lose grows with |x|. W (m, n) may be of a narrower dtype.
    """
    return _differences(W, alpha, X, Z, None)[0]


def differences_and_losses(
    W: torch.Tensor, alpha: torch.Tensor, X: torch.Tensor, Z: torch.Tensor, short: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``differences_product``, and what of it a rounding may cost at each row of Z, in units of eps: (m,).

    These are sum_j W_ij a_j (|x_j| + |z_i|) with a_j the largest |alpha_jc|: two more columns of the same product.
    ``short``: sums are sums of those of ``_TERMS`` terms, which keeps more digits.
    """
    sizes, largest = torch.linalg.vector_norm(X, dim=1), alpha.abs().amax(1)
    G, sums = _differences(W, alpha, X, Z, torch.stack([largest * sizes, largest], 1), short)
    return G, sums[:, 0] + torch.linalg.vector_norm(Z, dim=1) * sums[:, 1]


def differences_at_few(W: torch.Tensor, alpha: torch.Tensor, X: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """``differences_product`` for fewer rows than features: W is weighted for every output, which takes less memory."""
    sums = torch.stack([torch.mm(W * weights, X) for weights in alpha.T], 1)
    return torch.addcmul(sums, (W @ alpha).unsqueeze(2), Z.unsqueeze(1), value=-1.0)


def _differences(W, alpha, X, Z, beside: torch.Tensor | None, short: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(the differences' product, W times the columns beside it)."""
    (n, d), K = X.shape, alpha.shape[1]
    more = 0 if beside is None else beside.shape[1]
    used = K * (d + 1) + more
    right = alpha.new_empty(n, used + -used % _COLUMNS)
    torch.mul(alpha.unsqueeze(2), X.unsqueeze(1), out=right[:, : K * d].unflatten(1, (K, d)))
    right[:, K * d : used - more] = alpha  # s comes along
    if beside is not None:
        right[:, used - more : used] = beside
    right[:, used:] = 0.0
    if W.dtype == right.dtype:
        found = _product(W, right, _TERMS if short else n)
    else:
        found = right.new_empty(len(W), right.shape[1])
        for part, out in zip(W.split(_ROWS), found.split(_ROWS), strict=True):
            torch.mm(part.to(right.dtype), right, out=out)
    del right
    G, s = found[:, : K * d].view(-1, K, d), found[:, K * d : K * (d + 1)]
    return torch.addcmul(G, s.unsqueeze(2), Z.unsqueeze(1), value=-1.0), found[:, K * (d + 1) :]


def _product(W: torch.Tensor, right: torch.Tensor, terms: int) -> torch.Tensor:
    """W right (m, columns), as the sum of products of so many terms."""
    found = matmul_nt(W[:, :terms], right[:terms].T)
    for start in range(terms, len(right), terms):
        some = slice(start, start + terms)
        found += matmul_nt(W[:, some], right[some].T)
    return found


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
    columns = G.view(-1, G.shape[2]).T
    if diagonal:
        return columns.square_().sum(1, dtype=torch.float64)
    return symmetrise_(matmul_nt(columns, columns).double())
