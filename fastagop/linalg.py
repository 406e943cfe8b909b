"""Dense linear algebra on one n x n matrix: in-place Cholesky, symmetric products from one triangle, M^(1/2)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from fastagop.kernels import checks
from fastagop.kernels.gemm import matmul_nt, subtract_product_

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
log = logging.getLogger("fastagop")

_BLOCK = 256
_CUDA_BLOCK = 1024
_UPPER_BLOCK, _INVERTED = 192, 96  # the work beside the large products is least (n = 2000, two cores of a Zen 5)


def cholesky_lower_(
    A: torch.Tensor, diagonal: float | torch.Tensor, block: int | None = None, update: Callable | None = None
) -> int:
    """Factor A = L L^T into A's own lower triangle and diagonal; the strict upper triangle is left as it was.

    Left-looking: each column block is updated once by one large product, lower part only, then factored by the
    library. The extra memory is a few column blocks.

    Args:
        A: symmetric (n, n), both triangles filled; its stored diagonal is ignored in favour of ``diagonal``.
        diagonal: of the matrix to factor, a number or (n,).
        block: columns of a block; default by device.
        update: (A, start, stop) does A[start:, start:stop] -= L[start:, :start] L[start:stop, :start]^T on and below
            the diagonal; default torch's products.

    Returns:
        0, or the 1-based index of the first pivot that failed (then call ``restore_lower_``).
    """
    n, block = len(A), block or _block(A)
    A.diagonal().copy_(torch.as_tensor(diagonal, dtype=torch.float64, device=A.device))
    for start in range(0, n, block):
        stop = min(n, start + block)
        panel, square = A[stop:, start:stop], A[start:stop, start:stop]
        if start:
            (update or _update)(A, start, stop)
        L, info = torch.linalg.cholesky_ex(square)  # reads the lower triangle only
        if int(info):
            return start + int(info)
        square.copy_(square.triu(1).add_(L))
        if stop < n:
            panel.copy_(torch.linalg.solve_triangular(L.mT, panel, upper=True, left=False))
    return 0


def _update(A: torch.Tensor, start: int, stop: int) -> None:
    done = A[start:stop, :start]
    A[start:stop, start:stop].sub_((done @ done.T).tril_())
    if stop < len(A):
        A[stop:, start:stop].addmm_(A[stop:, :start], done.T, alpha=-1.0)


def cholesky_upper_(A: torch.Tensor, block: int = _UPPER_BLOCK) -> int:
    """Factor A = U U^T into A's own upper triangle and diagonal, for float32 factors that precondition or are refined.

    As ``cholesky_lower_``, from the last column block to the first: of U's rows all that a column block's one product
    takes lies to its right, without a copy. Panels are divided by products with inverses of triangles.

    Args:
        A: symmetric (n, n), of which the upper triangle and the diagonal are read; what lies below the blocks on the
            diagonal is left as it was.
        block: columns of a block.

    Returns:
        0, or the number of rows that were left when a pivot failed.
    """
    for start in range((len(A) - 1) // block * block, -1, -block):
        stop = min(len(A), start + block)
        if stop < len(A):
            subtract_product_(A[:stop, start:stop], A[:stop, stop:], A[start:stop, stop:])
        if failed := _upper_columns_(A, start, stop):
            return failed
    return 0


def _upper_columns_(A: torch.Tensor, start: int, stop: int) -> int:
    """Turn columns, from which what lies right of them is subtracted, into those of U; returns as ``cholesky_upper_``.

    Wide ones by halves: the inverse of a triangle, half of it zeros, is as much work as the rest of a column block.
    """
    if stop - start > _INVERTED:
        middle = (start + stop) // 2
        if failed := _upper_columns_(A, middle, stop):
            return failed
        subtract_product_(A[:middle, start:middle], A[:middle, middle:stop], A[start:middle, middle:stop])
        return _upper_columns_(A, start, middle)
    panel, square = A[:start, start:stop], A[start:stop, start:stop]
    L, info = torch.linalg.cholesky_ex(square.flip(0, 1))  # reads the lower triangle, which was the upper one
    if int(info):
        return stop - int(info) + 1
    U = L.flip(0, 1).contiguous()
    square.copy_(U)
    if start:
        one = torch.eye(len(U), dtype=A.dtype, device=A.device)
        panel.copy_(matmul_nt(panel, torch.linalg.solve_triangular(U, one, upper=True)))
    return 0


def _block(A: torch.Tensor) -> int:
    """Columns of a block: A is read n / (2 block) times, which larger blocks save where products are fastest."""
    return _CUDA_BLOCK if A.is_cuda else _BLOCK


def _rows(A: torch.Tensor) -> int:
    """Rows of a block of a pass over A: on CUDA a launch takes longer than 256 rows of a product with a few columns.

    A sixteenth of A at most, so that a float64 copy of a float32 block stays within a solve's workspace.
    """
    return max(_BLOCK, min(_CUDA_BLOCK, len(A) // 16)) if A.is_cuda else _BLOCK


def restore_lower_(A: torch.Tensor, rows: int = _BLOCK) -> torch.Tensor:
    """Copy the strict upper triangle over the lower one; the diagonal is left to the caller."""
    for start in range(0, len(A), rows):
        stop = min(len(A), start + rows)
        A[start:stop, :start].copy_(A[:start, start:stop].T)
        square = A[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
    return A


def scale_lower_(A: torch.Tensor, root: torch.Tensor, rows: int = _BLOCK) -> torch.Tensor:
    """Multiply the lower triangle and the diagonal by root root^T, root (n, 1); the rest is left as it was."""
    for start in range(0, len(A), rows):
        stop = min(len(A), start + rows)
        A[start:stop, :start].mul_(root[start:stop]).mul_(root[:start].T)
        square = A[start:stop, start:stop]
        square.copy_(square.triu(1) + (square * root[start:stop] * root[start:stop].T).tril_())
    return A


def cholesky_solve(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """(L L^T)^-1 B with L in A's lower triangle; block by block where the library would copy A: it has gaps."""
    if A.is_contiguous() and not A.is_cuda:  # half the time of the blocks
        half = torch.linalg.solve_triangular(A, B, upper=False)
        return torch.linalg.solve_triangular(A.mT, half, upper=True).contiguous()
    n, X, rows = len(A), B.clone(), _rows(A)
    starts = range(0, n, rows)
    for start in starts:
        stop = min(n, start + rows)
        X[start:stop] -= A[start:stop, :start] @ X[:start]
        X[start:stop] = torch.linalg.solve_triangular(A[start:stop, start:stop], X[start:stop], upper=False)
    for start in reversed(starts):
        stop = min(n, start + rows)
        X[start:stop] -= A[stop:, start:stop].T @ X[stop:]
        X[start:stop] = torch.linalg.solve_triangular(A[start:stop, start:stop].mT, X[start:stop], upper=True)
    return X


def upper_matmul(A: torch.Tensor, diagonal: float | torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """S V in V's dtype, S the symmetric matrix with A's strict upper triangle and a diagonal, a number or (n,)."""
    out = (diagonal[:, None] if isinstance(diagonal, torch.Tensor) else diagonal) * V
    rows = _rows(A)
    for start in range(0, len(A), rows):
        stop = min(len(A), start + rows)
        square = A[start:stop, start:stop].triu(1).to(V.dtype)
        out[start:stop] += square @ V[start:stop] + square.T @ V[start:stop]
        if stop < len(A):
            right = A[start:stop, stop:].to(V.dtype)
            out[start:stop] += right @ V[stop:]
            out[stop:] += right.T @ V[start:stop]
    return out


def largest_row_sum(A: torch.Tensor) -> float:
    """max_i sum_j A_ij of a matrix with non-negative entries, without a temporary of its size."""
    ones = A.new_ones(A.shape[1], 1)
    return float((A @ ones).max())


def psd_sqrt(M: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """M^(1/2) of a positive semi-definite matrix, by a float64 eigendecomposition with negatives clipped to 0.

    M is symmetrised first. float32 eigensolvers fail on low-rank matrices, and rank K out of d is what an AGOP
    has near collapse.

    Args:
        M: (d, d).
        rows: points (n, d) whose span holds M's range, where known; the problem is then n x n for
            n < d.
    """
    wide = M.double()
    if rows is not None and len(rows) < len(M):
        basis = torch.linalg.qr(rows.double().T).Q
        inner = psd_sqrt(basis.T @ wide @ basis)
        return (basis @ inner @ basis.T).to(M.dtype)
    values, vectors = eigh((wide + wide.T).mul_(0.5))
    root = vectors * values.clamp_(min=0.0).pow_(0.25)
    return (root @ root.T).to(M.dtype)


def eigh(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of A, of which the lower triangle is read.

    Where a device's solver fails, or answers NaN, LAPACK's on the host.
    """
    try:
        values, vectors = torch.linalg.eigh(A)
        if checks.finite(values) and checks.finite(vectors):
            return values, vectors
        reason = "it returned NaN"
    except RuntimeError as error:  # of some failures cuSOLVER's is a plain one
        if not isinstance(error, LinAlgError) and "cusolver" not in str(error).lower():
            raise
        reason = str(error)
    if A.device.type == "cpu":
        raise LinAlgError(f"no eigendecomposition of a {tuple(A.shape)} matrix: {reason}")
    log.warning("eigh on %s failed (%s); computing on the CPU", A.device, reason.splitlines()[0])
    values, vectors = eigh(A.cpu())
    return values.to(A.device), vectors.to(A.device)
