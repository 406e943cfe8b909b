"""NC1, NC2, CDNV and the Gram matrix, of features that are in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch

from fastagop.collapse.moments import (
    WEIGHTINGS,
    EqualMeansError,
    Moments,
    beyond,
    checked,
    class_sums,
    moments,
    unit,
)
from fastagop.kernels import checks

Array = TypeVar("Array", torch.Tensor, np.ndarray)
METRICS = ("trace", "pinv")
_ROWS = 1024  # The Gram matrix's factor is made in blocks of so many rows.


@torch.no_grad()
def nc1(
    X: torch.Tensor | np.ndarray,
    y: torch.Tensor | np.ndarray,
    *,
    metric: str = "trace",
    weighting: str = "samples",
) -> float:
    """Within-class over between-class variability; 0 once every sample sits on its class mean.

    Formula: tr(Sigma_W) / tr(Sigma_B), with Sigma_W = (1/N) sum_i (x_i - mu_c(i)) (x_i - mu_c(i))^T,
    Sigma_B = (1/K) sum_c (mu_c - mu_G) (mu_c - mu_G)^T, mu_G the mean of all samples (paper, section 3.2).
    Metric "pinv" is tr(Sigma_W Sigma_B^+) / K, the variability relative to the class means' distances direction by
    direction (Papyan, Han & Donoho 2020). Directions in which the class means differ by no more than the rounding of
    the features count as none.

    Args:
        X: features (n, d), a floating tensor on any device or a NumPy array.
        y: integer labels (n,) of any values; classes may differ in size.
        metric: "trace" or "pinv".
        weighting: "samples" as above; "classes" gives every class the same weight, in Sigma_W and in mu_G.

    Returns:
        A float without units, the same for rotated, shifted or rescaled features.

    Raises:
        TypeError, ValueError: naming the argument. EqualMeansError, a ValueError: all class means coincide up to the
            rounding of the features in their dtype (Sigma_B = 0).
    """
    checks.choice("metric", metric, METRICS)
    checks.choice("weighting", weighting, WEIGHTINGS)
    points, classes = checked(X, y)
    found = moments(points, classes)
    if metric == "trace":
        return trace_ratio(found, weighting)
    axes, lengths = found.axes(weighting)
    total = 0.0
    for rows in classes:
        sums = class_sums(points, rows, found.scale, keep=True)
        assert sums.deviations is not None
        share = len(points) if weighting == "samples" else len(rows) * len(classes)
        total += (sums.deviations @ axes).div_(lengths).square_().sum().item() / share
    return total


@torch.no_grad()
def nc2(X: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray, *, weighting: str = "samples") -> float:
    """Distance of the class means from a simplex equiangular tight frame; 0 for an exact one.

    Formula: ||H H^T - Sigma_ETF||_F with rows (mu_c - mu_G) / ||mu_c - mu_G|| of H, zero for a class whose
    mean is mu_G up to the rounding of the features,
    and Sigma_ETF = (1 + 1/(K-1)) I - 1/(K-1) 1 1^T (paper, definition 3.1 and figure 3).

    Args, Raises: as ``nc1``. Returns a float without units.
    """
    checks.choice("weighting", weighting, WEIGHTINGS)
    return frame_distance(moments(*checked(X, y)), weighting)


@torch.no_grad()
def cdnv(X: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray) -> float:
    """Class-distance normalised variance: what two classes vary by, over their distance; 0 once they have collapsed.

    Formula: the mean over pairs c < e of (v_c + v_e) / (2 ||mu_c - mu_e||^2), v_c = (1/n_c) sum ||x_i - mu_c||^2 over
    the samples of class c (Galanti, György & Hutter 2022). Every pair counts the same, whatever the sizes.

    Args, Raises: as ``nc1``; EqualMeansError where two class means coincide up to rounding. Returns a float without
        units.
    """
    return distance_variance(moments(*checked(X, y)))


@torch.no_grad()
def gram(X: Array, y: torch.Tensor | np.ndarray) -> Array:
    """Cosines between all samples as seen from the mean of the class means, sorted by class.

    Formula: R R^T with rows (x_i - mu) / ||x_i - mu||, zero for a sample at mu up to rounding, mu = (1/K) sum_c mu_c.
    Collapsed data shows 1 within a class and -1/(K-1) between classes (paper, section 4.1 and figure 1).

    Args, Raises: as ``nc1``, except that class means may coincide.

    Returns:
        (n, n) of X's kind, dtype and device: classes in ascending order, within a class the given order.
    """
    points, classes = checked(X, y)
    found = moments(points, classes)
    centre, rest = found.mean_of_means(points[0])
    R = points.new_empty(points.shape, dtype=torch.float64)
    for out, rows in zip(R.split(_ROWS), torch.cat(classes).split(_ROWS), strict=True):
        block = points[rows].double()
        noise = block.abs().mul_(found.scale * torch.finfo(points.dtype).eps).add_(found.error.mean(0))
        out.copy_(unit(beyond(block.sub_(centre).mul_(found.scale).sub_(rest), noise)))
    result = R @ R.T
    return result.to(X.dtype).to(X.device) if isinstance(X, torch.Tensor) else result.numpy().astype(X.dtype)


def trace_ratio(found: Moments, weighting: str = "samples") -> float:
    """NC1 of moments."""
    centred = found.centred(weighting)
    largest = float(centred.abs().max())
    between = (centred / largest).square().sum().item() / len(centred)
    result = found.within(weighting) / largest / largest / between
    if math.isinf(result):
        raise EqualMeansError(
            f"X has class means that differ by {largest:.0e} of the spread of the samples (Sigma_B = 0 to rounding), "
            "so collapse is undefined; drop the columns that hold no classes, or bring all to one scale"
        )
    return result


def frame_distance(found: Moments, weighting: str = "samples") -> float:
    """NC2 of moments."""
    H = unit(found.centred(weighting))
    K = len(H)
    etf = (K * torch.eye(K, dtype=H.dtype, device=H.device) - 1) / (K - 1)
    return torch.linalg.matrix_norm(H @ H.T - etf).item()


def distance_variance(found: Moments) -> float:
    """CDNV of moments; differences of means are taken in long double, class by class."""
    variances, total = found.variances(), 0.0
    for c in range(len(variances) - 1):
        apart = torch.from_numpy((found.means[c + 1 :] - found.means[c]).astype(np.float64))
        error = (found.error[c + 1 :] + found.error[c]).cpu()
        kept = beyond(apart, error)
        largest = kept.abs().amax(1)
        if not bool((largest > 0).all()):
            other = c + 1 + int(largest.argmin())
            raise EqualMeansError(
                f"X has equal means of the classes at places {c} and {other} of the sorted labels up to rounding, so "
                "their distance is 0; merge them in y, or leave one of them out"
            )
        between = (kept / largest[:, None]).square_().sum(1)
        both = largest.new_tensor(variances[c + 1 :]) + variances[c]
        total += (both / largest / largest / between).sum().item() / 2
    result = total / (len(variances) * (len(variances) - 1) / 2)
    if math.isinf(result):
        raise EqualMeansError(
            "X has classes whose distance vanishes beside their spread to rounding; merge them in y, or drop the "
            "columns that hold no classes"
        )
    return result


def of_stages(
    stages: Mapping[str, torch.Tensor], y: torch.Tensor | np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """(NC1, NC2) of the same samples at several stages, by name; infinite where all class means coincide.

    Args:
        stages: {name: features (n, d)}, of which d may differ.
        y: integer labels (n,).

    Raises:
        TypeError, ValueError: as ``nc1``, but for class means that coincide.
    """
    if not isinstance(stages, Mapping):
        raise TypeError(f"stages must be a dictionary {{name: features}}, got {checks.shown(stages)}")
    found_nc1, found_nc2 = {}, {}
    for name, X in stages.items():
        try:
            found = moments(*checked(X, y))
            found_nc1[name], found_nc2[name] = trace_ratio(found), frame_distance(found)
        except EqualMeansError:
            found_nc1[name] = found_nc2[name] = float("inf")
    return found_nc1, found_nc2
