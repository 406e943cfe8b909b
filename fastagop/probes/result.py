"""What probes found: a record of every layer, and their combination."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastagop.estimators import inputs
from fastagop.estimators.types import Rows
from fastagop.probes import reading
from fastagop.probes.reading import Activations
from fastagop.rfm.validation import key


@dataclass(frozen=True, repr=False)
class Probe:
    """What was found at one layer.

    For every setting a recursive feature machine learns from the rows that are not held out, and each of its iterations
    is scored on those that are; equal scores are decided by the squared error of outputs. The best iteration of the
    best setting gives the score. That setting, with that number of iterations, then learns once more from all rows,
    metric included: estimator and directions are of that fit. With given validation rows nothing is learnt from them.

    Attributes:
        layer: its name.
        score: of rows that its predictor has not seen. It is the best of all that was tried, so a little too good:
            score rows of your own with ``Probes.score`` where that matters.
        bandwidth: of the kernel, a number.
        center: whether the mean gradient is subtracted.
        iterations: number of AGOPs behind the predictions; 0 is kernel ridge regression.
        directions: unit vectors (k, d) that the predictions depend on most, largest first, an array or a tensor as the
            activations are. Positive is towards the second of two classes, larger targets, or, of several outputs, more
            of the one that the projection is correlated with most. Where ``iterations`` is 0 there is no metric, and
            they are those of one AGOP.
        values: eigenvalues of the metric (k,).
        correlations: of the projections on the directions with the targets, over the rows that were learnt from, (k,).
        settings: {(bandwidth as given, center): scores after 0, 1, ... AGOPs}, of all that was tried.
        estimator: the fitted ``RFMClassifier`` or ``RFMRegressor``.
    """

    layer: Hashable
    score: float
    bandwidth: float
    center: bool
    iterations: int
    directions: Any
    values: Any
    correlations: Any
    settings: dict[tuple[Any, bool], np.ndarray]
    estimator: Any

    def __repr__(self) -> str:
        return (
            f"Probe({self.layer!r}: score {self.score:.4g}, bandwidth {self.bandwidth:.4g}, center {self.center}, "
            f"iterations {self.iterations}, directions {tuple(self.directions.shape)})"
        )


@dataclass(frozen=True, repr=False)
class Aggregate:
    """A linear combination of all layers: logistic or ridge regression on their standardised outputs.

    It is fitted on outputs for rows that had no part in what made them: the rows that are not held out are dealt into
    five folds, by class and the same for all layers, and the outputs for a fold are of the chosen setting learnt from
    the other four. Its score is of the rows held out, by the machines behind the layers' scores. New rows get the
    outputs of the layers' estimators.

    Attributes:
        score: of the same held-out rows as the layers' scores.
        weights: of the layers' standardised outputs, {layer: array}: one number for two classes or (n,) targets, else a
            number for each pair of an output of the combination and one of the layer.
        model: the scikit-learn pipeline, which takes the layers' outputs side by side.
    """

    score: float
    weights: dict[Hashable, Any]
    model: Any
    _estimators: dict[Hashable, Any] = field(compare=False)
    _scorer: Callable = field(compare=False)

    def _outputs(self, activations) -> np.ndarray:
        layers = reading.layers(activations)
        if missing := [name for name in self._estimators if name not in layers]:
            raise ValueError(f"activations must have every layer, but these are missing: {missing}")
        for name, machine in self._estimators.items():
            reading.same_columns(name, layers[name], machine)
        return side_by_side(outputs(machine, layers[name]) for name, machine in self._estimators.items())

    def predict(self, activations: Activations) -> np.ndarray:
        """Labels (m,), or targets (m,) or (m, K), of rows whose activations (m, d) of every layer are given."""
        return self.model.predict(self._outputs(activations))

    def decision_function(self, activations: Activations) -> np.ndarray:
        """The combination itself, of classes: (m,) for two, positive for the second, else (m, K)."""
        return self.model.decision_function(self._outputs(activations))

    def score_of(self, activations: Activations, y: Rows) -> float:
        """The score of other rows, by the ``scoring`` of ``fit``.

        Args:
            activations: of every layer that ``fit`` had, (m, d) each.
            y: their labels (m,), or targets (m,) or (m, K).

        Raises:
            ValueError: labels that ``fit`` has not seen.
        """
        found, y = reading.layers(activations), reading.answers("y", y)
        reading.same_rows("y", found, y)
        reading.refuse_other_labels(y, getattr(self.model, "classes_", None))
        return float(self._scorer(self.model, self._outputs(found), y))

    def __repr__(self) -> str:
        return f"Aggregate(score {self.score:.4g}, {len(self.weights)} layers)"


@dataclass(frozen=True, repr=False)
class Probes:
    """What probes found at all layers; prints as a table.

    Attributes:
        layers: {layer: ``Probe``}.
        aggregate: the combination of all layers, or None.
        scoring: name of the score.
        held_out: positions of the rows held out (m,), the same for all layers; None where validation rows were given.
        rows: number of rows in all, without given validation rows.
        classes: the labels, or None in regression.
    """

    layers: dict[Hashable, Probe]
    aggregate: Aggregate | None
    scoring: str
    held_out: np.ndarray | None
    rows: int
    classes: np.ndarray | None
    _scorer: Callable = field(compare=False)

    @property
    def scores(self) -> dict[Hashable, float]:
        """The score of every layer."""
        return {name: probe.score for name, probe in self.layers.items()}

    @property
    def best_layer(self) -> Hashable:
        """The layer with the best score, the first of equal ones; a score that is NaN counts as the worst."""
        return max(self.layers, key=lambda name: key(self.layers[name].score, 0.0))

    def _known(self, activations) -> list[tuple[Hashable, Any, Any]]:
        """[(layer, its estimator, activations)] of the layers that are given."""
        given = reading.layers(activations)
        if unknown := [name for name in given if name not in self.layers]:
            raise ValueError(f"activations hold layers that were not probed: {unknown}; known are {list(self.layers)}")
        for name, rows in given.items():
            reading.same_columns(name, rows, self.layers[name].estimator)
        return [(name, self.layers[name].estimator, rows) for name, rows in given.items()]

    def predict(self, activations: Activations) -> dict[Hashable, Any]:
        """{layer: labels (m,), or targets, of new rows}, for those of the layers whose activations (m, d) are given."""
        return {name: machine.predict(rows) for name, machine, rows in self._known(activations)}

    def decision_function(self, activations: Activations) -> dict[Hashable, Any]:
        """{layer: outputs, (m,) for two classes, positive for the second, else (m, K)}; of classes only."""
        if self.classes is None:
            raise AttributeError("decision_function is of classes; regression has predict")
        return {name: machine.decision_function(rows) for name, machine, rows in self._known(activations)}

    def score(self, activations: Activations, y: Rows) -> dict[Hashable, float]:
        """{layer: score of other rows}, by the ``scoring`` of ``fit``.

        Args:
            activations: of some of the layers that ``fit`` had, (m, d) each.
            y: their labels (m,), or targets (m,) or (m, K).

        Raises:
            ValueError: labels that ``fit`` has not seen.
        """
        known, y = self._known(activations), reading.answers("y", y)
        reading.same_rows("y", {name: rows for name, _, rows in known}, y)
        reading.refuse_other_labels(y, self.classes)
        return {name: float(self._scorer(machine, inputs.on_cpu(rows), y)) for name, machine, rows in known}

    def __repr__(self) -> str:
        width = max(len("aggregate"), *(len(str(name)) for name in self.layers))
        held = "given validation rows" if self.held_out is None else f"{len(self.held_out)} of them held out"
        lines = [
            f"Probes of {self.rows} rows ({held}); score: {self.scoring}; best layer: {self.best_layer!r}",
            f"{'layer':<{width}}   score  bandwidth  center  iterations",
        ]
        lines += [
            f"{name!s:<{width}}  {probe.score:6.4f}  {probe.bandwidth:9.4g}  {'yes' if probe.center else 'no':>6}  "
            f"{probe.iterations:10d}"
            for name, probe in self.layers.items()
        ]
        if self.aggregate is not None:
            lines.append(f"{'aggregate':<{width}}  {self.aggregate.score:6.4f}")
        return "\n".join(lines)


def outputs(estimator, rows) -> np.ndarray:
    """What a layer contributes to the combination: outputs of the classes, or predictions, (m, K) in NumPy."""
    found = estimator.decision_function(rows) if hasattr(estimator, "classes_") else estimator.predict(rows)
    found = np.asarray(inputs.numpy("outputs", found), dtype=np.float64)
    return found.reshape(len(found), -1)


def side_by_side(columns) -> np.ndarray:
    """The outputs of several layers as one matrix."""
    return np.concatenate(list(columns), axis=1)
