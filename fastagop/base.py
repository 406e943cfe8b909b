"""What the estimators share: data in and out, targets, dtype, device, and the file they are saved to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data

from fastagop import saving
from fastagop.kernels import _checks
from fastagop.kernels.operations import kernel_matmul
from fastagop.kernels.radial import Radial
from fastagop.regression import AGOP_SCALES, Machine
from fastagop.solve import Solution

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class KernelEstimator(TransformerMixin, BaseEstimator):
    """Base of estimators that end in a kernel machine; subclasses store their parameters and give the hooks below.

    Hooks: ``_targets`` (see ``Classifier`` and ``Regressor``), ``_mapped``, ``_packed``, ``_restore``. ``fit`` calls
    ``_machine`` first, and sets ``_centers`` and ``_alpha`` (the points of the kernel machine, copies merged, and their
    coefficients) and ``solution_`` (with a coefficient for every row).
    """

    # parameters of every subclass
    kernel: Radial
    ridge: float
    agop_scale: str
    precision: str
    backend: str
    device: str | torch.device
    dtype: str
    process_group: object
    # what fit sets
    _centers: torch.Tensor
    _alpha: torch.Tensor
    _torch_in: bool
    solution_: Solution

    def __sklearn_clone__(self):
        """A clone works with the same process group: a group is a connection, and cannot be copied."""
        group, self.process_group = self.process_group, None
        try:
            fresh = super().__sklearn_clone__()
        finally:
            self.process_group = group
        return fresh.set_params(process_group=group)  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self):
        """Pickles and copies leave the process group behind."""
        return {**super().__getstate__(), "process_group": None}

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.target_tags.required = True
        return tags

    def _targets(self, y, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(Y (n, K), class indices (n,) or None) from what fit was given."""
        raise TypeError(f"{type(self).__name__} is neither a classifier nor a regressor")

    def _mapped(self, X: torch.Tensor) -> torch.Tensor:
        """What the kernel machine sees of new rows, float64."""
        raise NotImplementedError

    def _packed(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, description) that ``_restore`` needs beyond the kernel machine's own."""
        raise NotImplementedError

    def _machine(self) -> Machine:
        """The shared parameters, checked; scikit-learn wants this in fit, not in __init__."""
        _checks.kernel(self.kernel)
        _checks.choice("agop_scale", self.agop_scale, AGOP_SCALES)
        _checks.choice("precision", self.precision, _checks.PRECISIONS)
        _checks.choice("dtype", self.dtype, tuple(DTYPES))
        _checks.choice("backend", self.backend, ("auto", "torch", "triton"))  # a layer stores its kernel matrix
        ridge = _checks.nonnegative("ridge", self.ridge)
        self._kernel = self.kernel
        self._device = _device(self.device)
        return Machine(self.kernel, ridge, self.precision, self.backend)

    def save(self, path) -> None:
        """Write the fitted estimator to one safetensors file, which ``fastagop.load`` reads; nothing is pickled.

        The file is there whole or not at all and carries a checksum. Checkpoint folder, callbacks, process group and a
        ``random_state`` that is no integer belong to the process that trained: a loaded estimator has their defaults.

        Raises:
            NotFittedError: fit comes first. TypeError: a class of its own, which ``load`` would not know.
        """
        check_is_fitted(self)
        saving.save(self, Path(path))

    def _samples(self, X, reset: bool = False) -> torch.Tensor:
        """X checked and moved: the estimator's dtype in fit, float64 after it.

        New rows are computed in float64, so that an answer does not depend on the batch a row comes in.
        """
        if isinstance(X, torch.Tensor):
            if X.ndim != 2 or not X.is_floating_point():
                raise ValueError(f"X must be a floating matrix, got {X.dtype} of shape {tuple(X.shape)}")
            if not _checks.finite(X):
                raise ValueError("X holds NaN or infinity; clean it first, for example with torch.nan_to_num")
            if reset:
                self.n_features_in_ = X.shape[1]
            elif X.shape[1] != self.n_features_in_:
                raise ValueError(f"X has {X.shape[1]} features, but fit saw {self.n_features_in_}")
            if 0 in X.shape:
                raise ValueError(f"X must have at least one row and one column, got shape {tuple(X.shape)}")
            tensor = X.detach()
        else:
            X = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])
            tensor = torch.from_numpy(np.array(X, order="C"))
        return tensor.to(self._device, DTYPES[self.dtype] if reset else torch.float64)

    @torch.no_grad()
    def _outputs(self, X) -> torch.Tensor:
        """f(X), shape (m, K), float64."""
        check_is_fitted(self)
        points = self._mapped(self._samples(X))
        centers, alpha = self._centers.double(), self._alpha.double()
        backend = "torch" if self.backend == "triton" else self.backend  # this product is in float64
        return kernel_matmul(self._kernel, points, centers, alpha, backend=backend)

    def _packed_alpha(self) -> dict[str, torch.Tensor]:
        """The points' coefficients for a file, where they are not those of the rows."""
        return {} if self._alpha is self.solution_.alpha else {"readout": self._alpha}

    def _answer(self, value: torch.Tensor, X):
        """A float64 result as X's kind, device and floating dtype."""
        if isinstance(X, torch.Tensor):
            return value.to(X)
        return value.cpu().numpy().astype(np.float32 if getattr(X, "dtype", None) == np.float32 else np.float64)

    def _kept(self, value: torch.Tensor):
        """A trained tensor as the kind that fit was given."""
        return value if self._torch_in else value.cpu().numpy()


class Classifier(ClassifierMixin, KernelEstimator):
    """Targets and answers of a classifier."""

    def _targets(self, y, X: torch.Tensor):
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        y = check_array(_numpy(y), ensure_2d=False, dtype=None)  # pyright: ignore[reportArgumentType]
        y = column_or_1d(y, warn=True)
        _same_length(X, y)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, got one class: {self.classes_[0]!r}")
        codes = torch.from_numpy(codes.reshape(-1)).to(X.device)
        Y = torch.full((len(X), len(self.classes_)), -1.0, dtype=X.dtype, device=X.device)
        Y[torch.arange(len(X), device=X.device), codes] = 1.0
        return Y, codes

    def decision_function(self, X):
        """Outputs f(X): shape (m,) for two classes (positive means the second), (m, K) otherwise."""
        outputs = self._outputs(X)
        return self._answer(outputs[:, 1] if len(self.classes_) == 2 else outputs, X)

    def predict(self, X):
        """Labels (m,): the class of the largest output."""
        best = self._outputs(X).argmax(1).cpu().numpy()
        labels = self.classes_[best]
        numeric = isinstance(X, torch.Tensor) and labels.dtype.kind in "biuf"
        return torch.from_numpy(labels).to(X.device) if numeric else labels

    def score(self, X, y, sample_weight=None):
        """Accuracy of predict(X) against y."""
        from sklearn.metrics import accuracy_score

        return accuracy_score(_numpy(y), _numpy(self.predict(X)), sample_weight=sample_weight)


class Regressor(RegressorMixin, KernelEstimator):
    """Targets and answers of a regressor."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _targets(self, y, X: torch.Tensor):
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        y = np.asarray(check_array(_numpy(y), ensure_2d=False, dtype="float64"))
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1)
        _same_length(X, y)
        return torch.from_numpy(y.copy()).to(X), None

    def predict(self, X):
        """Predicted targets, shape (m,) or (m, K) as y was in fit."""
        outputs = self._outputs(X)
        return self._answer(outputs[:, 0] if self._flat else outputs, X)

    def score(self, X, y, sample_weight=None):
        """R^2 of predict(X) against y."""
        from sklearn.metrics import r2_score

        return r2_score(_numpy(y), _numpy(self.predict(X)), sample_weight=sample_weight)


def _device(name) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {name!r} is not there ({error}); use 'auto' or 'cpu'") from error
    return device


def _numpy(value):
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _same_length(X, y) -> None:
    if len(y) != len(X):
        raise ValueError(f"y must have one row per row of X: X has {len(X)}, y has {len(y)}")
