"""Pearson correlation of the entries of two matrices, from their sums."""

from __future__ import annotations

import math

import torch

from fastagop.kernels import checks


def in_unit(A: torch.Tensor) -> torch.Tensor:
    """A matrix over a power of two near its largest entry: correlations do not change, and squares stay in range."""
    size = checks.largest(A)
    exponent = math.frexp(size)[1] if 0 < size < math.inf else 0
    return A * math.ldexp(1.0, min(1000, -exponent))


def pearson(inner: float, sums: tuple[float, float], squares: tuple[float, float], count: int) -> float | None:
    """From sum A_ij B_ij, the sums of all ``count`` entries of either matrix and of their squares.

    Returns:
        None where either matrix is constant, up to the rounding of float64.
    """
    variances = [square - total * total / count for square, total in zip(squares, sums, strict=True)]
    rounding = count * torch.finfo(torch.float64).eps
    if any(variance <= rounding * square for variance, square in zip(variances, squares, strict=True)):
        return None
    return (inner - sums[0] * sums[1] / count) / (variances[0] * variances[1]) ** 0.5
