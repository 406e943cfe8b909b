"""Kernel machines on images whose kernel is the mean of a kernel over all pairs of patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastagop import linalg
from fastagop.kernels import checks
from fastagop.kernels.errors import warn
from fastagop.kernels.operations import agop, kernel_matrix
from fastagop.kernels.profile import Kernel
from fastagop.solvers.limits import RESIDUAL

_BLOCK_BYTES = 128e6  # of kernel values between patches that are held at once
_JITTERS = (0.0, 1e-14, 1e-12, 1e-10, 1e-8)  # times the largest row sum, tried one after the other


def patch_kernel_matrix(kernel: Kernel, patches: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """K_ij = mean over patches p of image i and q of image j of k(p, q), float64 (n, m).

    Kernel values between patches are made and averaged block by block and never stored whole; without others each
    pair is made once.

    Args:
        kernel: of patches.
        patches: (n, P, d), as of ``Window.patches``.
        others: (m, Q, d); default the same.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    symmetric = others is None
    _check("patches", patches)
    A, B = patches, patches if others is None else others
    if others is not None:
        _check("others", others, patches)
    (n, P, _), (m, Q, _) = A.shape, B.shape
    out = torch.empty(n, m, dtype=torch.float64, device=A.device)
    step = max(1, int(_BLOCK_BYTES // max(1, P * Q * m * A.element_size())))
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        columns = slice(0, rows.stop if symmetric else m)
        values = kernel_matrix(kernel, A[rows].flatten(0, 1), B[columns].flatten(0, 1))
        blocks = values.view(rows.stop - start, P, -1, Q)
        out[rows, columns] = blocks.sum(3).double().mean(1).div_(Q)
    if symmetric:
        out = out.tril_() + out.tril(-1).T
    return out


def _check(name: str, patches: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Refuse what are no patches, or are not those of a window like another's."""
    checks.plain(name, patches)
    if patches.ndim != 3 or not patches.shape[1]:
        raise ValueError(f"{name} must have shape (n, P, d) with P >= 1, got {tuple(patches.shape)}")
    if patches.dtype not in (torch.float32, torch.float64) or not checks.finite(patches):
        raise ValueError(f"{name} must be finite, float32 or float64, got {patches.dtype}")
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
        residual: ||(K + ridge I) alpha - Y|| / ||Y||.
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
        """Kernel ridge regression alpha = (K + ridge I)^-1 Y in float64.

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
        K, Y = patch_kernel_matrix(kernel, patches), Y.double()
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
        """f at the images of these patches (m, P, d), float64 (m, K).

        Raises:
            TypeError, ValueError: patches of another window, dtype or device than those of ``fit``.
        """
        _check("patches", patches, self.patches)
        return patch_kernel_matrix(self.kernel, patches, self.patches) @ self.alpha

    def agop(self, **options: Any) -> torch.Tensor:
        """Patch AGOP, shape (d, d): the mean over patches p of sum_c grad F_c(p) grad F_c(p)^T.

        f is the mean of F(p) = sum_jq alpha_j k(p, x_jq) / P over an image's patches, so F is a kernel machine whose
        centers are all patches, and its AGOP is that of ``fastagop.agop``, whose options these are. (Radhakrishnan,
        Beaglehole, Pandit, Belkin 2024 take gradients of f by the patch in the same way.)
        """
        P = self.patches.shape[1]
        coefficients = (self.alpha / P).repeat_interleave(P, 0).to(self.patches)
        return agop(self.kernel, self.patches.flatten(0, 1), coefficients, **options)
