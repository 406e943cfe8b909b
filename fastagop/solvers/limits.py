"""What solvers count as solved, and the coefficients that a dtype can bear."""

from __future__ import annotations

import torch

# A residual above this is worth a warning: it is what each dtype can promise on a solvable problem.
RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-6}
MAX_JITTER = 1.0  # of the largest row sum: the solution is then all ridge, and nothing sensible is left to try


def bound(Y: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest coefficient that a dtype can bear: beyond it, differences of coefficients are noise beside Y."""
    return largest(Y) / torch.finfo(dtype).eps ** 0.5


def times(diagonal: float | torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """A diagonal matrix, given as a number or (n,), times V."""
    return V * (diagonal[:, None] if isinstance(diagonal, torch.Tensor) else diagonal)


def largest(A: torch.Tensor) -> float:
    """The largest absolute item, 0 where there is none."""
    return float(A.abs().max()) if A.numel() else 0.0


def relative(R: torch.Tensor, Y: torch.Tensor) -> float:
    """||R|| / ||Y|| (Frobenius); 0 where Y is."""
    size = float(torch.linalg.vector_norm(Y))
    return float(torch.linalg.vector_norm(R)) / size if size > 0 else 0.0
