"""Measures of collapse over batches: what is kept of each class, and how two parts of it become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastagop.collapse import classifier, measures
from fastagop.collapse.moments import (
    WEIGHTINGS,
    Moments,
    by_class,
    class_sums,
    error_of_mean,
    floating,
    unit_of,
    width,
)
from fastagop.kernels import checks

Values = torch.Tensor | np.ndarray


@dataclass(frozen=True)
class _Class:
    """What is kept of the samples of a class seen so far, by column (d,).

    Attributes:
        origin: the first sample.
        count: samples.
        mean, squares: mean relative to the origin, and sums of squared deviations from it, in long double.
        low, high: smallest and largest entries.
        size: half-steps of the features' dtype at the largest entries.
    """

    origin: np.ndarray
    count: int
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    size: np.ndarray

    def apart(self, other: _Class) -> np.ndarray:
        """The other's mean minus this one's: nothing is lost where both are far from 0."""
        return (other.origin.astype(np.longdouble) - self.origin) + other.mean - self.mean

    def with_(self, other: _Class) -> _Class:
        """Both parts as one; every term of the squares is positive, so none cancels (Chan, Golub & LeVeque 1979)."""
        apart, count = self.apart(other), self.count + other.count
        share = np.longdouble(other.count) / count
        return _Class(
            self.origin,
            count,
            self.mean + share * apart,
            self.squares + other.squares + apart**2 * (self.count * share),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            np.maximum(self.size, other.size),
        )


class Accumulator:
    """NC1 to NC4 and CDNV of samples that come in batches, in float64: a few rows of length d are held for each class.

    Every class is shifted by its own first sample, so that collapsed classes keep their digits. Batches in any order,
    and the merging of accumulators of parts, agree to 1e-14, and agree as well with the functions of the same names.
    Accumulators can be pickled, and merged where they come from several processes.

    Args:
        covariance: keep the within-class scatter (d, d), too, which ``nc1(metric="pinv")`` needs.
    """

    def __init__(self, covariance: bool = False):
        checks.flag("covariance", covariance)
        self.covariance = covariance
        self._classes: dict[int, _Class] = {}
        self._columns: int | None = None
        self._scatter: torch.Tensor | None = None
        # The scatter is kept in this unit, a power of two, so that squares stay in float64: that of the largest entry.
        self._unit = math.inf

    def __repr__(self) -> str:
        columns = f", {self._columns} columns" if self._columns else ""
        return f"Accumulator({sum(self.counts)} samples of {len(self._classes)} classes{columns})"

    @property
    def labels(self) -> list[int]:
        """The labels seen so far, ascending."""
        return sorted(self._classes)

    @property
    def counts(self) -> list[int]:
        """Samples of each label."""
        return [self._classes[label].count for label in self.labels]

    @property
    def means(self) -> np.ndarray:
        """Class means (K, d) in float64, by ascending label."""
        parts = [self._classes[label] for label in self.labels]
        return np.array([part.origin + part.mean for part in parts]).astype(np.float64)

    @torch.no_grad()
    def update(self, X: Values, y: Values) -> Accumulator:
        """Add a batch: features (n, d) and integer labels (n,). An empty batch adds nothing.

        Returns:
            The accumulator itself, unchanged where the batch is refused.

        Raises:
            TypeError, ValueError: naming the argument, also where X has not the columns of the batches before.
        """
        X = self._batch(X)
        labels, rows = by_class(y, len(X))
        self._columns = X.shape[1]
        if not labels:
            return self
        scale = unit_of(width(X))
        if self.covariance:
            largest = max(map(abs, map(float, X.aminmax())))
            self._keep(unit_of(largest) if largest else math.inf)
        for label, members in zip(labels, rows, strict=True):
            self._add(label, *_part(X, members.to(X.device), scale, self.covariance))
        return self

    def extend(self, batches: Iterable[Any], features: Callable[[Any], Any] | None = None) -> Accumulator:
        """Add all batches (X, y, ...) of an iterable, such as a DataLoader.

        Args:
            batches: tuples or lists of which the first two items are X and y.
            features: what makes features (n, d) of X, such as a model without its last layer; it runs without
                gradients, a torch.nn.Module in evaluation mode, and is left in the mode that it was in. Default X
                itself.
        """
        for X, y in _pairs(batches, features):
            self.update(X, y)
        return self

    def merge(self, other: Accumulator) -> Accumulator:
        """Add what another accumulator has seen; the other one stays as it is. Returns the accumulator itself."""
        if not isinstance(other, Accumulator):
            raise TypeError(f"other must be a fastagop.collapse.Accumulator, got {type(other).__name__}")
        if other.covariance != self.covariance:
            raise ValueError(
                f"other must keep the covariance as this one does ({self.covariance}), got {other.covariance}; make "
                "both with the same covariance="
            )
        if None not in (self._columns, other._columns) and self._columns != other._columns:
            raise ValueError(f"other must have {self._columns} columns like this one, got {other._columns}")
        self._columns = self._columns or other._columns
        theirs, unit = other._scatter, other._unit
        if theirs is not None:
            self._keep(unit)
        for label, part in list(other._classes.items()):
            self._add(label, part)
        if theirs is not None and self._scatter is not None and unit < math.inf:
            self._scatter += theirs * (self._unit / unit) ** 2
        return self

    def nc1(self, *, metric: str = "trace", weighting: str = "samples") -> float:
        """``collapse.nc1`` of all samples; "pinv" needs ``covariance=True`` and weighs by samples."""
        checks.choice("metric", metric, measures.METRICS)
        checks.choice("weighting", weighting, WEIGHTINGS)
        if metric == "trace":
            return measures.trace_ratio(self._moments(), weighting)
        if not self.covariance:
            raise ValueError("metric='pinv' needs the within-class covariance; use Accumulator(covariance=True)")
        if weighting != "samples":
            raise ValueError(
                "weighting must be 'samples' with metric='pinv', got 'classes': one covariance is kept for all "
                "classes; use collapse.nc1 on features in memory"
            )
        found = self._moments()
        axes, lengths = found.axes(weighting)
        assert self._scatter is not None
        turned = (axes.T @ self._scatter @ axes).diagonal() * (found.scale / self._unit) ** 2
        return (turned / lengths / lengths).sum().item() / sum(found.sizes)

    def nc2(self, *, weighting: str = "samples") -> float:
        """``collapse.nc2`` of all samples."""
        checks.choice("weighting", weighting, WEIGHTINGS)
        return measures.frame_distance(self._moments(), weighting)

    def cdnv(self) -> float:
        """``collapse.cdnv`` of all samples."""
        return measures.distance_variance(self._moments())

    def nc3(self, W: Values, *, metric: str = "structure", weighting: str = "samples") -> float:
        """``collapse.nc3`` of a classifier's weights and all samples."""
        checks.choice("metric", metric, classifier.ERRORS)
        checks.choice("weighting", weighting, WEIGHTINGS)
        return classifier.duality_error(W, self._moments(), metric, weighting)

    @torch.no_grad()
    def nc4(
        self,
        W: Values,
        b: Values | None,
        batches: Iterable[Any],
        features: Callable[[Any], Any] | None = None,
        *,
        weighting: str = "samples",
    ) -> float:
        """``collapse.nc4`` on batches, against the class means accumulated: a second pass, or other data.

        Args:
            W, b, weighting: as in ``collapse.nc4``.
            batches, features: as in ``extend``.

        Raises:
            TypeError, ValueError: naming the argument, also where the batches hold no sample.
        """
        checks.choice("weighting", weighting, WEIGHTINGS)
        found = self._moments()
        rule = classifier.Rule(W, b, found, torch.from_numpy(self._classes[self.labels[0]].origin))
        hits, sizes = dict.fromkeys(self.labels, 0), dict.fromkeys(self.labels, 0)
        for X, y in _pairs(batches, features):
            points = self._batch(X)
            labels, rows = by_class(y, len(points))
            if unknown := set(labels) - set(hits):
                raise ValueError(f"batches hold the labels {sorted(unknown)}, of which no sample was accumulated")
            for label, members in zip(labels, rows, strict=True):
                hits[label] += int(rule.agrees(points[members.to(points.device)]).sum())
                sizes[label] += len(members)
        if not any(sizes.values()):
            raise ValueError("batches hold no sample; an iterator that was used up gives none")
        seen = [label for label in hits if sizes[label]]
        weights = [sizes[label] if weighting == "samples" else 1 for label in seen]
        return classifier.weighted([hits[label] / sizes[label] for label in seen], weights)

    def _batch(self, X: Values) -> torch.Tensor:
        X = floating("X", X)
        if X.ndim != 2 or X.shape[1] == 0:
            raise ValueError(f"X must be a matrix (n, d), got shape {tuple(X.shape)}; X.flatten(1) makes it one")
        if self._columns is not None and X.shape[1] != self._columns:
            raise ValueError(f"X must have {self._columns} columns like the batches before, got shape {tuple(X.shape)}")
        return X

    def _keep(self, unit: float) -> None:
        """Make room for a scatter of entries in some unit, infinite where all are 0; the smaller unit is taken."""
        assert self._columns is not None
        if self._scatter is None:
            with torch.inference_mode(False):  # What is made in that mode could not be added to outside of it.
                self._scatter = torch.zeros(self._columns, self._columns, dtype=torch.float64, device="cpu")
        if unit < self._unit:
            if self._unit < math.inf:
                self._scatter *= (unit / self._unit) ** 2
            self._unit = unit

    def _add(self, label: int, part: _Class, deviations: torch.Tensor | None = None) -> None:
        """One class of a batch, or of another accumulator, with its deviations where the scatter is kept."""
        before = self._classes.get(label)
        self._classes[label] = part if before is None else before.with_(part)
        if self._scatter is None or self._unit == math.inf:
            return
        if deviations is not None:
            deviations = deviations * self._unit
            self._scatter += deviations.T @ deviations
        if before is not None:
            factor = (before.count * part.count / (before.count + part.count)) ** 0.5
            step = torch.from_numpy((before.apart(part) * self._unit * factor).astype(np.float64))
            self._scatter += torch.outer(step, step)

    def _moments(self) -> Moments:
        """Of all samples, as ``moments`` finds them of samples in memory."""
        labels = self.labels
        if len(labels) < 2:
            seen = f"only the label {labels[0]}" if labels else "no sample; call update or extend"
            raise ValueError(f"y must have at least 2 classes, got {seen}")
        parts = [self._classes[label] for label in labels]
        low, high = (np.array([getattr(part, end) for part in parts]) for end in ("low", "high"))
        scale = unit_of(float((high.max(0) - low.min(0)).max()))
        origin = parts[0].origin.astype(np.longdouble)
        means = [((part.origin - origin) + part.mean) * scale for part in parts]
        squares = [(part.squares * np.longdouble(scale) ** 2).astype(np.float64) for part in parts]
        errors = [
            error_of_mean(
                torch.from_numpy(column),
                part.count,
                torch.from_numpy(part.size * scale),
                torch.from_numpy((part.high - part.low) * scale),
            )
            for part, column in zip(parts, squares, strict=True)
        ]
        scatters = [float(column.sum()) for column in squares]
        return Moments(scale, [part.count for part in parts], scatters, np.array(means), torch.stack(errors))


def _part(X: torch.Tensor, rows: torch.Tensor, scale: float, keep: bool) -> tuple[_Class, torch.Tensor | None]:
    """A class of one batch, and the deviations from its mean where they are to be kept."""
    sums = class_sums(X, rows, scale, keep)
    unscaled = np.longdouble(1) / np.longdouble(scale)
    mean = (_host(sums.mean).astype(np.longdouble) + _host(sums.rest)) * unscaled
    squares = _host(sums.squares).astype(np.longdouble) * unscaled**2
    low, high = X[rows].double().aminmax(dim=0)
    part = _Class(
        _host(X[rows[0]].double()), len(rows), mean, squares, _host(low), _host(high), _host(sums.size) / scale
    )
    return part, None if sums.deviations is None else sums.deviations.cpu() / scale


def _host(row: torch.Tensor) -> np.ndarray:
    return row.cpu().numpy()


@torch.no_grad()
def _features(X: Any, features: Callable[[Any], Any] | None) -> Any:
    if features is None:
        return X
    modes = [(part, part.training) for part in features.modules()] if isinstance(features, torch.nn.Module) else []
    try:
        for part, _ in modes:
            part.training = False
        # Features may be made in place, and X is the caller's.
        return features(X.clone() if isinstance(X, torch.Tensor) else X.copy() if isinstance(X, np.ndarray) else X)
    finally:
        for part, mode in modes:
            part.training = mode


def _pairs(batches: Iterable[Any], features: Callable[[Any], Any] | None) -> Iterable[tuple[Any, Any]]:
    """X and y of each batch, X made into features."""
    if features is not None and not callable(features):
        raise TypeError(f"features must be a function of X, such as a model, or None, got {type(features).__name__}")
    try:
        iter(batches)
    except TypeError:
        raise TypeError(
            f"batches must be an iterable of tuples (X, y), such as a DataLoader, got {type(batches).__name__}"
        ) from None
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            kind = f"a {type(batch).__name__}" if not isinstance(batch, (tuple, list)) else f"{len(batch)} item(s)"
            raise TypeError(f"batches must give tuples (X, y), got {kind}")
        yield _features(batch[0], features), batch[1]
