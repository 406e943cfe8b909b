"""The search for a layer's probe, and the combination of all layers."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastagop.estimators import inputs
from fastagop.estimators.progress import Progress, check_verbose
from fastagop.estimators.types import Device, DType, Rows, Scoring, Seed
from fastagop.kernels import checks
from fastagop.kernels.errors import NumericalWarning, restated, warn
from fastagop.kernels.profile import Kernel
from fastagop.kernels.radial import Laplace
from fastagop.probes import reading, scores
from fastagop.probes.reading import Activations, Targets
from fastagop.probes.result import Aggregate, Probe, Probes, outputs, side_by_side
from fastagop.rfm.estimator import RFMClassifier, RFMRegressor
from fastagop.rfm.validation import key, take

BANDWIDTHS = (("median", 0.3), "median", ("median", 3.0))
_FOLDS = 5  # of the rows that the combination is fitted on


@dataclass(frozen=True)
class Settings:
    """What all layers share: the parameters of a search, checked.

    Attributes:
        kernel: a class of kernels, or a kernel of which only the bandwidth changes.
        bandwidths, centers: what is tried.
        iterations: at most so many AGOPs.
        directions: how many are kept.
        regression: whether targets are numbers.
        common: parameters of every estimator.
    """

    kernel: Any
    bandwidths: tuple
    centers: tuple
    iterations: int
    directions: int
    regression: bool
    common: dict[str, Any]

    def machine(self, bandwidth, center: bool, iterations: int) -> Any:
        """An estimator, not fitted, with the parameters of a setting."""
        kind = RFMRegressor if self.regression else RFMClassifier
        return kind(_kernel(self.kernel, bandwidth), iterations=iterations, center=center, **self.common)


@dataclass(frozen=True)
class Part:
    """Rows that belong together: which of the given ones they are, None for all, and their labels or targets."""

    index: np.ndarray | None
    y: np.ndarray

    def of(self, rows):
        """The part's rows of a layer's activations."""
        return rows if self.index is None else take(rows, self.index)


def fit(
    activations: Activations,
    y: Rows,
    *,
    validation: tuple[Activations, Rows] | None = None,
    bandwidths: Sequence[float | str | tuple[str, float]] = BANDWIDTHS,
    centers: Sequence[bool] = (False, True),
    iterations: int = 5,
    ridge: float = 1e-3,
    kernel: type[Kernel] | Kernel = Laplace,
    validation_fraction: float = 0.2,
    scoring: Scoring = None,
    directions: int = 1,
    aggregate: bool = True,
    random_state: Seed = None,
    device: Device = "auto",
    dtype: DType = "float32",
    verbose: int = 0,
) -> Probes:
    """Probe every layer: choose bandwidth, centring and iteration on rows held out, then learn from all rows.

    ``Probe`` says what a score is, ``Aggregate`` how layers are combined.

    Args:
        activations: {layer: (n, d)} with any names, a list of (n, d), or (layers, n, d); NumPy arrays or torch tensors,
            float16 and bfloat16 included. d may differ between layers; more columns than rows cost little.
        y: labels (n,), also 0.0 and 1.0; or floats (n,) or (n, K), which are targets of regression.
        validation: (activations, y) of other rows: scores are of these then, and nothing is learnt from them.
        bandwidths: numbers in the units of the activations, "median", or ("median", factor), of each layer's distances.
        centers: whether the mean gradient of each output is subtracted before the outer product.
        iterations, ridge, device, dtype: as in ``RFMClassifier``; every iteration is scored.
        kernel: a class such as ``Laplace``, or a kernel of which the bandwidth is replaced.
        validation_fraction: of the rows, held out: of every class that part, at least one row.
        scoring: name of a scikit-learn scorer or a function (estimator, X, y) -> number, the larger the better. Default
            AUC for two classes, the mean AUC of each class against the rest for more, and in regression Pearson's
            correlation, the mean over targets.
        directions, aggregate: how many directions of a layer are kept, and whether layers are combined.
        random_state: seed of the rows held out and of the combination's folds.
        verbose: 1 shows a progress bar on a terminal.

    Raises:
        ValueError, TypeError: naming the argument, and the layer where it is one's.

    Warns:
        NumericalWarning: naming the layer, of the machine that is kept. UserWarning: scores are NaN.
    """
    layers, known = reading.read(activations, y)
    settings, random = _settings(locals(), known.classes), inputs.random(random_state)
    _check_directions(settings.directions, layers)
    if validation is None:
        learnt, out = reading.split(known, validation_fraction, random)
        learn, held, others = Part(learnt, known.y[learnt]), Part(out, known.y[out]), layers
    else:
        others, seen = reading.validation(validation, layers, known)
        learn, held = Part(None, known.y), Part(None, seen.y)
    folds = _folds(Targets(learn.y, known.classes), random) if aggregate else None
    work = Work(settings, known, learn, held, folds)
    with Progress("probes", "layer", len(layers), quiet=not verbose) as progress:
        return work.run(layers, others, progress)


@dataclass(frozen=True)
class Work:
    """What is done at every layer.

    Attributes:
        settings: what is tried.
        known: all labels or targets.
        learn, held: the rows that a search learns from and those that it is scored on.
        folds: of the rows to learn from, for the combination; None without one.
    """

    settings: Settings
    known: Targets
    learn: Part
    held: Part
    folds: list | None

    def run(self, layers: dict, others: dict, progress: Progress) -> Probes:
        """Probe all layers; ``others`` are the activations that rows are held out of."""
        inside, outside, scoring = [], [], self.settings.common["scoring"]
        found: dict[Hashable, Probe] = {}
        for name, rows in layers.items():
            with _named(name):
                found[name], *crossed = self._layer(name, rows, self.held.of(others[name]))
            if self.folds is not None:
                inside.append(crossed[0])
                outside.append(crossed[1])
            progress.step(score=f"{found[name].score:.4g}")
        machines = {name: probe.estimator for name, probe in found.items()}
        scorer, named = scores.scorer(next(iter(machines.values())), scoring)
        combined = None
        if self.folds is not None:
            combined = _aggregate(inside, self.learn.y, outside, self.held.y, machines, scorer)
        return Probes(found, combined, named, self.held.index, len(self.known.y), self.known.classes, scorer)

    def _layer(self, name: Hashable, rows, X_val) -> tuple:
        """(the probe, and for the combination its crossed outputs and those for the rows held out)."""
        X, settings = self.learn.of(rows), self.settings
        (bandwidth, center), best, tried = _search(X, self.learn.y, X_val, self.held.y, settings)
        count = best.best_iteration_
        final = best
        if self.learn.index is not None:  # Some rows were held out.
            final = settings.machine(bandwidth, center, count).fit(rows, self.known.y)
        stretched = final if count else settings.machine(bandwidth, center, 1).fit(rows, self.known.y)
        score, length = float(best.validation_score_[count]), float(final.kernel_.bandwidth)
        ways = stretched.directions(settings.directions)
        probe = Probe(name, score, length, center, count, ways.vectors, ways.values, ways.correlations, tried, final)
        if self.folds is None:
            return (probe,)
        setting = bandwidth, center, count
        return probe, _crossed(X, self.learn.y, self.folds, settings, setting), outputs(best, X_val)


def _settings(given: dict[str, Any], classes: np.ndarray | None) -> Settings:
    """The parameters of ``fit``, checked as far as the estimators do not."""
    for name in ("bandwidths", "centers"):
        if isinstance(given[name], (str, bytes)) or not isinstance(given[name], (tuple, list, np.ndarray)):
            raise TypeError(f"{name} must be a sequence of what to try, got {given[name]!r}")
        if len(given[name]) == 0:
            raise ValueError(f"{name} must hold at least one value to try, got none")
    for center in given["centers"]:
        checks.flag("centers", center)
    checks.flag("aggregate", given["aggregate"])
    check_verbose(given["verbose"])
    for bandwidth in given["bandwidths"]:
        _kernel(given["kernel"], bandwidth)
    scoring = scores.default(classes) if given["scoring"] is None else given["scoring"]
    common = {name: given[name] for name in ("ridge", "device", "dtype")}
    return Settings(
        given["kernel"],
        tuple(tuple(value) if isinstance(value, list) else value for value in given["bandwidths"]),
        tuple(map(bool, given["centers"])),
        checks.integer("iterations", given["iterations"], 0),
        checks.integer("directions", given["directions"], 1),
        classes is None,
        {**common, "scoring": scoring},
    )


def _check_directions(directions: int, layers: dict) -> None:
    """No layer has more directions than columns; said before any is searched."""
    for name, rows in layers.items():
        checks.integer(f"layer {name!r}: directions", directions, 1, rows.shape[1])


def _kernel(kernel, bandwidth):
    """The kernel, or one of the class, with a bandwidth; refuses kernels that have none."""
    made = kernel
    if isinstance(kernel, type) and issubclass(kernel, Kernel):
        if next(iter(inspect.signature(kernel).parameters), "") != "bandwidth":
            raise ValueError(
                f"kernel must be a class that is made of a bandwidth, such as Laplace, got {kernel.__name__}; "
                "give a kernel instead, such as LpLaplace(1.0, 1.0, 10.0), of which the bandwidth is replaced"
            )
        made = kernel(bandwidth)  # pyright: ignore[reportCallIssue]
    checks.kernel(made, settled=False)
    if not made.norm:
        raise ValueError(f"kernel must have a bandwidth, which probes choose, got {made!r}; take one such as Laplace")
    return made if isinstance(kernel, type) else made.set_params(bandwidth=bandwidth)


@contextlib.contextmanager
def _named(name: Hashable):
    """What goes wrong, or is warned of, at a layer says so."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except (ValueError, TypeError, MemoryError) as error:
        raise restated(error, f"layer {name!r}: {error}") from error
    found: dict[tuple, str] = {}
    for warning in caught:  # Of fits that warn of the same, one speaks, whichever of their solves it was.
        message = str(warning.message)
        found.setdefault((message.partition(": ")[2] or message, warning.category), message)
    for (_, category), message in found.items():
        warnings.warn(f"layer {name!r}: {message}", category, stacklevel=5)


@contextlib.contextmanager
def _tried():
    """Of what is only tried nothing is warned: some bandwidths say nothing about some layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        yield


def _search(X, y, X_val, y_val, settings: Settings) -> tuple[Any, Any, dict]:
    """((bandwidth, center) that is best, its machine, scores of all) on the rows held out."""
    best, chosen, tried = None, None, {}
    with _tried():
        for bandwidth in settings.bandwidths:
            for center in settings.centers:
                machine: Any = settings.machine(bandwidth, center, settings.iterations)
                machine.fit(X, y, X_val=X_val, y_val=y_val)
                tried[bandwidth, center] = machine.validation_score_
                place = machine.best_iteration_
                rank = key(machine.validation_score_[place], machine._validation_ties[place])
                if best is None or rank > best[0]:
                    best, chosen = (rank, machine), (bandwidth, center)
    assert best is not None
    return chosen, best[1], tried


def _folds(learn: Targets, random) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(rows to learn from, rows to answer)], by class where there are classes."""
    n = len(learn.y)
    if learn.codes is None or learn.classes is None:
        if n < 2:
            raise ValueError("aggregate=True needs at least two rows that are not held out; use aggregate=False")
        return list(KFold(min(_FOLDS, n), shuffle=True, random_state=random).split(np.zeros(n)))
    counts = np.bincount(learn.codes)
    if counts.min() < 2:
        label = learn.classes.tolist()[counts.argmin()]
        raise ValueError(
            f"aggregate=True needs at least two rows of every class that are not held out, but class {label!r} has "
            f"{counts.min()}; use aggregate=False, or give more rows"
        )
    folds = StratifiedKFold(min(_FOLDS, int(counts.min())), shuffle=True, random_state=random)
    return list(folds.split(np.zeros(n), learn.codes))


def _crossed(X, y, folds, settings: Settings, setting) -> np.ndarray:
    """Outputs (n, K) for rows X, each by a machine of the setting that has not seen its fold."""
    found: Any = None
    with _tried():
        for rest, fold in folds:
            answers = outputs(settings.machine(*setting).fit(take(X, rest), y[rest]), take(X, fold))
            found = np.empty((len(y), answers.shape[1])) if found is None else found
            found[fold] = answers
    return found


def _aggregate(inside, y, outside, y_val, machines: dict, scorer) -> Aggregate:
    """The combination fitted on the layers' crossed outputs, scored on those for the rows held out."""
    classes = hasattr(next(iter(machines.values())), "classes_")
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000) if classes else Ridge())
    model.fit(side_by_side(inside), y)
    score = float(scorer(model, side_by_side(outside), y_val))
    if math.isnan(score):
        warn("scoring: the score of the aggregate is NaN on the rows held out", UserWarning)
    parts = np.split(np.atleast_2d(model[-1].coef_), len(machines), axis=1)
    weights = dict(zip(machines, (part.item() if part.size == 1 else part for part in parts), strict=True))
    return Aggregate(score, weights, model, machines, scorer)
