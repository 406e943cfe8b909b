"""Measures of neural collapse: NC1, NC2 and the Gram matrix of the paper's figure 1.

All sums run in float64 over differences of samples, column by column from a shift of its own. Near collapse, or far
from the origin, such differences are exact, so the measures keep their digits where a formula that subtracts squared
norms has long lost them. What the rounding of the features explains is judged column by column, too: one column in
large units neither hides the others nor speaks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", torch.Tensor, np.ndarray)


class EqualMeansError(ValueError):
    """All class means coincide up to rounding: there is no between-class scatter to compare with."""


_LARGEST = 1e140  # Sums of squares of larger entries may overflow float64.
_EPS = torch.finfo(torch.float64).eps
_ROWS = 1024  # The Gram matrix's factor is made in blocks of so many rows.


@torch.no_grad()
def nc1(X: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray) -> float:
    """Within-class over between-class variability; 0 once every sample sits on its class mean.

    Formula: tr(Sigma_W) / tr(Sigma_B), with Sigma_W = (1/N) sum_i (x_i - mu_c(i)) (x_i - mu_c(i))^T,
    Sigma_B = (1/K) sum_c (mu_c - mu_G) (mu_c - mu_G)^T, mu_G the mean of all samples (paper, section 3.2).

    Args:
        X: features (n, d), a floating tensor on any device or a NumPy array.
        y: integer labels (n,) of any values; classes may differ in size.

    Returns:
        A float without units, the same for rotated, shifted or rescaled features.

    Raises:
        TypeError, ValueError: naming the argument. EqualMeansError, a ValueError: all class means coincide up to the
            rounding of the features in their dtype (Sigma_B = 0).
    """
    return _nc1(_moments(*_checked(X, y)))


@torch.no_grad()
def nc2(X: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray) -> float:
    """Distance of the class means from a simplex equiangular tight frame; 0 for an exact one.

    Formula: ||H H^T - Sigma_ETF||_F with rows (mu_c - mu_G) / ||mu_c - mu_G|| of H, zero for a class whose
    mean is mu_G up to the rounding of the features,
    and Sigma_ETF = (1 + 1/(K-1)) I - 1/(K-1) 1 1^T (paper, definition 3.1 and figure 3).

    Args, Raises: as ``nc1``. Returns a float without units.
    """
    return _nc2(_moments(*_checked(X, y)))


@torch.no_grad()
def gram(X: Array, y: torch.Tensor | np.ndarray) -> Array:
    """Cosines between all samples as seen from the mean of the class means, sorted by class.

    Formula: R R^T with rows (x_i - mu) / ||x_i - mu||, zero for a sample at mu up to rounding, mu = (1/K) sum_c mu_c.
    Collapsed data shows 1 within a class and -1/(K-1) between classes (paper, section 4.1 and figure 1).

    Args, Raises: as ``nc1``, except that class means may coincide.

    Returns:
        (n, n) of X's kind, dtype and device: classes in ascending order, within a class the given order.
    """
    points, classes = _checked(X, y)
    moments = _moments(points, classes)
    centre, rest = moments.mean_of_means(points[0])
    R = points.new_empty(points.shape, dtype=torch.float64)
    for out, rows in zip(R.split(_ROWS), torch.cat(classes).split(_ROWS), strict=True):
        block = points[rows].double()
        noise = block.abs().mul_(moments.scale * torch.finfo(points.dtype).eps).add_(moments.error.mean(0))
        out.copy_(_unit(_beyond(block.sub_(centre).mul_(moments.scale).sub_(rest), noise)))
    result = R @ R.T
    return result.to(X.dtype).to(X.device) if isinstance(X, torch.Tensor) else result.numpy().astype(X.dtype)


@dataclass(frozen=True)
class _Moments:
    """Class means and scatter, in a unit (a power of two) in which the widest column is about 1 wide.

    Attributes:
        scale: what differences were multiplied by.
        sizes: samples of each class.
        within: tr(Sigma_W).
        means: class means (K, d) minus the first sample, in long double.
        error: how far rounding of features and sums may have moved each mean, (K, d).
    """

    scale: float
    sizes: list[int]
    within: float
    means: np.ndarray
    error: torch.Tensor

    def centred(self) -> torch.Tensor:
        """Class means relative to the mean of all samples, without what is rounding noise; not all of them zero."""
        shares = np.array(self.sizes, np.longdouble)[:, None] / sum(self.sizes)
        centred = self.means - (shares * self.means).sum(0)
        shares = torch.as_tensor(shares.astype(np.float64)).to(self.error)
        kept = _beyond(_tensor(centred, self.error), self.error + (shares * self.error).sum(0))
        if not bool(kept.any()):
            raise EqualMeansError(
                "X has equal class means up to rounding (Sigma_B = 0), so collapse is undefined; check that y "
                "belongs to X and that the features are not constant"
            )
        return kept

    def mean_of_means(self, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of the class means as a float64 point, and what is missing to it, scaled."""
        mean, origin = self.means.mean(0), _long(first)
        centre = (origin + mean / self.scale).astype(np.float64)
        rest = mean - (centre - origin) * self.scale
        return _tensor(centre, self.error), _tensor(rest, self.error)


def _moments(X: torch.Tensor, classes: list[torch.Tensor]) -> _Moments:
    """Moments class by class; differences from a class's first sample are exact where the class has collapsed."""
    widest = float((X.amax(0).double() - X.amin(0).double()).max())
    scale = 2.0 ** -max(-1000, math.frexp(widest)[1])
    origin, within, means, errors = _long(X[0]), 0.0, [], []
    # A step before the features were stored, and storing them, cost half of it each.
    rounding = torch.finfo(X.dtype).eps
    least = torch.finfo(X.dtype).smallest_normal * rounding  # This is the spacing of subnormal numbers.
    for rows in classes:
        members = X[rows].double()
        size = members.abs().amax(0).mul_(scale).mul_(rounding).add_(least * scale)
        members.sub_(members[0].clone()).mul_(scale)
        reach = members.abs().amax(0)
        mean = members.mean(0)
        rest = members.sub_(mean).mean(0)  # Rounding has left this out of the mean.
        squares = members.square_().sum(0)
        within += squares.sum().item()
        means.append((_long(X[rows[0]]) - origin) * scale + _long(mean) + _long(rest))
        # Rounding errors of samples that are spread wider than them are independent, and average out.
        spread = (squares / len(rows)).sqrt() > 2 * size
        errors.append(torch.where(spread, min(1.0, 4 / len(rows) ** 0.5), 1.0) * size + 2 * _EPS * reach)
    return _Moments(scale, [len(rows) for rows in classes], within / len(X), np.stack(means), torch.stack(errors))


def _nc1(moments: _Moments) -> float:
    centred = moments.centred()
    largest = float(centred.abs().max())
    between = (centred / largest).square().sum().item() / len(centred)
    result = moments.within / largest / largest / between
    if math.isinf(result):
        raise EqualMeansError(
            f"X has class means that differ by {largest:.0e} of the spread of the samples (Sigma_B = 0 to rounding), "
            "so collapse is undefined; drop the columns that hold no classes, or bring all to one scale"
        )
    return result


def _nc2(moments: _Moments) -> float:
    H = _unit(moments.centred())
    K = len(H)
    etf = (K * torch.eye(K, dtype=H.dtype, device=H.device) - 1) / (K - 1)
    return torch.linalg.matrix_norm(H @ H.T - etf).item()


def _beyond(rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Rows without the entries that noise explains, where these would outweigh the others of their row."""
    quiet = rows.abs() <= noise
    if not bool(quiet.any()):
        return rows
    parts = _by_largest(rows)
    noisy = parts.square().mul_(quiet).sum(1) > parts.square().mul_(~quiet).sum(1)
    return rows.masked_fill(quiet & noisy[:, None], 0.0)


def _by_largest(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their largest entry, so that squares keep it; zero rows stay zero."""
    largest = rows.abs().amax(1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1.0)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1; zero rows stay zero."""
    rows = _by_largest(rows)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, 1.0))


def _long(row: torch.Tensor) -> np.ndarray:
    return row.double().cpu().numpy().astype(np.longdouble)


def _tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float64)).to(like.device)


def _checked(X, y) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """X as a tensor, and the row numbers of each class."""
    if isinstance(X, np.ndarray) and X.dtype.kind == "f":
        # There are no tensors of long double.
        dtype = X.dtype.newbyteorder("=") if X.dtype.itemsize <= 8 else np.float64
        # torch refuses some strides and byte orders, so this is a copy.
        X = torch.from_numpy(np.array(X, dtype=dtype, order="C"))
    if not isinstance(X, torch.Tensor) or not X.is_floating_point():
        kind = getattr(X, "dtype", type(X).__name__)
        raise TypeError(f"X must be a floating torch.Tensor or NumPy array, got {kind}; convert it first")
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must be a non-empty matrix (n, d), got shape {tuple(X.shape)}")
    low, high = (end.item() for end in X.aminmax())
    if not -_LARGEST <= low <= high <= _LARGEST:  # The comparison is false for NaN.
        raise ValueError(f"X must be finite and within +-{_LARGEST:g}, found the range {low} to {high}")
    X = X.detach() if X.device.type in ("cpu", "cuda") else X.detach().cpu()  # Other devices may lack float64.
    return X, [rows.to(X.device) for rows in _classes(y, len(X))]


def _classes(y, n: int) -> list[torch.Tensor]:
    """Row numbers of each class, classes ascending, rows in the given order."""
    y = y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    if y.dtype.kind not in "iu":
        raise TypeError(f"y must hold integer labels, got {y.dtype}; number the classes, e.g. with np.unique")
    if y.shape != (n,):
        raise ValueError(f"y must have one label for each of the {n} rows of X, got shape {y.shape}")
    labels, sizes = np.unique(y, return_counts=True)
    if len(labels) < 2:
        raise ValueError(f"y must have at least 2 classes, got only the label {labels[0]}")
    order = torch.from_numpy(np.argsort(y, kind="stable"))
    return list(order.split(sizes.tolist()))


def of_stages(stages: Mapping[str, torch.Tensor], y: torch.Tensor | np.ndarray) -> tuple[dict, dict]:
    """(NC1, NC2) of the same samples at several stages, by name; infinite where all class means coincide."""
    found_nc1, found_nc2 = {}, {}
    for name, X in stages.items():
        try:
            moments = _moments(*_checked(X, y))
            found_nc1[name], found_nc2[name] = _nc1(moments), _nc2(moments)
        except EqualMeansError:
            found_nc1[name] = found_nc2[name] = float("inf")
    return found_nc1, found_nc2
