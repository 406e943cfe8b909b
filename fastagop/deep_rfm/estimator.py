"""Deep RFM as scikit-learn estimators; NumPy or torch in, the same kind out."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.utils._set_output import _wrap_data_with_container
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted

from fastagop.deep_rfm import fit_plan
from fastagop.deep_rfm import layer as layer_module
from fastagop.deep_rfm.checkpoint import Checkpoint
from fastagop.deep_rfm.layer import Layer, LayerEvent, LayerRecord, LayerTraining, Settings, normalise_rows
from fastagop.deep_rfm.layer_files import pack_layer, unpack_layer
from fastagop.deep_rfm.module import DeepRFMModule, Readout
from fastagop.deep_rfm.random_features import FEATURES
from fastagop.distributed.communicator import Communicator
from fastagop.distributed.engine import engine_of
from fastagop.estimators import inputs, shared_fits
from fastagop.estimators.base import Classifier, KernelEstimator, Regressor, Training
from fastagop.estimators.calls import all_or_nothing, without_autograd_or_autocast
from fastagop.estimators.progress import Progress
from fastagop.estimators.types import Callbacks, ClassWeight, Device, DType, Rows, Seed, Self
from fastagop.kernels import checks
from fastagop.kernels.memory.matrices import kept_matrices
from fastagop.kernels.profile import Kernel
from fastagop.kernels.radial import Laplace
from fastagop.solvers import copies, row_order
from fastagop.solvers.solution import Solution, warn_about
from fastagop.solvers.table import Method

_LAPLACE = Laplace(2.0)
_POINTS = ", once divided by their length (x and 2 x are one point here),"  # in warnings about copies


@dataclass
class _Start:
    """Where a fit begins: at its first layer, or after those that its checkpoint holds.

    Attributes:
        checkpoint: which takes the layers to come, or None.
        seeds: of all layers.
        layers: finished ones.
        features: what enters the next one, (n, d).
    """

    checkpoint: Checkpoint | None
    seeds: list[int]
    layers: list[Layer]
    features: torch.Tensor


class _Layers:
    """Features of every layer, in the container that ``set_output`` asks for.

    A class of its own, since scikit-learn would wrap the method of an estimator and name all layers' columns alike.
    """

    @without_autograd_or_autocast
    def transform(self: Any, X: Rows, layer: int | None = None) -> Any:
        """Features entering a layer.

        Args:
            X: samples (m, d).
            layer: 0 (the samples themselves) to depth (what the readout sees, the default).

        Returns:
            (m, width), of X's kind and dtype.
        """
        check_is_fitted(self)
        depth = len(self._layers)
        layer = depth if layer is None else checks.integer("layer", layer, 0, depth)
        answer = self._like_input(self._through(self._samples(X), layer), X)
        columns = SimpleNamespace(
            get_feature_names_out=self.get_feature_names_out if layer else lambda: _check_feature_names_in(self),
            _sklearn_output_config=getattr(self, "_sklearn_output_config", {}),
            _sklearn_auto_wrap_output_keys={"transform"},
        )
        return _wrap_data_with_container("transform", answer, X, columns)


class _DeepRFM(_Layers, KernelEstimator):
    """The parts that the classifier and the regressor share."""

    depth: int
    features: str
    width: int
    feature_scale: float | None
    random_state: Seed
    checkpoint_dir: str | os.PathLike[str] | None
    # These are set by fit.
    layers_: list[LayerRecord]
    agops_: list[Any]
    alphas_: list[Any]
    solution_: Solution

    @all_or_nothing
    @without_autograd_or_autocast
    def fit(self, X: Rows, y: Rows, sample_weight: Rows | None = None) -> Self:
        """Train layer by layer (paper, algorithm 1).

        Args:
            X: samples (n, d), NumPy array, DataFrame or torch tensor.
            y: labels (n,) (classifier), floats (n,) or (n, K) (regressor).
            sample_weight: w >= 0, (n,): every solve is (K + ridge W^-1) alpha = Y and every AGOP a weighted sum, so
                that a weight of 2 counts as a row written twice and a weight of 0 as a row left out. Default 1.

        Returns:
            self, with ``kernel_``, ``layers_``, ``agops_``, ``alphas_``.

        Raises:
            ValueError, TypeError: naming the parameter or argument. MemoryError: the kernel matrix does not fit.
            fastagop.locks.FolderInUse, a ValueError: another process fits in checkpoint_dir (naming it).
            fastagop.distributed.RankLost: a process of the group died.

        Warns:
            NumericalWarning: per solve whose result had to be altered.
        """
        with shared_fits.refusals_told(self):
            settings, random = self._settings(), inputs.random(self.random_state)
            data = self._training(X, y, sample_weight)
        seeds = layer_module.seeds(random, settings.depth)
        # Copies in the points of the first layer, rows divided by their length, stay one point in all layers.
        rows = copies.find(normalise_rows(data.X), data.weights)
        begin = self._begin if self.process_group is None else self._begin_together
        start, reported = begin(settings, data, seeds), set()
        self._layers = start.layers
        with start.checkpoint or contextlib.nullcontext():
            settings = self._with_bandwidth(settings, normalise_rows(rows.take(data.X)))
            rows = row_order.by_class(rows, data.classes)  # a bandwidth is that of the order given
            training = LayerTraining(data.Y, settings, rows, data.classes, engine_of(self.process_group))
            points = self._train(training, start, reported)
        self._centers, solved = training.readout(points, self._layers[-1].record.solution)
        self.solution_, self._alpha = solved.solution, solved.alpha
        warn_about(self.solution_, reported, _POINTS, which="of the readout")
        return self._publish()

    @kept_matrices()
    def _train(self, training: LayerTraining, start: _Start, reported: set) -> torch.Tensor:
        """Add the layers that are missing to those there are; returns the points that enter the readout."""
        rows, depth, done = training.rows, training.settings.depth, len(start.layers)
        points, rest = rows.take(start.features), rows.rest(start.features)
        with Progress("Deep RFM", "layer", depth, done=done, quiet=shared_fits.quiet(self)) as progress:
            for index in range(done, depth):
                before = self._layers[-1].record.solution if self._layers else None
                layer, made = training.layer(points, start.seeds[index], rest, before)
                points, rest = made.points, made.rest
                self._layers.append(layer)
                done = functools.partial(self._after, index, layer, made, training, start, reported)
                what = "what follows a layer (checkpoint, callbacks, warnings)"
                training.engine.together(done, what, points.device)
                nc1 = layer.record.nc1
                progress.step(**{"nc1": f"{nc1['projected']:.1e}"} if "projected" in nc1 else {})
        return points

    def _after(self, index: int, layer: Layer, made, training: LayerTraining, start: _Start, reported: set) -> None:
        """Warn of what a layer's solve altered, save the layer, and call callbacks."""
        warn_about(layer.record.solution, reported, _POINTS, which=f"of layer {index + 1}")
        if start.checkpoint is not None:
            start.checkpoint.save(index, layer, made.features)
        depth = training.settings.depth
        event = LayerEvent(index, depth, layer.record, made.projected, made.features, training.classes)
        for callback in self.callbacks:
            callback(event)

    def _begin(self, settings: Settings, data: Training, seeds: list[int]) -> _Start:
        """The first layer, or the one after those that the checkpoint folder holds."""
        if self.checkpoint_dir is None:
            return _Start(None, seeds, [], data.X)
        checkpoint = Checkpoint(self.checkpoint_dir, settings, data, None if self.random_state is None else seeds)
        checkpoint.start(seeds)
        layers, features = checkpoint.load()
        return _Start(checkpoint, checkpoint.seeds or seeds, layers, data.X if features is None else features)

    def _begin_together(self, settings: Settings, data: Training, seeds: list[int]) -> _Start:
        """The start that ``_begin`` finds on the first rank, which alone reads and writes the checkpoint."""
        ranks = Communicator(self.process_group, "fit", data.X.device)
        agreed = f"{type(self).__name__}, {settings}, seeds {'any' if self.random_state is None else seeds}"
        agreed += shared_fits.classes(self)
        ranks.agree(lambda: None, agreed, X=data.X, Y=data.Y, sample_weight=data.weights)
        checkpoint = None

        def begin_on_first(_):
            nonlocal checkpoint
            start = self._begin(settings, data, seeds)
            checkpoint = start.checkpoint
            packed = []
            for layer in start.layers:
                tensors, metadata = pack_layer(layer)
                packed.append(({name: value.cpu() for name, value in tensors.items()}, metadata))
            return start.seeds, packed, start.features.cpu() if packed else None

        try:
            seeds, packed, features = ranks.run_on_root(begin_on_first)
        except BaseException:
            if checkpoint is not None:
                checkpoint.close()
            raise
        layers = [unpack_layer(tensors, metadata, data.X.device) for tensors, metadata in packed]
        return _Start(checkpoint, seeds, layers, data.X if features is None else features.to(data.X.device))

    def _publish(self) -> Self:
        """Set the public attributes that are views of the trained layers."""
        self.layers_ = [layer.record for layer in self._layers]
        self.agops_ = [self._like_fit_input(layer.agop) for layer in self._layers]
        self.alphas_ = [
            self._like_fit_input(layer.record.solution.alpha.to(self._fitted_dtype)) for layer in self._layers
        ]
        return self

    def _planned_fit(self):
        """For ``fastagop.explain``: (data, ranks) -> the steps of a fit, of parameters that are checked now."""
        settings = self._settings()
        return functools.partial(fit_plan.layer_steps, settings=settings, classes=hasattr(self, "class_weight"))

    def to_module(self) -> torch.nn.Module:
        """The network this estimator is: the same outputs as decision_function (classifier) or predict (regressor)."""
        check_is_fitted(self)
        checks.radial(self.kernel_, "to_module", "predict with the estimator itself")
        binary = len(getattr(self, "classes_", ())) == 2
        flat = not binary and getattr(self, "_flat", False)
        readout = Readout(self.kernel_, self._centers, self._alpha, getattr(self, "_intercept", None))
        return DeepRFMModule(self._layers, readout, binary=binary, flat=flat)

    def _packed(self):
        tensors, layers = self._packed_alpha(), []
        for index, layer in enumerate(self._layers):
            packed, metadata = pack_layer(layer)
            tensors.update({f"{index}.{name}": value for name, value in packed.items()})
            layers.append(metadata)
        return tensors, {"layers": layers}

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        self._layers, self._alpha = [], tensors.get("readout", self.solution_.alpha)
        for index, layer in enumerate(metadata["layers"]):
            start = f"{index}."
            packed = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            self._layers.append(unpack_layer(packed, layer, self._device))
        self._publish()

    @property
    def _n_features_out(self) -> int:
        """Columns of ``transform``, which scikit-learn names: every layer has as many features."""
        return len(self._layers[-1].weight)

    def _settings(self) -> Settings:
        """The parameters, checked; scikit-learn asks for this in fit, not in __init__."""
        regression = self._regression()
        depth, width = checks.integer("depth", self.depth, 1), checks.integer("width", self.width, 1)
        checks.choice("features", self.features, tuple(FEATURES))
        scale, scaled = self.feature_scale, [name for name, kind in FEATURES.items() if kind.default_scale is not None]
        if scale is not None and (self.features not in scaled or not checks.nonnegative("feature_scale", scale)):
            raise ValueError(
                f"feature_scale is the positive scale of features={' or '.join(map(repr, scaled))} and None otherwise, "
                f"got {scale!r} with features={self.features!r}"
            )
        return Settings(
            kernel=self.kernel,
            depth=depth,
            features=self.features,
            width=width,
            feature_scale=None if scale is None else float(scale),
            ridge=regression.ridge,
            agop_scale=self.agop_scale,
            precision=self.precision,
            backend=self.backend,
            solver=self.solver,
            memory_limit=regression.memory_limit,
        )

    def _through(self, features: torch.Tensor, layer: int) -> torch.Tensor:
        """The features that enter a layer, from those that enter the first one."""
        for step in self._layers[:layer]:
            features = step(features)
        return features

    def _training_points(self, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Rows wider than the estimator's dtype are normalised, as the first layer would, before they are rounded."""
        return X if X.dtype == self._dtype else normalise_rows(X.double()).to(self._dtype)

    def _kernel_inputs(self, X: torch.Tensor) -> torch.Tensor:
        return normalise_rows(self._through(X, len(self._layers)))


class DeepRFMClassifier(Classifier, _DeepRFM):
    """Deep RFM classifier: kernel ridge(less) regression on +-1 one-hot labels, layer by layer.

    Each layer normalises its rows, solves (k(X, X) + ridge I) alpha = Y, takes M = AGOP of that predictor, and
    maps X <- Phi(M^(1/2) X) with untrained random features Phi; a last kernel machine reads the labels off
    (paper, algorithm 1; settings of appendix C).

    Args:
        kernel: a kernel such as ``Laplace(2.0)``, or ``Laplace("median")``: the median distance of the normalised rows
            that enter the first layer, for all layers.
        depth: number of layers.
        features: "relu", ReLU(W x) with standard Gaussian W, or "cos",
            sqrt(2/width) cos(W x + b) with Cauchy W.
        width: number of features.
        feature_scale: scale of the Cauchy distribution; None for 0.05. Only with "cos".
        ridge: mu >= 0 added to the kernel matrix's diagonal.
        agop_scale: "max" divides M by its largest entry (the authors' code), "mean" by n (the paper's definition),
            "sum" not at all (the paper's algorithm 1).
        precision, backend: as in ``fastagop.kernel_matrix``, for ``fit``; "triton" fits only, since outputs for new
            rows are computed in float64 and Triton's products are float32.
        device: a torch device, or "auto": CUDA where there is one.
        dtype: "float32" or "float64", or torch's own.
        random_state: seed of the random features.
        checkpoint_dir: folder for finished layers; a fit of the same settings and data resumes from it.
        callbacks: functions called with a ``fastagop.deep_rfm.LayerEvent`` after each layer.
        verbose: 1 shows a progress bar on a terminal, and logs every step at INFO.
        process_group: a ``torch.distributed`` group whose ranks share the work of fit (``fastagop.distributed``);
            every rank fits the same data and ends with the same estimator. The first one keeps the checkpoint and
            the progress bar; callbacks run on every rank. Prediction is not shared.
        solver: of every solve, what ``fastagop.solve`` takes as its ``method``: "auto", a name such as "cg", or options
            such as ``fastagop.ConjugateGradients(...)``.
        memory_limit: bytes that a solve or an AGOP may take.
        class_weight: weights of the classes, {label: weight}, or "balanced" for weights inversely proportional to
            the classes' sums of sample weights; they multiply sample weights. With ridge 0 every label is met
            whatever its weight: weights then act through the AGOP only.

    Attributes:
        kernel_: the kernel with a number for its bandwidth.
        classes_: the labels.
        layers_: one ``LayerRecord`` a layer.
        agops_: M of each layer, scaled, (d_l, d_l).
        alphas_: coefficients of each layer (n, K), rounded to ``dtype``; ``layers_[l].solution.alpha`` is float64.
        solution_: ``Solution`` of the readout (float64).
        n_features_in_: d.
    """

    def __init__(
        self,
        kernel: Kernel = _LAPLACE,
        depth: int = 20,
        features: str = "relu",
        width: int = 1024,
        feature_scale: float | None = None,
        ridge: float = 0.0,
        agop_scale: str = "max",
        precision: str = "highest",
        backend: str = "auto",
        device: Device = "auto",
        dtype: DType = "float32",
        random_state: Seed = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        callbacks: Callbacks = (),
        verbose: int = 0,
        process_group: Any = None,
        solver: Method = "auto",
        memory_limit: float | None = None,
        class_weight: ClassWeight = None,
    ):
        self._store(locals())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # With ridge 0 every training label is met, whatever its weight. scikit-learn's check that class weights move
        # predictions is left out for estimators with this tag.
        tags.classifier_tags.poor_score = self.ridge == 0
        return tags


class DeepRFMRegressor(Regressor, _DeepRFM):
    """Deep RFM regressor: kernel ridge(less) regression on float targets, layer by layer.

    Targets (n,) or (n, K) enter as they are; nothing is centred or scaled, but for a column whose (weighted) mean
    exceeds its spread more than four times: the mean is subtracted before anything is rounded, and predictions add it
    again. Parameters, attributes and the algorithm are those of ``DeepRFMClassifier``, without ``class_weight`` and
    ``classes_``, and with ``intercept_``, what was subtracted: a number, or (K,). The collapse measures of ``layers_``
    are empty, as there are no classes.
    """

    def __init__(
        self,
        kernel: Kernel = _LAPLACE,
        depth: int = 20,
        features: str = "relu",
        width: int = 1024,
        feature_scale: float | None = None,
        ridge: float = 0.0,
        agop_scale: str = "max",
        precision: str = "highest",
        backend: str = "auto",
        device: Device = "auto",
        dtype: DType = "float32",
        random_state: Seed = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        callbacks: Callbacks = (),
        verbose: int = 0,
        process_group: Any = None,
        solver: Method = "auto",
        memory_limit: float | None = None,
    ):
        self._store(locals())
