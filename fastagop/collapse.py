"""Measures of neural collapse: NC1, NC2 and the Gram matrix of the paper's figure 1.

All sums run in float64 over differences of samples. Near collapse such differences are exact, so NC1 keeps
its digits where a formula that subtracts squared norms has long lost them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", torch.Tensor, np.ndarray)


class EqualMeansError(ValueError):
    """All class means coincide up to rounding: there is no between-class scatter to compare with."""


_LARGEST = 1e140  # sums of squares of larger entries may overflow float64


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
        TypeError, ValueError: naming the argument; also when all class means coincide (Sigma_B = 0).
    """
    X, classes = _checked(X, y)
    means, within = _moments(X, classes)
    between = _about_global_mean(X, classes, means).square().sum().item() / len(means)
    return within / between


@torch.no_grad()
def nc2(X: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray) -> float:
    """Distance of the class means from a simplex equiangular tight frame; 0 for an exact one.

    Formula: ||H H^T - Sigma_ETF||_F with rows (mu_c - mu_G) / ||mu_c - mu_G|| of H, zero for a class whose
    mean is mu_G, and Sigma_ETF = (1 + 1/(K-1)) I - 1/(K-1) 1 1^T (paper, definition 3.1 and figure 3).

    Args, Raises: as ``nc1``. Returns a float without units.
    """
    X, classes = _checked(X, y)
    means, _ = _moments(X, classes)
    H = _unit(_about_global_mean(X, classes, means), _rounding(X))
    K = len(H)
    etf = (K * torch.eye(K, dtype=H.dtype, device=H.device) - 1) / (K - 1)
    return torch.linalg.matrix_norm(H @ H.T - etf).item()


@torch.no_grad()
def gram(X: Array, y: torch.Tensor | np.ndarray) -> Array:
    """Cosines between all samples as seen from the mean of the class means, sorted by class.

    Formula: R R^T with rows (x_i - mu) / ||x_i - mu||, zero for a sample at mu, and mu = (1/K) sum_c mu_c.
    Collapsed data shows 1 within a class and -1/(K-1) between classes (paper, section 4.1 and figure 1).

    Args, Raises: as ``nc1``, except that class means may coincide.

    Returns:
        (n, n) of X's kind, dtype and device: classes in ascending order, within a class the given order.
    """
    rows, classes = _checked(X, y)
    means, _ = _moments(rows, classes)
    R = rows[torch.cat(classes)].double().sub_(rows[0])
    R = _unit(R.sub_(means.mean(0)), _rounding(rows))
    result = R @ R.T
    return result.to(X.dtype) if isinstance(X, torch.Tensor) else result.numpy().astype(X.dtype, copy=False)


def _moments(X: torch.Tensor, classes: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Class means (K, d) relative to X[0], and tr(Sigma_W)."""
    origin, means, within = X[0].double(), [], 0.0
    for rows in classes:
        first = X[rows[0]].double()
        members = X[rows].double().sub_(first)  # exact where the class has collapsed
        mean = members.mean(0)
        within += members.sub_(mean).square_().sum().item()
        means.append(first - origin + mean)
    return torch.stack(means), within / len(X)


def _about_global_mean(X: torch.Tensor, classes: list[torch.Tensor], means: torch.Tensor) -> torch.Tensor:
    """Class means relative to the mean of all samples; refuses those that cannot be told apart."""
    shares = torch.tensor([len(rows) / len(X) for rows in classes], dtype=means.dtype, device=means.device)
    centred = means - shares @ means
    if not bool((torch.linalg.vector_norm(centred, dim=1) > _rounding(X)).any()):
        raise EqualMeansError(
            "X has equal class means up to rounding (Sigma_B = 0), so collapse is undefined; check that y "
            "belongs to X and that the features are not constant"
        )
    return centred


def _rounding(X: torch.Tensor) -> float:
    """Length below which a difference of float64 means of X's rows is rounding noise."""
    return 8 * torch.finfo(torch.float64).eps * X.shape[1] ** 0.5 * max(map(abs, _range(X)))


def _unit(rows: torch.Tensor, rounding: float) -> torch.Tensor:
    """Rows scaled to length 1 in place; those no longer than rounding become zero."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.mul_(torch.where(norms > rounding, 1 / norms, 0.0))


def _range(X: torch.Tensor) -> tuple[float, float]:
    low, high = X.aminmax()
    return low.item(), high.item()


def _checked(X, y) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """X as a tensor, and the row numbers of each class."""
    if isinstance(X, np.ndarray) and X.dtype.kind == "f":
        X = torch.from_numpy(np.array(X, dtype=np.float64))  # copied: torch refuses some strides, byte orders
    if not isinstance(X, torch.Tensor) or not X.is_floating_point():
        what = getattr(X, "dtype", type(X).__name__)
        raise TypeError(f"X must be a floating torch.Tensor or NumPy array, got {what}; convert it first")
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must be a non-empty matrix (n, d), got shape {tuple(X.shape)}")
    low, high = _range(X)
    if not -_LARGEST <= low <= high <= _LARGEST:  # false for NaN
        raise ValueError(f"X must be finite and within +-{_LARGEST:g}, found the range {low} to {high}")
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
            found_nc1[name], found_nc2[name] = nc1(X, y), nc2(X, y)
        except EqualMeansError:
            found_nc1[name] = found_nc2[name] = float("inf")
    return found_nc1, found_nc2
