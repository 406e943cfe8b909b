"""The arguments of a probe, made ready: layers, labels or targets, and the rows that are held out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from fastagop.estimators import inputs
from fastagop.kernels import checks
from fastagop.kernels.errors import restated
from fastagop.rfm.validation import check_fraction

Layers = dict[Hashable, Any]  # activations (n, d) by layer, arrays or tensors
Activations: TypeAlias = "Mapping[Any, Any] | Sequence[Any] | np.ndarray | torch.Tensor"  # as they are given


@dataclass(frozen=True)
class Targets:
    """What is read from activations.

    Attributes:
        y: labels (n,), or float64 targets (n,) or (n, K).
        classes: the labels that there are, or None in regression.
    """

    y: np.ndarray
    classes: np.ndarray | None

    @property
    def codes(self) -> np.ndarray | None:
        """Class indices (n,), or None in regression."""
        return None if self.classes is None else np.searchsorted(self.classes, self.y)


def layers(activations) -> Layers:
    """Activations by layer, in float32 or float64, of which none is NaN or infinite.

    Raises:
        ValueError, TypeError: naming the layer.
    """
    if isinstance(activations, Mapping):
        found: Layers = dict(activations)
    elif isinstance(activations, (torch.Tensor, np.ndarray)):
        if activations.ndim != 3:
            more = "; [activations] is a single layer" if activations.ndim == 2 else ""
            raise ValueError(f"activations must have shape (layers, n, d), got {tuple(activations.shape)}{more}")
        found = dict(enumerate(activations))
    elif isinstance(activations, Sequence) and not isinstance(activations, (str, bytes)):
        found = dict(enumerate(activations))
    else:
        raise TypeError(
            "activations must be a mapping {layer: (n, d)}, a list of (n, d) or an array (layers, n, d), got "
            f"{type(activations).__name__}"
        )
    if not found:
        raise ValueError("activations must hold at least one layer, got none")
    found = {name: _rows(f"layer {name!r}", value) for name, value in found.items()}
    counts: dict[int, list] = {}
    for name, value in found.items():
        counts.setdefault(len(value), []).append(name)
    if len(counts) > 1:
        listed = "; ".join(f"{n} in {', '.join(map(repr, names))}" for n, names in counts.items())
        raise ValueError(f"layers must have the same rows, but their numbers differ: {listed}")
    return found


def _rows(name: str, value):
    """One layer's activations (n, d)."""
    value = inputs.dense(name, value) if isinstance(value, torch.Tensor) else _array(name, value)
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {value.dtype}")
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(
            f"{name} must have shape (n, d) with n, d >= 1, got {tuple(value.shape)}; of tokens, take one or their mean"
        )
    if isinstance(value, np.ndarray):
        value = value.astype(
            np.float32 if value.dtype.kind == "f" and value.dtype.itemsize <= 4 else np.float64, copy=False
        )
    elif value.dtype not in inputs.DTYPES.values():
        value = value.float() if value.is_floating_point() else value.double()
    if isinstance(value, np.ndarray) and not value.flags.writeable:  # of these torch warns
        value = value.copy()
    tensor = checks.tensor(value)
    if not checks.finite(tensor):
        bad = (~tensor.isfinite().all(1)).nonzero()[:, 0]
        raise ValueError(
            f"{name} holds NaN or infinity in {len(bad)} of {len(tensor)} rows, of which row {int(bad[0])} is the "
            "first; activations that leave float16 are infinite: compute them in bfloat16 or float32, or drop the layer"
        )
    return value


def _array(name: str, value) -> np.ndarray:
    """What is no tensor as an array."""
    if callable(getattr(value, "toarray", None)):
        raise TypeError(f"{name} must be a dense array, got {type(value).__name__}; use toarray()")
    inputs.refuse_no_rows(name, value)
    checks.unmasked(name, value)
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise restated(error, f"{name} must have shape (n, d), rows of the same length: {error}") from error


def targets(name: str, y) -> Targets:
    """Labels, or floats: those that are not just two whole numbers are targets of regression."""
    inputs.refuse_missing(name, y, "labels or targets")
    y = answers(name, y)
    try:
        if y.ndim == 2 or (y.dtype.kind == "f" and not _two_whole(y)):
            y = inputs.targets(y)
            if (y == y[0]).all():
                raise ValueError("all targets are equal: there is nothing to learn")
            return Targets(y, None)
        labels = inputs.labels(y)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"{name} must hold at least two classes, got one class: {classes.tolist()[0]!r}")
    return Targets(labels, classes)


def answers(name: str, y) -> np.ndarray:
    """Labels or targets as an array, one column without its axis."""
    y = np.asarray(inputs.numpy(name, y))
    if y.ndim == 0:
        raise ValueError(f"{name} must be labels (n,), or floats (n,) or (n, K), one for each row, got {y.item()!r}")
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def refuse_other_labels(y: np.ndarray, classes: np.ndarray | None) -> None:
    """Refuse labels to score that ``fit`` has not seen: they would count as rows of no class. None: regression."""
    if classes is None:
        return
    known, found = classes.tolist(), np.unique(y).tolist()
    mistaken = y.dtype.kind == "b" and not set(known) <= {False, True}  # True == 1, which is another label here
    if mistaken or not set(found) <= set(known):
        raise ValueError(f"y must hold labels that fit has seen, {known}, got {found}")


def _two_whole(y: np.ndarray) -> bool:
    """Whether floats are labels such as 0.0 and 1.0."""
    return len(y) > 0 and bool(np.isfinite(y).all()) and bool((y == np.round(y)).all()) and len(np.unique(y)) == 2


def read(activations, y) -> tuple[Layers, Targets]:
    """Activations by layer, and labels or targets, one for each of their rows."""
    found, known = layers(activations), targets("y", y)
    same_rows("y", found, known.y)
    return found, known


def same_rows(name: str, found: Layers, y: np.ndarray) -> None:
    """Refuse labels that are not one for each row of the layers."""
    n = len(next(iter(found.values())))
    if len(y) != n:
        raise ValueError(f"{name} must have one row per row of the layers: these have {n}, {name} has {len(y)}")


def same_columns(name: Hashable, rows, machine) -> None:
    """Refuse activations of a layer that are not as wide as those that its machine was fitted to."""
    if rows.shape[1] != machine.n_features_in_:
        raise ValueError(
            f"layer {name!r} must have {machine.n_features_in_} columns, as in probes.fit, got {rows.shape[1]}"
        )


def validation(given, found: Layers, known: Targets) -> tuple[Layers, Targets]:
    """Validation rows of the same layers, and their labels or targets."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        got = f"{len(given)} items" if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(f"validation must be a pair (activations, y), got {got}")
    try:
        held = layers(given[0])
    except (ValueError, TypeError) as error:
        raise restated(error, f"validation: {error}") from error
    if held.keys() != found.keys():
        raise ValueError(f"validation must have the layers {list(found)}, got {list(held)}")
    for name, value in held.items():
        if value.shape[1] != found[name].shape[1]:
            raise ValueError(
                f"validation: layer {name!r} must have {found[name].shape[1]} columns, got {value.shape[1]}"
            )
    inputs.refuse_missing("y of validation", given[1], "labels" if known.classes is not None else "targets")
    if known.classes is None:
        y = Targets(inputs.targets(answers("y of validation", given[1])), None)
        if y.y.shape[1:] != known.y.shape[1:]:
            raise ValueError(f"y of validation must have the columns of y, {known.y.shape[1:]}, got {y.y.shape[1:]}")
    else:
        y = Targets(inputs.labels(answers("y of validation", given[1])), known.classes)
        found_classes = np.unique(y.y)
        if found_classes.tolist() != known.classes.tolist():
            raise ValueError(
                f"the labels of validation must be those of y, {known.classes.tolist()}, each at least once, got "
                f"{found_classes.tolist()}"
            )
    same_rows("y of validation", held, y.y)
    return held, y


def split(known: Targets, fraction: float, random) -> tuple[np.ndarray, np.ndarray]:
    """(rows to learn from, rows held out), ascending; of every class that fraction, and at least one row on each side.

    Raises:
        ValueError: a class, or y, has a single row.
    """
    check_fraction(fraction)
    codes = np.zeros(len(known.y), dtype=int) if known.codes is None else known.codes
    held = []
    for code in range(codes.max() + 1):
        rows = random.permutation(np.flatnonzero(codes == code))
        if len(rows) < 2:
            what = "y" if known.classes is None else f"class {known.classes.tolist()[code]!r} of y"
            text = f"{what} has one row, which cannot be learnt from and held out; give validation="
            whole = known.classes is not None and known.classes.dtype.kind in "iu"
            raise ValueError(f"{text}, or y as floats, which mean regression" if whole else text)
        held.append(rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)])
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(codes)), held), held
