"""The operations on kernels that are not radial, block by block: kernel matrix, products, gradients, the AGOP.

Every function takes a kernel and points in the dtype that the kernel computes in (``computed``), and gives results in
that dtype, or in the dtype of the tensor that it writes to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..checks import readable
from ..gemm import add_squares_, symmetrise_
from ..plan import longest_first
from ..profile import Kernel
from ..torch_backend.agop import Means
from .composite import diagonal_of, pairs_of


def dtype_of(kernel: Kernel, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel's blocks are computed in, for points of a dtype."""
    return torch.float64 if kernel.wide else dtype


def computed(kernel: Kernel, X: torch.Tensor, Z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centers and evaluation points as the kernel computes with them, one tensor where they are the same."""
    dtype = dtype_of(kernel, X.dtype)
    x = X.detach().to(dtype).contiguous()
    return x, x if Z is X else Z.detach().to(dtype).contiguous()


def checked(result: torch.Tensor, what: str, dtype: torch.dtype) -> torch.Tensor:
    """Refuse a result that has left its dtype, as powers of large points do; unread while a CUDA graph is captured."""
    if result.numel() and readable(result) and not all(bool(end.isfinite()) for end in torch.aminmax(result)):
        wider = "" if dtype == torch.float64 else ", or use float64"
        size, remedy = (
            ("small or so large", "bring X to about 1") if what == "gradients" else ("large", "divide X by a constant")
        )
        own = "; some are NaN: look at the methods of a class of your own, too" if bool(result.isnan().any()) else ""
        raise ValueError(f"X is so {size} that {what} leave {dtype}; {remedy}{wider}{own}")
    return result


def kernel_matrix(kernel: Kernel, X: torch.Tensor, Z: torch.Tensor, out: torch.Tensor, rows: int) -> torch.Tensor:
    """k(X, Z) into out (n, m), symmetric to the bit where Z is X."""
    x, z = computed(kernel, X, Z)
    pairs = pairs_of(kernel, z, x)
    if Z is not X:
        for start in range(0, len(x), rows):
            row = slice(start, min(len(x), start + rows))
            out[row] = pairs.values(row)
        return checked(out, "kernel values", out.dtype)
    for start in range(0, len(x), rows):
        row = slice(start, min(len(x), start + rows))
        block = pairs.values(row, row.stop)
        square = block[:, start:]
        square.copy_(square.tril() + square.tril(-1).T)
        out[row, : row.stop] = block
        out[:start, row] = block[:, :start].T
    out.diagonal().copy_(diagonal_of(kernel, x))
    return checked(out, "kernel values", out.dtype)


def kernel_matmul(kernel: Kernel, X: torch.Tensor, Z: torch.Tensor, V: torch.Tensor, rows: int) -> torch.Tensor:
    """k(X, Z) V, shape (n, p), in V's dtype."""
    x, z = computed(kernel, X, Z)
    pairs, wide = pairs_of(kernel, z, x), V.to(x.dtype)
    result = wide.new_zeros(len(x), V.shape[1])
    if Z is not X:
        for start in range(0, len(x), rows):
            row = slice(start, min(len(x), start + rows))
            torch.mm(pairs.values(row), wide, out=result[row])
        return checked(result.to(V.dtype), "products", V.dtype)
    for start in longest_first(len(x), rows):
        row = slice(start, min(len(x), start + rows))
        block = pairs.values(row, row.stop)
        result[row].addmm_(block, wide[: row.stop])
        result[:start].addmm_(block[:, :start].T, wide[row])  # the mirrored block serves the rows above
    return checked(result.to(V.dtype), "products", V.dtype)


def gradient_blocks(
    kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor, rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of Z, their gradients (b, K, d) in the dtype of the blocks); each is overwritten by the next."""
    x, z = computed(kernel, X, Z)
    pairs, a = pairs_of(kernel, x, z), alpha.detach().to(x.dtype).contiguous()
    buffer = x.new_empty(min(rows, len(z)), a.shape[1], x.shape[1])
    for start in range(0, len(z), rows):
        row = slice(start, min(len(z), start + rows))
        out = buffer[: row.stop - start].zero_()
        pairs.add_gradients(row, None, a, out)
        yield row, out


def gradients(kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor, rows: int) -> torch.Tensor:
    """grad f_c(Z[i]), shape (m, K, d), in X's dtype."""
    result = X.new_empty(len(Z), alpha.shape[1], X.shape[1])
    for row, G in gradient_blocks(kernel, X, alpha, Z, rows):
        result[row] = G
    return checked(result, "gradients", X.dtype)


def mean_gradient(
    kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor, rows: int, weights: torch.Tensor | None
) -> torch.Tensor:
    """mean_i grad f_c(Z[i]), weighted where there are weights (m,), float64 (K, d)."""
    w = X.new_ones(len(Z), dtype=torch.float64) if weights is None else weights.double()
    total = X.new_zeros(alpha.shape[1], X.shape[1], dtype=torch.float64)
    for row, G in gradient_blocks(kernel, X, alpha, Z, rows):
        total += torch.einsum("i,icd->cd", w[row], G.double())
    return total / w.sum()


def agop(
    kernel: Kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor,
    rows: int,
    *,
    center: bool = False,
    weights: torch.Tensor | None = None,
    diagonal: bool = False,
) -> torch.Tensor:
    """sum_i w_i sum_c g_ic g_ic^T, float64 (d, d), or its diagonal (d,), by the gradient form; w = weights, default 1.

    With ``center`` the (weighted) mean gradient is subtracted, every block centred by its own mean first.
    """
    K, d = alpha.shape[1], X.shape[1]
    blocks = gradient_blocks(kernel, X, alpha, Z, rows) if len(Z) and K else iter(())
    weights = weights if weights is None else weights.to(dtype_of(kernel, X.dtype))
    return checked(sum_of_squares(blocks, (K, d), X, center, weights, diagonal), "gradients", X.dtype)


def sum_of_squares(
    blocks: Iterator[tuple[slice, torch.Tensor]],
    shape: tuple[int, int],
    X: torch.Tensor,
    center: bool = False,
    weights: torch.Tensor | None = None,
    diagonal: bool = False,
) -> torch.Tensor:
    """``agop`` from (rows, their gradients (b, K, d)), used up; ``shape`` is (K, d), weights of their dtype.

    It is ``torch_backend.products.outer_products`` of gradients that exist in blocks only.
    """
    K, d = shape
    M = X.new_zeros((d,) if diagonal else (d, d), dtype=torch.float64)
    means = Means(K * d, X) if center else None
    roots = None if weights is None else weights.sqrt()

    def add(G: torch.Tensor) -> None:
        if diagonal:
            M.add_(G.double().square_().sum(0))
        else:
            add_squares_(M, G)

    for row, G in blocks:
        if roots is not None:
            G.mul_(roots[row, None, None])
        if means is not None:
            add(means.centre_(G.view(len(G), -1), None if roots is None else roots[row]).view(K, d))
        add(G.view(-1, d))
    return M if diagonal else symmetrise_(M)
