"""What the estimators share: parameters, data in and out, targets, and the file they are saved to."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import base
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils.validation import check_is_fitted

from fastagop.distributed.communicator import Communicator
from fastagop.distributed.engine import engine_of
from fastagop.estimators import inputs, persistence, target_means
from fastagop.estimators.calls import without_autograd_or_autocast
from fastagop.estimators.kernel_parameter import KernelParameter
from fastagop.estimators.kernel_ridge import AGOP_SCALES, KernelRidge
from fastagop.estimators.progress import check_verbose
from fastagop.estimators.types import Callbacks, ClassWeight, Device, DType, Rows, Self
from fastagop.kernels import backends, checks
from fastagop.kernels.operations import kernel_matmul
from fastagop.kernels.precision import dtype_name
from fastagop.kernels.profile import Kernel, median_factor
from fastagop.solvers.bandwidth import settled_at
from fastagop.solvers.solution import Solution
from fastagop.solvers.table import OPTIONS, Method, methods

# float32 holds every number of these dtypes.
_HELD = ("float32", "float16", "bfloat16", "int16", "int8", "uint16", "uint8", "bool")
# Every probability is at least the smaller of these, the second over the number of classes, before rows are normalised.
# Least squares does not tell smaller ones apart, and log losses of the RFM on small tables were best at 0.003 to 0.01.
_LEAST, _LEAST_SUM = 0.005, 0.05


@dataclass(frozen=True)
class Training:
    """The data that a fit trains on, rows of weight zero left out.

    Attributes:
        X: points (n, d) as the first kernel machine takes them.
        Y: targets (n, K), centred in regression.
        classes: class indices (n,), or None in regression.
        weights: float64 (n,), or None where all are 1.
    """

    X: torch.Tensor
    Y: torch.Tensor
    classes: torch.Tensor | None
    weights: torch.Tensor | None


class KernelEstimator(KernelParameter):
    """Base of estimators that end in a kernel machine; subclasses store their parameters and give the hooks below.

    Hooks: ``_validated_targets``, ``_targets`` and ``_original`` (see ``Classifier`` and ``Regressor``),
    ``_training_points``, ``_kernel_inputs``, ``_packed``, ``_restore``. ``fit`` calls ``_regression`` first, then
    ``_with_bandwidth``, and sets ``_centers`` and ``_alpha`` (the points of the kernel machine, copies merged, and
    their coefficients) and ``solution_`` (with a coefficient for every row).
    """

    # These are the parameters of every subclass, beside the kernel.
    ridge: float
    agop_scale: str
    precision: str
    backend: str
    device: Device
    dtype: DType
    callbacks: Callbacks
    verbose: int
    process_group: Any
    solver: Method
    memory_limit: float | None
    # These are set by fit.
    kernel_: Kernel
    n_features_in_: int
    _centers: torch.Tensor
    _alpha: torch.Tensor
    _torch_in: bool
    solution_: Solution

    def __sklearn_clone__(self) -> Self:
        """A clone works with the same process group: a group is a connection, and cannot be copied."""
        group, self.process_group = self.process_group, None
        try:
            fresh: Any = super().__sklearn_clone__()
        finally:
            self.process_group = group
        fresh.process_group = group
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies leave the process group behind."""
        return {**super().__getstate__(), "process_group": None}

    def _validated_targets(self, y) -> np.ndarray:
        """Targets or labels as an array, checked."""
        raise TypeError(f"{type(self).__name__} is neither a classifier nor a regressor")

    def _targets(self, y: np.ndarray, weights: np.ndarray | None):
        """(targets (n, K) in float64, class indices or None, weights) of what ``_validated_targets`` returned."""
        raise NotImplementedError

    def _original(self, data: Training) -> np.ndarray:
        """Labels or targets of training rows as they were given, targets to the rounding of the fit."""
        raise NotImplementedError

    def _training_points(self, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Training points (n, d) as the first kernel machine takes them, in the estimator's dtype."""
        raise NotImplementedError

    def _kernel_inputs(self, X: torch.Tensor) -> torch.Tensor:
        """New rows as the kernel machine sees them, float64."""
        raise NotImplementedError

    def _packed(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, description) that ``_restore`` needs beyond the kernel machine's own."""
        raise NotImplementedError

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        """Set the attributes that ``_packed`` gave."""
        raise NotImplementedError

    @property
    def _dtype(self) -> torch.dtype:
        return inputs.dtype(self.dtype)

    @property
    def _fitted_dtype(self) -> torch.dtype:
        """What ``_dtype`` was in fit, whatever the parameter has become; that of files of earlier versions is it."""
        return inputs.dtype(getattr(self, "_dtype_of_fit", self.dtype))

    def _regression(self) -> KernelRidge:
        """The shared parameters, checked; scikit-learn asks for this in fit, not in __init__."""
        checks.kernel(self.kernel, settled=False)
        checks.choice("agop_scale", self.agop_scale, AGOP_SCALES)
        checks.choice("precision", self.precision, checks.PRECISIONS)
        inputs.dtype(self.dtype)
        checks.choice("backend", self.backend, backends.names())
        ridge = checks.nonnegative("ridge", self.ridge)
        if type(self.solver) not in OPTIONS:
            checks.choice("solver", self.solver, methods())
        limit = checks.memory_limit(self.memory_limit)
        self._device = inputs.device(self.device)
        for operation in ("kernel_matrix", "solve"):  # a layer stores its kernel matrix
            if self.backend not in backends.names(operation):
                points = torch.empty(0, 0, dtype=self._dtype, device=self._device)
                backends.choose(self.backend, backends.Request(operation, self.kernel, points, self.precision))
        self._check_process()
        return KernelRidge(self.kernel, ridge, self.precision, self.backend, self.solver, limit)

    def _with_bandwidth(self, parameters, points: torch.Tensor):
        """The parameters of a fit with a number for their kernel's bandwidth, which becomes ``kernel_``.

        Args:
            parameters: a dataclass with a field ``kernel``.
            points: what the first kernel machine sees (r, d), copies merged.
        """
        engine = engine_of(self.process_group)
        kernel = settled_at(self.kernel, points)
        if median_factor(self.kernel) is not None:
            found = torch.tensor([kernel.bandwidth], dtype=torch.float64, device=points.device)
            kernel = replace(kernel, bandwidth=float(engine.broadcast(found)))
        self.kernel_ = kernel
        return replace(parameters, kernel=kernel)

    def _check_process(self) -> None:
        """Refuse callbacks, a verbosity or a process group that are none."""
        calls = self.callbacks
        if isinstance(calls, (str, bytes)) or not isinstance(calls, Sequence) or not all(map(callable, calls)):
            raise TypeError(f"callbacks must be a sequence of functions, got {calls!r}; pass () for none")
        check_verbose(self.verbose)
        if self.process_group is not None:
            Communicator(self.process_group, "fit", self._device)

    def _explain_fit(self, X, y, sample_weight=None) -> str:
        """What ``fastagop.explain`` says of a fit."""
        from fastagop.estimators.fit_plans import explain_fit

        return explain_fit(self, X, y, sample_weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to one safetensors file, which ``fastagop.load`` reads; nothing is pickled.

        The file is there whole or not at all and carries a checksum. Checkpoint folder, callbacks, process group and a
        ``random_state`` that is no integer, and functions belong to the process that trained: a loaded estimator has
        their defaults.

        Raises:
            NotFittedError: fit comes first. TypeError: a class of its own, which ``load`` would not know.
        """
        check_is_fitted(self)
        persistence.save(self, Path(path))

    def _training(self, X, y, sample_weight) -> Training:
        """The arguments of fit, checked, on the estimator's device; rows of weight zero are left out."""
        self._torch_in, self._dtype_of_fit = isinstance(X, torch.Tensor), dtype_name(self._dtype)
        rows = inputs.matrix(self, X, reset=True)
        y = self._validated_targets(y)
        inputs.same_length("y", y, len(rows))
        weights = inputs.weights(sample_weight, len(rows))
        rows, y, weights = inputs.weighted_rows(weights, rows, y)
        Y, codes, weights = self._targets(y, weights)
        rows, Y, codes, weights = inputs.weighted_rows(weights, rows, Y, codes)
        of_rows = None if weights is None else torch.from_numpy(weights).to(self._device)
        return Training(
            self._training_points(rows.to(self._device), of_rows),
            inputs.narrowed("y", torch.from_numpy(Y).to(self._device), self._dtype),
            None if codes is None else torch.from_numpy(codes).to(self._device),
            of_rows,
        )

    def _samples(self, X) -> torch.Tensor:
        """New rows, checked and moved. They are computed in float64, so that an answer does not depend on the batch."""
        return inputs.matrix(self, X, reset=False).to(self._device, torch.float64)

    @without_autograd_or_autocast
    def _outputs(self, X) -> torch.Tensor:
        """The kernel machine's f(X), shape (m, K), float64."""
        check_is_fitted(self)
        return self._outputs_at(self._samples(X))

    def _outputs_at(self, rows: torch.Tensor) -> torch.Tensor:
        """Outputs (m, K) at rows (m, d) that are checked and on the device already, float64."""
        return self._product(self._kernel_inputs(rows), self._centers, self._alpha)

    def _product(self, points: torch.Tensor, centers: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """k(points, centers) alpha, shape (m, K), for float64 points (m, d)."""
        # This product is in float64, which the backend of the fit may not have.
        backend = backends.serving(self.backend, backends.Request("kernel_matmul", self.kernel_, points))
        return kernel_matmul(self.kernel_, points, centers.double(), alpha.double(), backend=backend)

    def _with_outputs(self, outputs: torch.Tensor, X, others: Callable[[Any], torch.Tensor] | None = None):
        """This estimator, whose kernel machine answers for rows X by these outputs (m, K), for other rows by others."""

        def answers(rows) -> torch.Tensor:
            if rows is X or inputs.alike(rows, X):
                return outputs.clone()
            if others is None:
                raise ValueError("it asks for outputs of other rows than those it is given; only these are known")
            return others(rows)

        view: Any = copy.copy(self)
        view._outputs = answers
        return view

    def _packed_alpha(self) -> dict[str, torch.Tensor]:
        """The points' coefficients for a file, where they are not those of the rows."""
        return {} if self._alpha is self.solution_.alpha else {"readout": self._alpha}

    def _like_input(self, value: torch.Tensor, X, wide: bool = False):
        """A float64 result as X's kind, device and floating dtype; ``wide``: in float64 in any case."""
        if isinstance(X, torch.Tensor):
            keep = wide or not X.is_floating_point()
            return value.to(X.device) if keep else value.to(X)
        keep = wide or getattr(X, "dtype", None) != np.float32
        return value.cpu().numpy().astype(np.float64 if keep else np.float32)

    def _like_fit_input(self, value: torch.Tensor):
        """A trained tensor as the kind that fit was given."""
        return value if self._torch_in else value.cpu().numpy()


class Classifier(base.ClassifierMixin, KernelEstimator):
    """Targets and answers of a classifier."""

    class_weight: ClassWeight
    classes_: np.ndarray

    def _validated_targets(self, y) -> np.ndarray:
        return inputs.labels(y)

    def _targets(self, y: np.ndarray, weights: np.ndarray | None):
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, got one class: {self.classes_.tolist()[0]!r}")
        codes = codes.reshape(-1)
        Y = np.full((len(y), len(self.classes_)), -1.0)
        Y[np.arange(len(y)), codes] = 1.0
        factors = inputs.class_weights(self.class_weight, self.classes_, codes, weights)
        if factors is not None:
            with np.errstate(over="ignore"):
                weights = factors if weights is None else weights * factors
            inputs.finite_sum("class_weight", weights)
        return Y, codes, weights

    def _original(self, data: Training) -> np.ndarray:
        assert data.classes is not None
        return self.classes_[data.classes.cpu().numpy()]

    def decision_function(self, X: Rows) -> Any:
        """Outputs f(X): shape (m,) for two classes (positive means the second), (m, K) otherwise."""
        outputs = self._outputs(X)
        return self._like_input(outputs[:, 1] if len(self.classes_) == 2 else outputs, X)

    @without_autograd_or_autocast
    def predict_proba(self, X: Rows) -> Any:
        """Probabilities of the classes, shape (m, K), in the order of ``classes_``; every row sums to 1.

        Formula: least squares on targets of +-1 estimates f_c = 2 p_c - 1, so p_c is (f_c + 1) / 2, cut to at most
        1 and at least 0.005 (0.05 / K for more than ten classes), and divided by its sum over the classes. The largest
        belongs to the class of ``predict``.
        """
        outputs = self._outputs(X)
        p = ((outputs + 1.0) / 2.0).clamp_(min(_LEAST, _LEAST_SUM / outputs.shape[1]), 1.0)
        p = checks.tensor(self._like_input(p / p.sum(1, keepdim=True), X))
        # Rounding and the cut make ties, which the class of predict wins.
        best = outputs.argmax(1, keepdim=True).to(p.device)
        largest = p.amax(1, keepdim=True)
        tied = p.argmax(1, keepdim=True) != best
        above = torch.nextafter(largest, torch.full_like(largest, 2.0))
        p.scatter_(1, best, torch.where(tied, above, p.gather(1, best)))
        return p if isinstance(X, torch.Tensor) else p.numpy()

    def predict(self, X: Rows) -> Any:
        """Labels (m,): the class of the largest output."""
        best = self._outputs(X).argmax(1).cpu().numpy()
        found = self.classes_[best]
        if isinstance(X, torch.Tensor) and found.dtype.kind in "biuf" and found.dtype.itemsize <= 8:
            return torch.from_numpy(found).to(X.device)
        return found

    def score(self, X: Rows, y: Rows, sample_weight: Rows | None = None) -> float:
        """Accuracy of predict(X) against y."""
        predicted, weight = inputs.numpy("X", self.predict(X)), inputs.numpy("sample_weight", sample_weight)
        return accuracy_score(inputs.numpy("y", y), predicted, sample_weight=weight)


class Regressor(base.RegressorMixin, KernelEstimator):
    """Targets and answers of a regressor: the kernel machine learns what is left of them after a large offset."""

    _intercept: torch.Tensor

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    @property
    def _centred(self) -> bool:
        """Whether the mean of the targets is subtracted whatever their spread."""
        return False

    def _validated_targets(self, y) -> np.ndarray:
        kind = getattr(y, "dtype", None)
        name = dtype_name(kind) if isinstance(kind, torch.dtype) else getattr(kind, "name", str(kind))
        self._wide = name not in _HELD  # Predictions are then float64, as the targets were.
        y = inputs.targets(y)
        self._flat = y.ndim == 1
        return y.reshape(len(y), -1)

    def _targets(self, y: np.ndarray, weights: np.ndarray | None):
        with np.errstate(over="ignore", invalid="ignore"):
            mean = target_means.mean(y, weights) if self._centred else target_means.offset(y, weights)
            Y = y - mean
        if not np.isfinite(Y).all():
            raise ValueError("y is so large that its differences leave float64; divide y by a constant")
        self._intercept = torch.from_numpy(mean).to(self._device)
        return Y, None, weights

    def _original(self, data: Training) -> np.ndarray:
        y = (data.Y.double() + self._intercept).cpu().numpy()
        return y[:, 0] if self._flat else y

    @property
    def intercept_(self) -> Any:
        """What the kernel machine's output is added to: the targets' mean with ``fit_intercept=True``.

        Elsewhere their mean where it dwarfs their spread, or 0. A number, or (K,).
        """
        check_is_fitted(self)
        return float(self._intercept) if self._flat else self._like_fit_input(self._intercept)

    def predict(self, X: Rows) -> Any:
        """Predicted targets, shape (m,) or (m, K) as y was in fit; in float64 where X or y was."""
        outputs = self._outputs(X).add_(self._intercept)
        return self._like_input(outputs[:, 0] if self._flat else outputs, X, self._wide)

    def score(self, X: Rows, y: Rows, sample_weight: Rows | None = None) -> float:
        """R^2 of predict(X) against y."""
        predicted, weight = inputs.numpy("X", self.predict(X)), inputs.numpy("sample_weight", sample_weight)
        return r2_score(inputs.numpy("y", y), predicted, sample_weight=weight)

    def _packed(self):
        tensors, metadata = super()._packed()
        return {**tensors, "intercept": self._intercept}, {**metadata, "wide": self._wide}

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        self._intercept, self._wide = tensors.pop("intercept"), metadata["wide"]
        super()._restore(tensors, metadata)
