"""Kernel machines on images whose kernel is the mean of a kernel over all pairs of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastagop import linalg
from fastagop.estimators import rounding
from fastagop.kernels import checks
from fastagop.kernels.errors import warn
from fastagop.kernels.operations import agop, kernel_matrix
from fastagop.kernels.profile import Kernel
from fastagop.solvers.limits import RESIDUAL

_BLOCK_BYTES, _CUDA_BLOCK_BYTES = 16e6, 128e6  # of kernel values between patches that are held at once
_JITTERS = (0.0, 1e-14, 1e-12, 1e-10, 1e-8)  # times the largest row sum, tried one after the other


def patch_kernel_matrix(kernel: Kernel, patches: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """K_ij = mean over patches p of image i and q of image j of k(p, q), float64 (n, m).

    Kernel values between patches, of the patches' dtype, are made and averaged block by block, 16 MB at a time or
    on CUDA 128 MB, and never stored whole; without others each pair is made once.

    Args:
        kernel: of patches.
        patches: (n, P, d), as of ``Window.patches``.
        others: (m, Q, d); default the same.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check("patches", patches)
    if others is not None:
        _check("others", others, patches)
    return _means(kernel, patches, others, patches.dtype)


def _means(kernel: Kernel, A: torch.Tensor, B: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``patch_kernel_matrix`` of checked patches, with kernel values in a dtype."""
    symmetric, B = B is None, A if B is None else B
    n, m, values = len(A), len(B), int((_CUDA_BLOCK_BYTES if A.is_cuda else _BLOCK_BYTES) / dtype.itemsize)
    # Blocks are square where they can be: what ``kernel_matrix`` takes beside its result grows with their columns.
    rows, columns = (max(1, math.isqrt(values) // side.shape[1]) for side in (A, B))
    out = torch.empty(n, m, dtype=torch.float64, device=A.device)
    for start in range(0, n, rows):
        row = slice(start, min(n, start + rows))
        for first in range(0, row.stop if symmetric else m, columns):
            column = slice(first, min(m, first + columns))
            out[row, column] = _block_of_means(kernel, A[row].to(dtype), B[column].to(dtype), values)
    if symmetric:
        out = out.tril_() + out.tril(-1).T
    return out


def _block_of_means(kernel: Kernel, A: torch.Tensor, B: torch.Tensor, values: int) -> torch.Tensor:
    """The mean over pairs of patches of images A (r, P, d) and B (c, Q, d), at most so many values at once: (r, c)."""
    (r, P, _), (c, Q, _) = A.shape, B.shape
    out = A.new_zeros(r, c, dtype=torch.float64)
    for some in A.split(max(1, values // (r * c * Q)), dim=1):
        found = kernel_matrix(kernel, some.flatten(0, 1), B.flatten(0, 1))
        out += found.view(r, -1, c, Q).sum(3).double().sum(1)
    return out.div_(P).div_(Q)


def _check(name: str, patches: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Refuse what are no patches, or are not those of a window like another's."""
    checks.plain(name, patches)
    if patches.ndim != 3 or not patches.shape[1]:
        raise ValueError(f"{name} must have shape (n, P, d) with P >= 1, got {tuple(patches.shape)}")
    if patches.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {patches.dtype}")
    if not checks.finite(patches):
        raise ValueError(f"{name} must be finite, but holds NaN or infinity")
    if like is None:
        return
    wanted, given = (f"{t.shape[2]} numbers, {t.dtype} on {t.device}" for t in (like, patches))
    if given != wanted:
        raise ValueError(f"{name} must be patches of {wanted}, got {given}")


@dataclass(frozen=True)
class PatchMachine:
    """f(z) = sum_j alpha_j K(z, x_j) with K the mean of k over pairs of patches; ``fit`` makes it.

    Attributes:
        kernel: k.
        patches: of the training images, (n, P, d).
        alpha: float64 (n, K).
        jitter: what was added to the diagonal of K beyond the ridge, 0 where nothing was.
        residual: ||(K + ridge I) alpha - Y|| / ||Y|| with K in float64.
    """

    kernel: Kernel
    patches: torch.Tensor
    alpha: torch.Tensor
    jitter: float
    residual: float

    def __repr__(self) -> str:
        n, P, d = self.patches.shape
        solved = f"jitter {self.jitter:.1e}, " * bool(self.jitter) + f"residual {self.residual:.1e}"
        return f"PatchMachine({self.kernel!r}, {n} images of {P} patches of {d}, {solved})"

    @classmethod
    def fit(cls, kernel: Kernel, patches: torch.Tensor, Y: torch.Tensor, ridge: float = 1e-3) -> PatchMachine:
        """Kernel ridge regression alpha = (K + ridge I)^-1 Y in float64, kernel values of float32 patches included.

        Args:
            kernel: of patches.
            patches: (n, P, d), as of ``Window.patches``.
            Y: targets (n, K).
            ridge: >= 0.

        Raises:
            TypeError, ValueError: naming the argument; K is singular beyond what jitter mends.

        Warns:
            NumericalWarning: jitter was added, or the targets are not met.
        """
        _check("patches", patches)
        checks.plain("Y", Y)
        if Y.ndim != 2 or len(Y) != len(patches) or not checks.finite(Y):
            raise ValueError(f"Y must be finite of shape ({len(patches)}, K), one row an image, got {tuple(Y.shape)}")
        ridge = checks.nonnegative("ridge", ridge)
        K, Y = _means(kernel, patches, None, torch.float64), Y.double()
        diagonal, scale = K.diagonal().clone(), linalg.largest_row_sum(K)
        for jitter in _JITTERS:
            if not linalg.cholesky_lower_(K, diagonal + (ridge + jitter * scale)):
                break
            linalg.restore_lower_(K)
        else:
            raise ValueError(
                f"the patch kernel matrix is singular at ridge {ridge}: images repeat; take a larger ridge"
            )
        alpha = linalg.cholesky_solve(K, Y)
        unmet = linalg.upper_matmul(K, diagonal + ridge, alpha) - Y
        residual = float(unmet.norm() / Y.norm()) if bool(Y.any()) else 0.0
        if jitter or residual > RESIDUAL[torch.float32]:
            warn(
                f"PatchMachine: jitter {jitter * scale:.1e} was added beyond the ridge {ridge:.1e}, the relative "
                f"residual is {residual:.1e}; the matrix is singular to rounding: images repeat, or take a larger ridge"
            )
        return cls(kernel, patches, alpha, jitter * scale, residual)

    def predict(self, patches: torch.Tensor) -> torch.Tensor:
        """f at the images of these patches (m, P, d), float64 (m, K), kernel values included.

        Raises:
            TypeError, ValueError: patches of another window, dtype or device than those of ``fit``.
        """
        _check("patches", patches, self.patches)
        return _means(self.kernel, patches, self.patches, torch.float64) @ self.alpha

    def agop(self, **options: Any) -> torch.Tensor:
        """Patch AGOP, shape (d, d): the mean over patches p of sum_c grad F_c(p) grad F_c(p)^T.

        f is the mean of F(p) = sum_jq alpha_j k(p, x_jq) / P over an image's patches, so F is a kernel machine whose
        centers are all patches, and its AGOP is that of ``fastagop.agop``, whose options these are. (Radhakrishnan,
        Beaglehole, Pandit, Belkin 2024 take gradients of f by the patch in the same way.) Where float32 would cost
        more than the rounding of its gradients, it is computed in float64 by the backend that "auto" takes.
        """
        P = self.patches.shape[1]
        points, coefficients = self.patches.detach().flatten(0, 1), (self.alpha.detach() / P).repeat_interleave(P, 0)
        dtype, center = points.dtype, bool(options.get("center"))
        if dtype == torch.float32 and rounding.costs(self.kernel, points, coefficients, center, None):
            points, options = points.double(), options | {"backend": "auto"}
            for name, value in options.items():
                if isinstance(value, torch.Tensor) and value.dtype == dtype:  # Z or sample_weight
                    options[name] = value.double()
        return agop(self.kernel, points, coefficients.to(points), **options).to(dtype)
