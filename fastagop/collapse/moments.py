"""What the measures are made of: class means and scatter in float64, and what rounding of the features explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastagop.kernels import checks


class EqualMeansError(ValueError):
    """All class means coincide up to rounding: there is no between-class scatter to compare with."""


WEIGHTINGS = ("samples", "classes")
_LARGEST = 1e140  # Sums of squares of larger entries may overflow float64.
_EPS = torch.finfo(torch.float64).eps
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Moments:
    """Class means and scatter, in a unit (a power of two) in which the widest column is about 1 wide.

    Attributes:
        scale: what differences were multiplied by.
        sizes: samples of each class.
        scatters: of each class, the sum of squared distances of its samples from its mean.
        means: class means (K, d) minus the first sample, in long double.
        error: how far rounding of features and sums may have moved each mean, (K, d).
    """

    scale: float
    sizes: list[int]
    scatters: list[float]
    means: np.ndarray
    error: torch.Tensor

    def within(self, weighting: str = "samples") -> float:
        """tr(Sigma_W), every sample counting the same, or every class."""
        if weighting == "samples":
            total = 0.0
            for scatter in self.scatters:  # One after the other: sum() differs between versions of Python.
                total += scatter
            return total / sum(self.sizes)
        return math.fsum(self.variances()) / len(self.sizes)

    def variances(self) -> list[float]:
        """Mean squared distance of a class's samples from its mean, by class."""
        return [scatter / size for scatter, size in zip(self.scatters, self.sizes, strict=True)]

    def centred(self, weighting: str = "samples") -> torch.Tensor:
        """Class means relative to the mean of all, without what is rounding noise; not all of them zero."""
        means, noise = self._from_centre(weighting)
        kept = beyond(means, noise)
        if not bool(kept.any()):
            raise EqualMeansError(
                "X has equal class means up to rounding (Sigma_B = 0), so collapse is undefined; check that y "
                "belongs to X and that the features are not constant"
            )
        return kept

    def _from_centre(self, weighting: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Class means relative to the mean of all samples or of the classes, and what rounding may explain."""
        if weighting == "samples":
            shares = np.array(self.sizes, np.longdouble)[:, None] / sum(self.sizes)
        else:
            shares = np.full((len(self.sizes), 1), np.longdouble(1) / len(self.sizes))
        centred = self.means - (shares * self.means).sum(0)
        return as_tensor(centred, self.error), self.error + (as_tensor(shares, self.error) * self.error).sum(0)

    def axes(self, weighting: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions (d, r) in which the centred class means C differ by more than rounding, and C's lengths (r,)."""
        _, noise = self._from_centre(weighting)
        _, lengths, directions = torch.linalg.svd(self.centred(weighting), full_matrices=False)
        floor = max(float(torch.linalg.matrix_norm(noise)), len(noise) * _EPS * float(lengths[0]))
        kept = lengths > floor
        if not bool(kept.any()):
            raise EqualMeansError(
                f"X has class means that differ by less than rounding in {noise.shape[1]} columns together, so Sigma_B "
                "has no inverse; use metric='trace', or features in float64"
            )
        return directions[kept].T, lengths[kept]

    def mean_of_means(self, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of the class means as a float64 point, and what is missing to it, scaled."""
        mean, origin = self.means.mean(0), long(first)
        centre = (origin + mean / self.scale).astype(np.float64)
        rest = mean - (centre - origin) * self.scale
        return as_tensor(centre, self.error), as_tensor(rest, self.error)


@dataclass(frozen=True)
class ClassSums:
    """One class's samples in a unit: differences from the first of them are exact where the class has collapsed.

    Attributes:
        deviations: (n, d) of the samples from ``mean``, where asked for.
        mean, rest: mean relative to the first sample, and what rounding has left out of it, (d,).
        squares: sums of squared deviations by column.
        size: half-steps of the features' dtype at the largest entries, by column.
        reach: largest distance from the first sample by column.
    """

    deviations: torch.Tensor | None
    mean: torch.Tensor
    rest: torch.Tensor
    squares: torch.Tensor
    size: torch.Tensor
    reach: torch.Tensor


def class_sums(X: torch.Tensor, rows: torch.Tensor, scale: float, keep: bool = False) -> ClassSums:
    """Sums over some rows of X, in the unit 1 / scale; ``keep`` keeps the deviations."""
    # A step before the features were stored, and storing them, cost half of it each.
    rounding = torch.finfo(X.dtype).eps
    least = torch.finfo(X.dtype).smallest_normal * rounding  # This is the spacing of subnormal numbers.
    members = X[rows].double()
    size = members.abs().amax(0).mul_(scale).mul_(rounding).add_(least * scale)
    members.sub_(members[0].clone()).mul_(scale)
    reach = members.abs().amax(0)
    mean = members.mean(0)
    rest = members.sub_(mean).mean(0)
    squares = (members.square() if keep else members.square_()).sum(0)
    return ClassSums(members if keep else None, mean, rest, squares, size, reach)


def error_of_mean(squares: torch.Tensor, count: int, size: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """How far rounding may have moved a class mean, by column."""
    # Rounding errors of samples that are spread wider than them are independent, and average out.
    spread = (squares / count).sqrt() > 2 * size
    return torch.where(spread, min(1.0, 4 / count**0.5), 1.0) * size + 2 * _EPS * reach


def unit_of(widest: float) -> float:
    """The power of two that brings a width to about 1."""
    return 2.0 ** -max(-1000, math.frexp(widest)[1])


def width(X: torch.Tensor) -> float:
    """Largest minus smallest entry of the widest column."""
    return float((X.amax(0).double() - X.amin(0).double()).max())


def moments(X: torch.Tensor, classes: Sequence[torch.Tensor]) -> Moments:
    """Moments of samples in memory, class by class."""
    scale = unit_of(width(X))
    origin, scatters, means, errors = long(X[0]), [], [], []
    for rows in classes:
        sums = class_sums(X, rows, scale)
        scatters.append(sums.squares.sum().item())
        means.append((long(X[rows[0]]) - origin) * scale + long(sums.mean) + long(sums.rest))
        errors.append(error_of_mean(sums.squares, len(rows), sums.size, sums.reach))
    return Moments(scale, [len(rows) for rows in classes], scatters, np.stack(means), torch.stack(errors))


def beyond(rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Rows without the entries that noise explains, where these would outweigh the others of their row."""
    quiet = rows.abs() <= noise
    if not bool(quiet.any()):
        return rows
    parts = by_largest(rows)
    noisy = parts.square().mul_(quiet).sum(1) > parts.square().mul_(~quiet).sum(1)
    return rows.masked_fill(quiet & noisy[:, None], 0.0)


def by_largest(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their largest entry, so that squares keep it; zero rows stay zero."""
    largest = rows.abs().amax(1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1.0)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1; zero rows stay zero."""
    rows = by_largest(rows)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, 1.0))


def long(row: torch.Tensor) -> np.ndarray:
    """A row in long double."""
    return row.double().cpu().numpy().astype(np.longdouble)


def as_tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Long double values as float64, on a tensor's device."""
    return torch.from_numpy(values.astype(np.float64)).to(like.device)


def floating(name: str, value) -> torch.Tensor:
    """A floating array or tensor as a tensor with values in range, on a device that has float64."""
    checks.unmasked(name, value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        # There are no tensors of long double.
        dtype = value.dtype.newbyteorder("=") if value.dtype.itemsize <= 8 else np.float64
        # torch refuses some strides and byte orders, so this is a copy.
        value = torch.from_numpy(np.array(value, dtype=dtype, order="C"))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name} must be a floating torch.Tensor or NumPy array, got {kind}; convert it first")
    checks.plain(name, value)
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}; use {name}.float()")
    if value.device.type == "meta":
        raise ValueError(f"{name} must hold numbers, got a tensor on device meta; make it on 'cpu'")
    if value.numel():
        low, high = (end.item() for end in value.aminmax())
        if not -_LARGEST <= low <= high <= _LARGEST:  # The comparison is false for NaN.
            raise ValueError(f"{name} must be finite and within +-{_LARGEST:g}, found the range {low} to {high}")
    return value.detach() if value.device.type in ("cpu", "cuda") else value.detach().cpu()  # Others may lack float64.


def checked(X, y) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """X as a tensor, and the row numbers of each class, two classes at least."""
    X = floating("X", X)
    if X.ndim != 2 or 0 in X.shape:
        more = "; X.reshape(len(X), -1) makes it one" if X.ndim > 2 else ""
        raise ValueError(f"X must be a non-empty matrix (n, d), got shape {tuple(X.shape)}{more}")
    labels, rows = by_class(y, len(X))
    if len(labels) < 2:
        raise ValueError(f"y must have at least 2 classes, got only the label {labels[0]}")
    return X, [members.to(X.device) for members in rows]


def by_class(y, n: int) -> tuple[list[int], list[torch.Tensor]]:
    """The labels that there are, ascending, and the row numbers of each, in the given order."""
    dtype = str(y.dtype).removeprefix("torch.") if isinstance(y, torch.Tensor) else ""
    if isinstance(y, torch.Tensor):
        checks.plain("y", y)
        if y.is_meta:
            raise ValueError("y must hold numbers, got a tensor on device meta; make it on 'cpu'")
        y = (y.double() if y.is_floating_point() else y).detach().cpu().numpy()  # NumPy has no bfloat16.
    checks.unmasked("y", y)
    y = np.asarray(y)
    if y.dtype.kind not in "iu" and y.size:
        raise TypeError(
            f"y must hold integer labels, got {dtype or y.dtype}; number the classes, e.g. by "
            "np.unique(y, return_inverse=True)[1]"
        )
    if y.shape != (n,):
        raise ValueError(f"y must have one label for each of the {n} rows of X, got shape {y.shape}")
    labels, sizes = np.unique(y, return_counts=True)
    order = torch.from_numpy(np.argsort(y, kind="stable"))
    return labels.tolist(), list(order.split(sizes.tolist())) if len(labels) else []
