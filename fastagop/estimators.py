"""Deep RFM as scikit-learn estimators; NumPy or torch in, the same kind out."""

from __future__ import annotations

import numbers
from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from tqdm.auto import tqdm

from fastagop import deep_rfm, storage
from fastagop.checkpoint import Checkpoint
from fastagop.features import NAMES as FEATURES
from fastagop.kernels import _checks
from fastagop.kernels.operations import kernel_matmul
from fastagop.kernels.radial import Laplace
from fastagop.module import DeepRFMModule
from fastagop.ranks import Ranks
from fastagop.solve import report

_LAPLACE = Laplace(2.0)
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Parameters of the process that trained, not of what it trained: a saved estimator has their defaults.
_NOT_SAVED = ("checkpoint_dir", "callbacks", "process_group")


class _DeepRFM(TransformerMixin, BaseEstimator):
    """What the classifier and the regressor share; ``_targets`` is theirs."""

    def __init__(
        self,
        kernel=_LAPLACE,
        depth=20,
        features="relu",
        width=1024,
        feature_scale=None,
        ridge=0.0,
        agop_scale="max",
        precision="highest",
        backend="auto",
        device="auto",
        dtype="float32",
        random_state=None,
        checkpoint_dir=None,
        callbacks=(),
        verbose=0,
        process_group=None,
    ):
        self.kernel = kernel
        self.depth = depth
        self.features = features
        self.width = width
        self.feature_scale = feature_scale
        self.ridge = ridge
        self.agop_scale = agop_scale
        self.precision = precision
        self.backend = backend
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = callbacks
        self.verbose = verbose
        self.process_group = process_group

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
        raise TypeError("use DeepRFMClassifier or DeepRFMRegressor")

    @torch.no_grad()
    def fit(self, X, y):
        """Train layer by layer (paper, algorithm 1).

        Args:
            X: samples (n, d), NumPy array or torch tensor.
            y: labels (n,) (classifier), floats (n,) or (n, K) (regressor).

        Returns:
            self, with ``layers_``, ``agops_``, ``alphas_``.

        Raises:
            ValueError, TypeError: naming the parameter or argument. MemoryError: the kernel matrix does not fit.
            fastagop.distributed.RankLost: a process of the group died.

        Warns:
            NumericalWarning: per solve whose result had to be altered.
        """
        settings = self._settings()
        self._torch_in = isinstance(X, torch.Tensor)
        features = self._samples(X, reset=True)
        Y, classes = self._targets(y, features)
        group = self.process_group
        seeds = deep_rfm.seeds(check_random_state(self.random_state), settings.depth)
        begin = self._begin if group is None else self._begin_together
        checkpoint, seeds, self._layers, features = begin(settings, features, Y, classes, seeds)
        quiet, done = not self.verbose or (group is not None and checkpoint is None), len(self._layers)
        with tqdm(total=settings.depth, initial=done, desc="Deep RFM", unit="layer", disable=quiet) as bar:
            for index in range(done, settings.depth):
                layer, projected, features = deep_rfm.train_layer(features, Y, settings, seeds[index], classes, group)
                report(layer.record.solution, stacklevel=5)
                self._layers.append(layer)
                if checkpoint is not None:
                    checkpoint.save(index, layer, features)
                event = deep_rfm.LayerEvent(index, settings.depth, layer.record, projected, features, classes)
                for callback in self.callbacks:
                    callback(event)
                bar.update()
                if "projected" in layer.record.nc1:
                    bar.set_postfix(nc1=f"{layer.record.nc1['projected']:.1e}")
        self._centers, self.solution_ = deep_rfm.readout(features, Y, settings, group)
        report(self.solution_, stacklevel=5)
        return self._publish()

    def _begin(self, settings: deep_rfm.Settings, X: torch.Tensor, Y: torch.Tensor, classes, seeds: list[int]):
        """(checkpoint or None, seeds, finished layers, features entering the next one)"""
        if self.checkpoint_dir is None:
            return None, seeds, [], X
        task = "regression" if classes is None else "classification"
        wanted = None if self.random_state is None else seeds
        checkpoint = Checkpoint(self.checkpoint_dir, task, settings, X, Y, wanted)
        checkpoint.start(seeds)
        done, resumed = checkpoint.load()
        return checkpoint, checkpoint.seeds or seeds, done, X if resumed is None else resumed

    def _begin_together(self, settings: deep_rfm.Settings, X: torch.Tensor, Y: torch.Tensor, classes, seeds: list[int]):
        """What _begin says on the first rank, which alone reads and writes the checkpoint."""
        ranks = Ranks(self.process_group, "fit", X.device)
        given = "any" if self.random_state is None else seeds
        ranks.agree(lambda: None, f"{type(self).__name__}, {settings}, seeds {given}", X=X, Y=Y)
        checkpoint = None

        def first(_):
            nonlocal checkpoint
            checkpoint, own, done, features = self._begin(settings, X, Y, classes, seeds)
            packed = [storage.pack_layer(layer) for layer in done]
            sent = [({name: value.cpu() for name, value in tensors.items()}, words) for tensors, words in packed]
            return own, sent, features.cpu() if done else None

        seeds, packed, features = ranks.lead(first)
        layers = [storage.unpack_layer(tensors, words, X.device) for tensors, words in packed]
        return checkpoint, seeds, layers, X if features is None else features.to(X.device)

    def _publish(self):
        """Set the public attributes that are views of the trained layers."""
        self.layers_ = [layer.record for layer in self._layers]
        self.agops_ = [self._kept(layer.agop) for layer in self._layers]
        dtype = _DTYPES[self.dtype]
        self.alphas_ = [self._kept(layer.record.solution.alpha.to(dtype)) for layer in self._layers]
        return self

    @torch.no_grad()
    def transform(self, X, layer=None):
        """Features entering a layer.

        Args:
            X: samples (m, d). layer: 0 (the samples themselves) to depth (what the readout sees, the default).

        Returns:
            (m, width), of X's kind and dtype.
        """
        check_is_fitted(self)
        depth = len(self._layers)
        if layer is None:
            layer = depth
        if isinstance(layer, bool) or not isinstance(layer, numbers.Integral) or not 0 <= int(layer) <= depth:
            raise ValueError(f"layer must be an integer from 0 to {depth}, got {layer!r}")
        features = self._through(self._samples(X), int(layer))
        return self._answer(features, X)

    def to_module(self) -> torch.nn.Module:
        """The network this estimator is: the same outputs as decision_function (classifier) or predict (regressor)."""
        check_is_fitted(self)
        binary = len(getattr(self, "classes_", ())) == 2
        flat = not binary and getattr(self, "_flat", False)
        return DeepRFMModule(self._layers, self._kernel, self._centers, self.solution_.alpha, binary=binary, flat=flat)

    def save(self, path) -> None:
        """Write the fitted estimator to one safetensors file, which ``fastagop.load`` reads; nothing is pickled.

        The file is there whole or not at all and carries a checksum. ``checkpoint_dir``, ``callbacks`` and a
        ``random_state`` that is no integer belong to the process that trained: a loaded estimator has their defaults.

        Raises:
            NotFittedError: fit comes first. TypeError: a class of its own, which ``load`` would not know.
        """
        check_is_fitted(self)
        if type(self) not in _SAVED.values():
            raise TypeError(f"save knows {' and '.join(_SAVED)}, not {type(self).__name__}")
        tensors = {"centers": self._centers, "alpha": self.solution_.alpha}
        layers = []
        for index, layer in enumerate(self._layers):
            held, words = storage.pack_layer(layer)
            tensors.update({f"{index}.{name}": value for name, value in held.items()})
            layers.append(words)
        words = {
            "estimator": type(self).__name__,
            "parameters": {
                k: storage.pack_value(v) for k, v in self.get_params(deep=False).items() if k not in _NOT_SAVED
            },
            "kernel": storage.pack_kernel(self._kernel),
            "layers": layers,
            "solution": storage.pack_solution(self.solution_),
            "attributes": {k: storage.pack_value(getattr(self, k)) for k in _ATTRIBUTES if hasattr(self, k)},
            "versions": storage.versions(),
        }
        storage.write(Path(path), _KIND, tensors, words)

    def _restore(self, tensors: dict[str, torch.Tensor], words: dict) -> None:
        """Become the fitted estimator that was saved."""
        self._settings()
        self._kernel = storage.unpack_kernel(words["kernel"])
        tensors = {name: value.to(self._device) for name, value in tensors.items()}
        self._layers = []
        for index, layer in enumerate(words["layers"]):
            start = f"{index}."
            held = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            self._layers.append(storage.unpack_layer(held, layer, self._device))
        self._centers = tensors["centers"]
        self.solution_ = storage.unpack_solution(words["solution"], tensors["alpha"])
        for name in _ATTRIBUTES:
            if name in words["attributes"]:
                setattr(self, name, storage.unpack_value(words["attributes"][name]))
        self._publish()

    def _settings(self) -> deep_rfm.Settings:
        """The parameters, checked; scikit-learn wants this in fit, not in __init__."""
        _checks.kernel(self.kernel)
        for name in ("depth", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        _checks.choice("features", self.features, FEATURES)
        _checks.choice("agop_scale", self.agop_scale, deep_rfm.AGOP_SCALES)
        _checks.choice("precision", self.precision, _checks.PRECISIONS)
        _checks.choice("dtype", self.dtype, tuple(_DTYPES))
        scale = self.feature_scale
        if scale is not None and (self.features != "cos" or not _checks.nonnegative("feature_scale", scale)):
            raise ValueError(
                f"feature_scale is the positive scale of features='cos' and None otherwise, got {scale!r} with "
                f"features={self.features!r}"
            )
        ridge = _checks.nonnegative("ridge", self.ridge)
        self._kernel = self.kernel
        self._device = _device(self.device)
        return deep_rfm.Settings(
            self.kernel,
            int(self.depth),
            self.features,
            int(self.width),
            None if scale is None else float(scale),
            ridge,
            self.agop_scale,
            self.precision,
            self.backend,
        )

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
        return tensor.to(self._device, _DTYPES[self.dtype] if reset else torch.float64)

    def _through(self, features: torch.Tensor, layer: int) -> torch.Tensor:
        for step in self._layers[:layer]:
            features = deep_rfm.apply_layer(features, step)
        return features

    @torch.no_grad()
    def _outputs(self, X) -> torch.Tensor:
        """f(X), shape (m, K), float64."""
        check_is_fitted(self)
        last = deep_rfm.normalise_rows(self._through(self._samples(X), len(self._layers)))
        centers, alpha = self._centers.double(), self.solution_.alpha.double()
        backend = "torch" if self.backend == "triton" else self.backend  # this product is in float64
        return kernel_matmul(self._kernel, last, centers, alpha, backend=backend)

    def _answer(self, value: torch.Tensor, X):
        """A float64 result as X's kind, device and floating dtype."""
        if isinstance(X, torch.Tensor):
            return value.to(X)
        return value.cpu().numpy().astype(np.float32 if getattr(X, "dtype", None) == np.float32 else np.float64)

    def _kept(self, value: torch.Tensor):
        """A trained tensor as the kind that fit was given."""
        return value if self._torch_in else value.cpu().numpy()


class DeepRFMClassifier(ClassifierMixin, _DeepRFM):
    """Deep RFM classifier: kernel ridge(less) regression on +-1 one-hot labels, layer by layer.

    Each layer normalises its rows, solves (k(X, X) + ridge I) alpha = Y, takes M = AGOP of that predictor, and
    maps X <- Phi(M^(1/2) X) with untrained random features Phi; a last kernel machine reads the labels off
    (paper, algorithm 1; settings of appendix C).

    Args:
        kernel: ``Laplace(L)`` or ``Gaussian(L)``.
        depth: number of layers. features: "relu", ReLU(W x) with standard Gaussian W, or "cos",
            sqrt(2/width) cos(W x + b) with Cauchy W. width: number of features.
        feature_scale: scale of the Cauchy distribution; None for 0.05. Only with "cos".
        ridge: mu >= 0 added to the kernel matrix's diagonal.
        agop_scale: "max" divides M by its largest entry (the authors' code), "mean" by n (the paper's definition),
            "sum" not at all (the paper's algorithm 1).
        precision, backend: as in ``fastagop.kernel_matrix``, for ``fit``; "triton" fits only, since outputs for new
            rows are computed in float64 and Triton's products are float32.
        device: a torch device, or "auto": CUDA where there is one. dtype: "float32" or "float64".
        random_state: seed of the random features.
        checkpoint_dir: folder for finished layers; a fit of the same settings and data resumes from it.
        callbacks: functions called with a ``fastagop.deep_rfm.LayerEvent`` after each layer.
        verbose: 1 shows a progress bar.
        process_group: a ``torch.distributed`` group whose ranks share the work of fit (``fastagop.distributed``);
            every rank fits the same data and ends with the same estimator. The first one keeps the checkpoint and
            the progress bar; callbacks run on every rank. Prediction is not shared.

    Attributes:
        classes_: the labels. layers_: one ``LayerRecord`` a layer. agops_: M of each layer, scaled, (d_l, d_l).
        alphas_: coefficients of each layer (n, K). solution_: ``Solution`` of the readout (float64).
        n_features_in_: d.
    """

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


class DeepRFMRegressor(RegressorMixin, _DeepRFM):
    """Deep RFM regressor: kernel ridge(less) regression on float targets, layer by layer.

    Targets (n,) or (n, K) enter as they are; nothing is centred or scaled. Parameters, attributes and the
    algorithm are those of ``DeepRFMClassifier`` without ``classes_``; the collapse measures of ``layers_`` are
    empty, as there are no classes.
    """

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
        return torch.tensor(y).to(X), None

    def predict(self, X):
        """Predicted targets, shape (m,) or (m, K) as y was in fit."""
        outputs = self._outputs(X)
        return self._answer(outputs[:, 0] if self._flat else outputs, X)

    def score(self, X, y, sample_weight=None):
        """R^2 of predict(X) against y."""
        from sklearn.metrics import r2_score

        return r2_score(_numpy(y), _numpy(self.predict(X)), sample_weight=sample_weight)


_KIND = "fitted estimator"
_SAVED = {"DeepRFMClassifier": DeepRFMClassifier, "DeepRFMRegressor": DeepRFMRegressor}
_ATTRIBUTES = ("n_features_in_", "feature_names_in_", "classes_", "_flat", "_torch_in")


def load(path, device=None) -> DeepRFMClassifier | DeepRFMRegressor:
    """Read a fitted estimator that its ``save`` wrote; on the same device it predicts the same to the bit.

    Args:
        path: the file. device: where its tensors go; default its own ``device`` parameter.

    Returns:
        DeepRFMClassifier or DeepRFMRegressor, fitted.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged or was not written by ``save``, its kernel
            is defined nowhere, or its device is not there.
    """
    tensors, words = storage.read(Path(path), _KIND)
    if words["estimator"] not in _SAVED:
        raise ValueError(f"{path} holds a {words['estimator']}, which this version of fastagop does not have")
    parameters = {name: storage.unpack_value(value) for name, value in words["parameters"].items()}
    if device is not None:
        parameters["device"] = str(device)
    model = _SAVED[words["estimator"]](**parameters)
    model._restore(tensors, words)
    return model


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
