"""The AGOP of a rotation-invariant kernel in its gram form, in float64: its cost does not depend on the outputs.

With g_ic = sum_j alpha_jc (u_ij x_j + v_ij z_i) and s = v alpha,

    M = X^T ((A A^T) o (U^T U)) X + X^T C Z + Z^T C^T X + Z^T diag(sum_c s_ic^2) Z,    C = U^T o (A s^T).

The terms cancel where gradients are small beside their terms; how much is measured on the way.
"""

from __future__ import annotations

import torch

from ..gemm import symmetrise_
from ..profile import Kernel
from .blocks import checked, computed
from .composite import pairs_of


def gram_bytes(n: int, m: int, d: int, K: int, rows: int, alive: int) -> int:
    """Bytes that ``gram`` takes: U, points and coefficients in float64, and what exists of blocks."""
    blocks = alive * rows * max(n, m)
    return 8 * (m * n + 2 * (n + m) * d + (n + 2 * m) * K + blocks + 2 * rows * d + 3 * d * d)


def gram(
    kernel: Kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor,
    rows: int,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """(sum_i w_i sum_c g_ic g_ic^T in float64 (d, d), the share of it that rounding may have cost)."""
    x, z = computed(kernel, X, Z)
    x, z, a = x.double(), z.double(), alpha.double()
    pairs, n, m = pairs_of(kernel, x, z), len(x), len(z)
    U, s = x.new_empty(m, n), x.new_zeros(m, a.shape[1])
    for start in range(0, m, rows):
        row = slice(start, min(m, start + rows))
        u, v = pairs.combination(row)
        U[row] = u
        if v is not None:
            s[row] = v @ a
    if weights is not None:
        roots = weights.double().sqrt()[:, None]
        U.mul_(roots)
        s.mul_(roots)
    M = (z * s.square().sum(1, keepdim=True)).T @ z
    size, lengths = 0.0, torch.linalg.vector_norm(x, dim=1)
    for start in range(0, n, rows):
        row = slice(start, min(n, start + rows))
        S = (U[:, row].T @ U).mul_(a[row] @ a.T)
        size += float(lengths[row] @ (S.abs() @ lengths))
        M += x[row].T @ (S @ x)
        cross = x[row].T @ ((U[:, row].T * (a[row] @ s.T)) @ z)
        M += cross
        M += cross.T
    checked(M, "gradients", X.dtype)
    trace = float(M.diagonal().sum())
    loss = 1.0 if size > 0.0 else 0.0  # a trace that is not above zero: rounding is all that is left of the terms
    if trace > 0.0:
        loss = torch.finfo(torch.float64).eps * size / trace
    return symmetrise_(M), loss
