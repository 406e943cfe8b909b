"""Bandwidths at which a kernel says nothing: every pair of points looks equal to it, or no two do."""

from __future__ import annotations

import torch

from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.scaling import Points
from fastagop.kernels.torch_backend import tiles

_FEW = 64  # points whose pairs show in nearly every problem that values differ


def note(points: Points, bandwidth: float, block: int = 256) -> str:
    """What to say where every k(x_i, x_j), i != j, is 0 or 1 to the rounding of X's dtype; "" elsewhere.

    A sample of the pairs answers for most problems; only where it holds nothing else are all pairs looked at.

    Args:
        points: scaled.
        bandwidth: as the user gave it.
        block: rows looked at together.
    """
    scaled, X, _, unit = points
    n = len(X)
    if n < 2:
        return ""
    few = X[torch.arange(min(n, _FEW), device=X.device) * n // min(n, _FEW)]
    distances = torch.pdist(few.double())
    zeros, ones, others = _counts(scaled.value_(distances.square().to(X.dtype)))
    if others:
        return ""
    if n > _FEW:
        with matmul_precision("highest", X.device):
            if any(_counts(scaled.value_(squares))[2] for _, squares in tiles.tiles(X, X, block)):
                return ""
    apart = distances.median()
    typical = float(apart) * unit
    if ones and zeros:
        finding = "0 or 1 to rounding: points are equal to it or have nothing in common"
    elif zeros:
        finding = "0 to rounding: no point says anything about another"
    else:
        finding = "1 to rounding: all points look alike"
    return (
        f"at bandwidth {bandwidth:.3g} every kernel value of two different points is {finding}. Their typical "
        f"distance is {typical:.3g}: take a bandwidth of that size, or scale the features"
    )


def _counts(values: torch.Tensor) -> tuple[int, int, int]:
    """(values of 0, values of 1, others) to rounding."""
    eps = torch.finfo(values.dtype).eps
    zeros, ones = int((values <= eps).sum()), int((values >= 1.0 - 4 * eps).sum())
    return zeros, ones, values.numel() - zeros - ones
