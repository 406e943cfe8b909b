"""Matrix products of the torch backend."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from .calibration import cpuinfo
from .checks import largest, readable
from .scaling import scaled_


def matmul_nt(
    A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """A B^T + bias (by column), shape (len(A), len(B)); it may be written to ``out``, which is then returned.

    float32 goes to oneDNN on AMD's processors with AVX-512, where it is a fifth to a third faster than the library
    behind torch.mm; without AVX-512 (Zen 3) it is a quarter slower, and on a Xeon (4th and 5th generation) a tenth. It
    compiles and keeps code for every shape that it meets: products with few rows, whose shapes vary with blocks and
    crowds, are left to torch.mm, and so are small ones, for which it prepares longer than torch.mm computes.
    """
    if _onednn(A, B):
        return torch.ops.mkldnn._linear_pointwise(A, _dense(B), bias, "none", [], "")
    return torch.mm(A, B.T, out=out) if bias is None else torch.addmm(bias, A, B.T, out=out)


def accumulate_(C: torch.Tensor, A: torch.Tensor, B: torch.Tensor, factor: float = 1.0) -> None:
    """C += factor A B^T, in place. A product that the CPU adds up in part of a wider matrix takes a fifth longer."""
    if C.is_cuda or (C.is_contiguous() and not _onednn(A, B)):
        C.addmm_(A, B.T, alpha=factor)
    else:
        C.add_(matmul_nt(A, B), alpha=factor)


def subtract_product_(C: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    """C -= A B^T, in place."""
    accumulate_(C, A, B, -1.0)


def rows_of(V: torch.Tensor) -> torch.Tensor:
    """V^T without gaps (p, n), a copy; on the CPU with rows of zeros up to a multiple of four from three rows on.

    A product of a large matrix with ten vectors takes half as long again as one with twelve (MKL on Zen 3).
    """
    n, p = V.shape
    if p < 3 or p % 4 == 0 or V.is_cuda:
        return V.T.clone(memory_format=torch.contiguous_format)
    R = V.new_zeros(p + -p % 4, n)
    R[:p] = V.T
    return R


def times_few(A: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """R A^T (p, m) for a large A (m, k) and few rows R (p, k).

    From eight rows on they come first in the product, but on Intel's processors, which take two thirds longer for that.
    """
    few_first = len(R) >= 8 and not _onednn(A, R) and cpuinfo().get("vendor_id") != "GenuineIntel"
    return torch.mm(R, A.T) if few_first else matmul_nt(A, R).T


class PanelProducts:
    """What a blocked factorisation multiplies by; here the library's products, in the factors' dtype.

    Attributes:
        word: by which the rate of float32 products is known to ``calibration``.
        note: how they differ from the library's, in words; "" where they do not.
    """

    word = "float32"
    note = ""

    def ready(self, A: torch.Tensor, diagonal: torch.Tensor | None = None) -> Any:
        """A (rows, d) made ready for several products.

        Args:
            A: rows of a factor.
            diagonal: of what A A^T will be subtracted from (rows,), where products may choose their digits by it.
        """
        return _dense(A)

    def subtract_(self, C: torch.Tensor, A: Any, B: Any) -> None:
        """C -= A B^T in place; A a tensor or ready, B ready."""
        subtract_product_(C, A, B)

    def subtract_square_(self, C: torch.Tensor, A: Any) -> None:
        """C -= A A^T in place, A ready; on the CPU little of what lies above the diagonal."""
        if len(C) <= _SQUARE or C.is_cuda:
            self.subtract_(C, A, A)
            return
        for start in range(0, len(C), _SQUARE):
            some = slice(start, min(len(C), start + _SQUARE))
            self.subtract_(C[some, : some.stop], A[some], A[: some.stop])

    def times_triangle_(self, A: torch.Tensor, T: Any) -> None:
        """A <- A T^T in place, T ready and lower triangular."""
        A.copy_(matmul_nt(A, T))


LIBRARY = PanelProducts()
_FEWEST = 32  # rows from which oneDNN multiplies
_LEAST = 2**20  # multiplications from which it does
_SQUARE = 384  # rows of a symmetric product that are subtracted at once
_PANEL = 2**20  # items of a panel of a (d, d) product, and of the rows that are multiplied at once


def add_squares_(M: torch.Tensor, G: torch.Tensor) -> None:
    """Add G^T G to float64 M; G (rows, d) is scaled by a power of two where squares would leave its dtype."""
    size = largest(G) if readable(G) else 1.0
    exponent = math.frexp(size)[1] if math.isfinite(size) and size > 0 else 0
    if abs(exponent) <= (40 if G.dtype == torch.float32 else 400):
        exponent = 0
    G = scaled_(G, -exponent)
    factor = math.ldexp(1.0, 2 * exponent) if exponent < 512 else math.inf  # beyond float64, which the caller refuses
    for part in G.split(max(64, _PANEL // max(1, G.shape[1]))):
        add_product_(M, part.T, part.T, factor)


def add_product_(M: torch.Tensor, A: torch.Tensor, B: torch.Tensor, factor: float = 1.0) -> None:
    """Add factor A B^T to float64 M, panel by panel: only a panel of the product exists in A's dtype."""
    rows = max(64, _PANEL // max(1, M.shape[1]))
    for start in range(0, len(M), rows):
        M[start : start + rows].add_(matmul_nt(A[start : start + rows], B), alpha=factor)


def square_bytes(rows: int, d: int, size: int) -> int:
    """Most memory that ``add_squares_`` takes for that many rows: a panel, its float64 copy, copies of the factors."""
    return min(d * d, max(64 * d, _PANEL)) * (8 + size) + 2 * size * min(rows * d, max(64 * d, _PANEL))


def symmetrise_(M: torch.Tensor, rows: int = 256) -> torch.Tensor:
    """Overwrite a square matrix by (M + M^T) / 2, symmetric to the bit, block by block."""
    if len(M) <= rows:
        return M.copy_((M + M.T).mul_(0.5))
    for start in range(0, len(M), rows):
        stop = min(len(M), start + rows)
        panel, mirror = M[start:stop, start:], M[start:, start:stop]
        mean = (panel + mirror.T).mul_(0.5)
        panel.copy_(mean)
        mirror.copy_(mean.T)
    return M


def random_signs(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """A matrix of 1 and -1, of a tensor's dtype and device; the same numbers everywhere and in every call."""
    drawn = torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(0), device="cpu")
    return drawn.to(like).mul_(2).sub_(1)


def _dense(B: torch.Tensor) -> torch.Tensor:
    """B without gaps: oneDNN takes a thousand times as long over a second factor that is part of a wider matrix."""
    return B if B.is_contiguous() or B.T.is_contiguous() else B.contiguous()


def _onednn(A: torch.Tensor, B: torch.Tensor) -> bool:
    return (
        A.dtype == torch.float32
        and A.device.type == "cpu"
        and favours_onednn()
        and len(A) >= _FEWEST
        and A.numel() * len(B) >= _LEAST
    )


@functools.cache
def favours_onednn() -> bool:
    """Whether oneDNN is there, and its float32 products are the faster ones on this processor."""
    about = cpuinfo()
    wide = about.get("vendor_id") == "AuthenticAMD" and "avx512f" in about.get("flags", "").split()
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
