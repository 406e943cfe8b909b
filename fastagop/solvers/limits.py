"""What solvers count as solved, and the coefficients that a dtype can bear."""

from __future__ import annotations

import math

import torch

from fastagop.kernels.checks import largest

# A residual above this is worth a warning: it is what each dtype can promise on a solvable problem.
RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-6}
_SEEN = 16  # values of a row
_LARGEST = 1e290  # of what is added to the diagonal, so that products with it stay in float64
MAX_JITTER = 1.0  # of the largest row sum: the solution is then all ridge, and nothing sensible is left to try


def bound(Y: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest coefficient that a dtype can bear: beyond it, differences of coefficients are noise beside Y."""
    return largest(Y) / torch.finfo(dtype).eps ** 0.5


def times(diagonal: float | torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """A diagonal matrix, given as a number or (n,), times V."""
    return V * (diagonal[:, None] if isinstance(diagonal, torch.Tensor) else diagonal)


def over_weights(ridge: float, weights: torch.Tensor) -> torch.Tensor:
    """ridge / weight of each point, bounded: infinity times a coefficient of 0 would be NaN."""
    return (ridge / weights).clamp_(max=_LARGEST)


def relative(R: torch.Tensor, Y: torch.Tensor) -> float:
    """||R|| / ||Y|| (Frobenius); 0 where Y is."""
    size = float(torch.linalg.vector_norm(Y))
    return float(torch.linalg.vector_norm(R)) / size if size > 0 else 0.0


def worst_column(R: torch.Tensor, Y: torch.Tensor) -> float:
    """The largest ||R_c|| / ||Y_c|| of a column that is not zero; R may be of a sample of the rows."""
    grow = (len(Y) / max(1, len(R))) ** 0.5
    if Y.shape[1] == 1:
        return grow * relative(R, Y)
    size = torch.linalg.vector_norm(Y, dim=0)
    share = torch.linalg.vector_norm(R, dim=0) / torch.where(size > 0, size, math.inf)
    return grow * float(share.max()) if share.numel() else 0.0


def both(R: torch.Tensor, Y: torch.Tensor) -> tuple[float, float]:
    """(``relative``, ``worst_column``) of all rows, of the same norms."""
    of_r, of_y = (torch.linalg.vector_norm(part, dim=0).tolist() for part in (R, Y))
    size = math.hypot(*of_y)
    shares = [r / y for r, y in zip(of_r, of_y, strict=True) if y > 0]
    return (math.hypot(*of_r) / size if size > 0 else 0.0), max(shares, default=0.0)


def finite_values(size: float) -> float:
    """A number that is made of all kernel values of a system; refused where they are not all finite."""
    if not math.isfinite(size):
        raise ValueError(
            "kernel must have finite values at all distances, and of two points of X it is NaN or infinite; mend the "
            "methods of its class that compute values"
        )
    return size


def zero_and_one(eps: float) -> tuple[float, float]:
    """Kernel values up to the first are 0 to rounding, and those from the second on 1."""
    return eps, 1.0 - 4.0 * eps


def tells_points_apart(values: torch.Tensor, eps: float) -> bool:
    """Whether some kernel value of a matrix is neither 0 nor 1; elsewhere its bandwidth says nothing about the points.

    The first values of a row nearly always show it.
    """
    zero, one = zero_and_one(eps)
    if any(zero < value < one for value in values[0, :_SEEN].tolist()):
        return True
    return bool(values.gt(zero).logical_and_(values.lt(one)).any())
