"""Trees of recursive feature machines for many rows: splits along directions that matter, a machine in every leaf."""

from __future__ import annotations

import numpy as np
import torch

from fastagop.estimators.base import Classifier, Regressor
from fastagop.estimators.types import ClassWeight, Device, DType, Scoring, Seed
from fastagop.kernels.profile import Kernel
from fastagop.kernels.radial import Laplace
from fastagop.rfm.estimator import RFMClassifier, RFMRegressor
from fastagop.rfm.leaves import RFMTree
from fastagop.solvers.table import Method

_LAPLACE = Laplace(10.0)


class RFMTreeClassifier(Classifier, RFMTree):
    """Tree of recursive feature machines, classifier, for more rows than one kernel matrix is made for.

    A node with more than ``leaf_size`` rows fits a small machine to a sample of them and divides them at the median of
    their projection on the direction that its metric stretches most, and so on; every leaf then has an
    ``RFMClassifier`` of its own. Time grows as n log n, and memory is that of a leaf. Near a split the leaves of both
    sides answer, as softly as held-out rows ask for. With at most ``leaf_size`` rows it is one machine, and predicts
    what ``RFMClassifier`` does with the same parameters.

    Args:
        kernel: of the leaves, and of the small machines that splits come from; a bandwidth such as
            ``Laplace("median")`` is settled in each of them.
        iterations, diagonal, center, ridge, agop_scale: as in ``RFMClassifier``; small machines have two iterations.
        precision, backend, device, dtype, solver, memory_limit: of all of them, as in ``RFMClassifier``.
        verbose: 1 shows a progress bar over leaves on a terminal, and logs every step at INFO.
        class_weight: as in ``RFMClassifier``, balanced over all rows.
        scale: "standard" divides every feature by its (weighted) standard deviation over all rows first; None leaves
            units alone.
        early_stopping, validation_fraction, n_iter_no_change, scoring, metric_samples: of the leaves, as in
            ``RFMClassifier``: each holds rows out, lets its best iteration predict, and solves with all rows at last.
        time_limit: seconds for the fit, shared out among leaves: no further iteration of a leaf begins beyond.
        random_state: seed of rows held out and of samples.
        leaf_size: distinct rows that a leaf has at most. A leaf has more only where nothing divides its rows, or
            where all of them have one label.
        split_samples: rows of which the machine that finds a split is made, at most.
        soft: let both sides answer near a split: sigmoid((projection - median) / (temperature * spread)) is the
            weight of the right one, and a leaf's weight the product along its path. The temperature, 0 among them, is
            the one with the best score (``scoring``) on ``validation_fraction`` of each leaf's rows, which then have
            no part in its metric.

    Attributes:
        tree_: the splits; ``print(model.tree_)`` draws them. Directions are of the features as the kernel sees them.
        leaves_: an ``RFMClassifier`` for each leaf from the left, in the units of the kernel (``scale``), or, where all
            rows have one label, a constant.
        temperature_: of the soft routing, in units of each split's spread (between quartiles); 0 is hard routing.
        classes_: the labels.
        n_features_in_: d.
        feature_importances_: mean of the leaves' own, weighted by their rows, (d,).
    """

    _MACHINE = RFMClassifier

    def __init__(
        self,
        kernel: Kernel = _LAPLACE,
        iterations: int = 5,
        diagonal: bool = False,
        center: bool = False,
        ridge: float = 1e-3,
        agop_scale: str = "max",
        precision: str = "highest",
        backend: str = "auto",
        device: Device = "auto",
        dtype: DType = "float32",
        verbose: int = 0,
        solver: Method = "auto",
        memory_limit: float | None = None,
        class_weight: ClassWeight = None,
        scale: str | None = "standard",
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int | None = None,
        scoring: Scoring = None,
        metric_samples: float | None = None,
        time_limit: float | None = None,
        random_state: Seed = None,
        leaf_size: int = 4000,
        split_samples: int = 1000,
        soft: bool = True,
    ):
        self._store(locals())

    def _widened(self, leaf, outputs: torch.Tensor) -> torch.Tensor:
        if len(leaf.classes_) == len(self.classes_):
            return outputs
        found = outputs.new_full((len(outputs), len(self.classes_)), -1.0)  # no row of the leaf had those classes
        found[:, np.searchsorted(self.classes_, leaf.classes_)] = outputs
        return found


class RFMTreeRegressor(Regressor, RFMTree):
    """Tree of recursive feature machines, regressor, for more rows than one kernel matrix is made for.

    Targets are (n,) or (n, K). Parameters, attributes and the algorithm are those of ``RFMTreeClassifier``, without
    ``class_weight`` and ``classes_``, with an ``RFMRegressor`` in every leaf; the default score is R^2.

    Args:
        fit_intercept: every leaf subtracts the mean of its targets, as in ``RFMRegressor``.

    Attributes:
        intercept_: what the leaves' outputs are added to: the mean of all targets; without ``fit_intercept`` 0, but for
            targets whose mean exceeds their spread more than four times.
    """

    _MACHINE = RFMRegressor
    fit_intercept: bool

    def __init__(
        self,
        kernel: Kernel = _LAPLACE,
        iterations: int = 5,
        diagonal: bool = False,
        center: bool = False,
        ridge: float = 1e-3,
        agop_scale: str = "max",
        precision: str = "highest",
        backend: str = "auto",
        device: Device = "auto",
        dtype: DType = "float32",
        verbose: int = 0,
        solver: Method = "auto",
        memory_limit: float | None = None,
        scale: str | None = "standard",
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int | None = None,
        scoring: Scoring = None,
        metric_samples: float | None = None,
        time_limit: float | None = None,
        random_state: Seed = None,
        fit_intercept: bool = True,
        leaf_size: int = 4000,
        split_samples: int = 1000,
        soft: bool = True,
    ):
        self._store(locals())

    @property
    def _centred(self) -> bool:
        return self.fit_intercept

    def _widened(self, leaf, outputs: torch.Tensor) -> torch.Tensor:
        return outputs + (leaf._intercept - self._intercept)
