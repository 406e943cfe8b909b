"""Recursive feature machines as scikit-learn estimators: a kernel machine that learns its own metric ||x - z||_M."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastagop.estimators import inputs
from fastagop.estimators.base import Classifier, Regressor
from fastagop.estimators.types import Callbacks, ClassWeight, Device, DType, Scoring, Seed
from fastagop.kernels import checks
from fastagop.kernels.errors import restated, warn
from fastagop.kernels.profile import Kernel
from fastagop.kernels.radial import Laplace
from fastagop.rfm.machine import RecursiveFeatureMachine
from fastagop.solvers.table import Method

_LAPLACE = Laplace(10.0)


class RFMClassifier(Classifier, RecursiveFeatureMachine):
    """Recursive feature machine, classifier: kernel ridge regression on +-1 one-hot labels in a metric that it learns.

    The kernel is evaluated with ||x - z||_M = sqrt((x - z)^T M (x - z)), M = I at first. Each iteration solves
    (k_M(X, X) + ridge I) alpha = Y and takes M = AGOP of that predictor with respect to its input; one more solve with
    the last M follows (Radhakrishnan, Beaglehole, Pandit, Belkin, 2024; paper, section 3.3). That one predicts, unless
    validation rows say which iteration is best: those given to ``fit``, or held out with ``early_stopping``.

    Args:
        kernel: a kernel such as ``Laplace(10.0)``, or ``Laplace("median")``: the median distance of the points while M
            is I. The bandwidth is in the units of the features as the kernel sees them, which M rescales.
        iterations: number of AGOPs, at most where iterations end early; 0 is kernel ridge regression.
        diagonal: keep M's diagonal only: a weight for every feature, no rotation.
        center: subtract the mean gradient of each output before the outer product.
        ridge: mu >= 0 added to the kernel matrix's diagonal.
        agop_scale: "max" divides M by its largest entry (the authors' code), so that the bandwidth keeps its meaning
            from one iteration to the next; "mean" divides by n (the paper's definition), "sum" not at all.
        precision, backend: as in ``fastagop.kernel_matrix``, for ``fit``; "triton" fits only, since outputs for new
            rows are computed in float64 and Triton's products are float32.
        device: a torch device, or "auto": CUDA where there is one.
        dtype: "float32" or "float64", or torch's own.
        callbacks: functions called with a ``fastagop.rfm.IterationEvent`` after each iteration.
        verbose: 1 shows a progress bar on a terminal, and logs every step at INFO.
        process_group: a ``torch.distributed`` group whose ranks share the work of fit (``fastagop.distributed``);
            every rank fits the same data and ends with the same estimator. Prediction is not shared.
        solver: of every solve, what ``fastagop.solve`` takes as its ``method``: "auto", a name such as "cg", or options
            such as ``fastagop.ConjugateGradients(...)``.
        memory_limit: bytes that a solve or an AGOP may take.
        scale: "standard" divides every feature by its (weighted) standard deviation first, a constant one by its size;
            None leaves units alone.
        early_stopping: hold rows out, score every iteration on them, let the best one predict; its last solve has all
            rows. Iterations without a metric, number 0, count too.
        validation_fraction: of the rows, held out by ``early_stopping``; by class where classes are large enough.
        n_iter_no_change: iterations without a better score after which no more are tried; None tries all.
        scoring: name of a scikit-learn scorer or a function (estimator, X, y) -> number that ``early_stopping`` and
            validation rows go by; default accuracy, equal ones decided by the squared error of the outputs.
        metric_samples: number of rows, or fraction of them, that M is learnt from; the last solve has all. Default all.
        time_limit: seconds that iterations may take: none begins that would end later if it took as long as the one
            before. The first one is always made, and the last solve comes on top.
        random_state: seed of the rows held out and of those that M is learnt from.
        class_weight: weights of the classes, {label: weight}, or "balanced" for weights inversely proportional to
            the classes' sums of sample weights; they multiply sample weights.

    Attributes:
        kernel_: the kernel with a number for its bandwidth.
        M_: the metric in the units of the data, scaled, (d, d), or (d,) with ``diagonal``; float64 with ``scale``.
        iterations_: one ``IterationRecord`` each, with the score of its kernel regression where rows are validated.
        best_iteration_: number of AGOPs behind M_.
        validation_score_: scores after 0, 1, ... AGOPs, where rows are validated.
        solution_: ``Solution`` of the last solve (float64).
        classes_: the labels.
        n_features_in_: d.
        feature_importances_: the diagonal of M over its sum, (d,).
    """

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
        callbacks: Callbacks = (),
        verbose: int = 0,
        process_group: Any = None,
        solver: Method = "auto",
        memory_limit: float | None = None,
        class_weight: ClassWeight = None,
        scale: str | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int | None = None,
        scoring: Scoring = None,
        metric_samples: float | None = None,
        time_limit: float | None = None,
        random_state: Seed = None,
    ):
        self._store(locals())

    _of_fold = False  # whether a search's fold made the validation rows, which then may have no label that was learnt

    def _answers(self, name: str, y) -> np.ndarray:
        inputs.refuse_missing(name, y, "labels")
        try:
            found = inputs.labels(y)
        except (ValueError, TypeError) as error:
            raise restated(error, f"{name}: {error}") from error
        self._refuse_strangers(name, found)
        return found

    def _refuse_strangers(self, name: str, y: np.ndarray) -> None:
        """Raise where no label is one that was learnt, as of another kind; warn where some are not."""
        strange = ~(y[:, None] == self.classes_).any(1)
        if not strange.any():
            return
        label, known = y[strange][:1].tolist()[0], self.classes_.tolist()
        known = f"{known}" if len(known) <= 10 else f"{str(known[:10])[:-1]}, ...]"
        if strange.all() and not self._of_fold:
            raise ValueError(
                f"{name} holds none of y's labels {known}, but such as {label!r}; give labels as y has them"
            )
        text = (
            f"{name} holds labels that y does not, such as {label!r}: {strange.sum()} of {len(y)} rows count as wrong"
        )
        warn(text, UserWarning)

    def _codes(self, y: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(y[:, None] == self.classes_, 1.0, -1.0)).to(self._device)


class RFMRegressor(Regressor, RecursiveFeatureMachine):
    """Recursive feature machine, regressor: kernel ridge regression in a metric that it learns.

    Targets (n,) or (n, K) are centred: the kernel machine learns what is left of them after their (weighted) mean, and
    predictions add it again. Parameters, attributes and the algorithm are those of ``RFMClassifier``, without
    ``class_weight`` and ``classes_``; the default score is R^2, for which two rows are held out at least, of four or
    more.

    Args:
        fit_intercept: subtract the mean. Without it only a mean that exceeds the spread more than four times is, before
            anything is rounded, so that an offset costs no digits.

    Attributes:
        intercept_: what was subtracted: a number, or (K,). ``solution_`` and ``iterations_`` are those of what is left.
    """

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
        callbacks: Callbacks = (),
        verbose: int = 0,
        process_group: Any = None,
        solver: Method = "auto",
        memory_limit: float | None = None,
        scale: str | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int | None = None,
        scoring: Scoring = None,
        metric_samples: float | None = None,
        time_limit: float | None = None,
        random_state: Seed = None,
        fit_intercept: bool = True,
    ):
        self._store(locals())

    def _regression_and_rules(self):
        checks.flag("fit_intercept", self.fit_intercept)
        return super()._regression_and_rules()

    @property
    def _centred(self) -> bool:
        return self.fit_intercept

    def _answers(self, name: str, y) -> np.ndarray:
        inputs.refuse_missing(name, y, "targets")
        try:
            y = inputs.targets(y)
        except (ValueError, TypeError) as error:
            raise restated(error, f"{name}: {error}") from error
        outputs = 1 if y.ndim == 1 else y.shape[1]
        if outputs != len(self._intercept) or (y.ndim == 1) != self._flat:
            kind = "(m,)" if self._flat else f"(m, {len(self._intercept)})"
            raise ValueError(f"{name} must have shape {kind} as y has, got {y.shape}")
        return y

    def _codes(self, y: np.ndarray) -> torch.Tensor:
        return torch.tensor(y.reshape(len(y), -1), device=self._device) - self._intercept
