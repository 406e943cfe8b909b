"""Deep RFM, layer by layer (paper, algorithm 1): normalise, solve, AGOP, project by M^(1/2), random features."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fastagop import collapse, linalg
from fastagop.deep_rfm.random_features import FeatureMap, RandomFeatures, apply_map
from fastagop.distributed.engine import LOCAL, Local
from fastagop.estimators import kernel_ridge
from fastagop.estimators.kernel_ridge import KernelRidge
from fastagop.kernels import checks
from fastagop.kernels.gemm import matmul_nt
from fastagop.kernels.plan import on_gpu
from fastagop.kernels.precision import full_products
from fastagop.kernels.radial import Radial
from fastagop.solvers import copies
from fastagop.solvers.copies import Rows
from fastagop.solvers.solution import Solution, Solved, size_of
from fastagop.solvers.table import Method

STAGES = ("input", "projected", "features")  # These are the places in a layer where collapse is measured.


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a layer needs to know; the estimators' parameters, checked. Checkpoints go by these names."""

    kernel: Radial
    depth: int
    features: str
    width: int
    feature_scale: float | None = None
    ridge: float = 0.0
    agop_scale: str = "max"
    precision: str = "highest"
    backend: str = "auto"
    solver: Method = "auto"
    memory_limit: float | None = None

    @property
    def regression(self) -> KernelRidge:
        """The kernel regression of every layer."""
        return KernelRidge(
            self.kernel, ridge=self.ridge, precision=self.precision, backend=self.backend,
            solver=self.solver, memory_limit=self.memory_limit,
        )  # fmt: skip

    @property
    def random_features(self) -> RandomFeatures:
        """The distribution of every layer's random features."""
        return RandomFeatures(self.features, self.width, self.feature_scale)


@dataclass(frozen=True)
class LayerRecord:
    """What happened in one layer.

    Attributes:
        nc1, nc2: collapse measures of "input" (the normalised rows), "projected" (after M^(1/2)) and "features"
            (after the random map); infinite where all class means coincide, empty where there are no classes.
        solution: the kernel regression's Solution, with alpha in float64: rounded to float32 it would not solve a
            nearly singular system.
        agop_scale: the number that the summed AGOP was divided by.
        seconds: wall-clock time of the layer; ``stages`` splits it.
        peak_bytes: memory beyond the layer's input: measured on CUDA where the process had not taken more before, else
            the plan's figure.
    """

    nc1: Mapping[str, float]
    nc2: Mapping[str, float]
    solution: Solution
    agop_scale: float
    seconds: float
    stages: Mapping[str, float]
    peak_bytes: int

    def __repr__(self) -> str:
        nc1 = f"NC1 {self.nc1['projected']:.1e}, " if "projected" in self.nc1 else ""
        return f"LayerRecord({nc1}agop_scale {self.agop_scale:.2g}, {self.seconds:.2g} s, {self.solution})"


@dataclass(frozen=True)
class LayerEvent:
    """What callbacks see after each layer; tensors are valid during the call only.

    Attributes:
        layer: index from 0.
        depth: number of layers.
        record: the LayerRecord.
        projected: X M^(1/2), shape (n, d).
        features: Phi of it, shape (n, width).
        classes: class indices (n,), or None in regression.
    """

    layer: int
    depth: int
    record: LayerRecord
    projected: torch.Tensor
    features: torch.Tensor
    classes: torch.Tensor | None

    def __repr__(self) -> str:
        made = f"projected {size_of(self.projected)}, features {size_of(self.features)}"
        return f"LayerEvent(layer {self.layer} of {self.depth}, {made}, {self.record})"


def normalise_rows(X: torch.Tensor) -> torch.Tensor:
    """Rows divided by their length, whatever that is; a zero row stays zero."""
    largest = math.frexp(torch.finfo(X.dtype).max)[1] - 2
    exponent = torch.frexp(X.abs().amax(1, keepdim=True))[1].clamp(-largest, largest)
    X = X * torch.exp2(-exponent.to(X.dtype))  # This is a power of two: squares stay in range, and no digit is lost.
    length = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    return X / torch.where(length > 0, length, 1.0)


class FixedPrecision(torch.nn.Module):
    """A module whose numbers casts leave alone: rounded, they would not be a solution any more. Moves are followed."""

    def _apply(self, fn, recurse=True):
        """Every cast and move of a module, and of those that it holds, comes here."""

        def moved(t: torch.Tensor) -> torch.Tensor:
            changed = fn(t)
            return changed if changed.dtype == t.dtype else t.to(changed.device)

        return super()._apply(moved, recurse)


class Layer(FixedPrecision):
    """A trained layer, x -> Phi(M^(1/2) x / ||x||) for every row x; it computes in its input's dtype.

    Args:
        agop: M, scaled (d, d).
        root: M^(1/2) (d, d).
        features: Phi, whose weight (width, d) and bias, (width,) or None, become buffers; its kind, a word, is kept
            beside them.
        record: what happened when the layer was trained, which is kept beside the buffers.
    """

    agop: torch.Tensor
    root: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    kind: str
    record: LayerRecord

    def __init__(self, agop: torch.Tensor, root: torch.Tensor, features: FeatureMap, record: LayerRecord | None = None):
        super().__init__()
        self.kind = features.kind
        self.record = record  # pyright: ignore[reportAttributeAccessIssue] (only a network's copy has none)
        self.register_buffer("agop", agop)
        self.register_buffer("root", root)
        self.register_buffer("weight", features.weight)
        self.register_buffer("bias", features.bias)

    def __setstate__(self, state: dict) -> None:
        """Pickles of earlier versions lack the kind of features, of which there were two, one with a bias."""
        super().__setstate__(state)
        self.__dict__.setdefault("kind", "relu" if self.bias is None else "cos")

    @property
    def map(self) -> FeatureMap:
        """Phi, the random features."""
        return FeatureMap(self.kind, self.weight, self.bias)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """The features (n, width) of rows X (n, d)."""
        return self.stages(normalise_rows(X))[1]

    def stages(
        self, X: torch.Tensor, product: Callable[..., torch.Tensor] = torch.matmul
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(X M^(1/2), Phi of it) for normalised rows X.

        The root is symmetric, so ``product`` may be A B or A B^T. These round differently, and what an estimator
        predicts for new rows is promised to the bit, also from files of earlier versions: they get A B. Training
        takes the faster A B^T.
        """
        projected = product(X, self.root.to(X.dtype))
        bias = None if self.bias is None else self.bias.to(X.dtype)
        return projected, apply_map(self.kind, projected, self.weight.to(X.dtype), bias)

    def copy(self) -> Layer:
        """The same layer with tensors of its own and without its record."""
        bias = None if self.bias is None else self.bias.clone()
        return Layer(self.agop.clone(), self.root.clone(), FeatureMap(self.kind, self.weight.clone(), bias))

    def __repr__(self) -> str:
        record = "" if self.record is None else f", {self.record}"
        return f"Layer(agop {size_of(self.agop)}, {self.kind} features {len(self.weight)}{record})"


@dataclass(frozen=True)
class Trained:
    """What a layer makes of its input.

    Attributes:
        projected, features: of all rows given (n, d) and (n, width), in their order.
        points: the features of the points (r, width).
        rest: those of rows without weight (e, width), or None.
    """

    projected: torch.Tensor
    features: torch.Tensor
    points: torch.Tensor
    rest: torch.Tensor | None = None


@dataclass
class _Clock:
    """Seconds per stage; on CUDA the device is synchronised at every mark."""

    device: torch.device
    stages: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def mark(self, stage: str) -> None:
        """Note the seconds since the last mark as those of a stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.stages[stage] = now - self.last
        self.last = now


@dataclass(frozen=True)
class LayerTraining:
    """What the layers of one fit are trained with; their results are the same on every rank of a group.

    Attributes:
        Y: targets (n, K) of the rows that the fit was given.
        settings: of the layers.
        rows: how these rows became points (``copies.find``).
        classes: class indices of the rows (n,), or None in regression.
        engine: who does the work, this process or the ranks of a group.
    """

    Y: torch.Tensor
    settings: Settings
    rows: Rows
    classes: torch.Tensor | None = None
    engine: Local = LOCAL

    @full_products()
    def layer(
        self, X: torch.Tensor, seed: int, rest: torch.Tensor | None = None, before: Solution | None = None
    ) -> tuple[Layer, Trained]:
        """A layer on its input, the points X (r, d), and what it makes of them and of ``rest`` (e, d).

        Args:
            X: input of the points.
            seed: of the random features.
            rest: input of the rows without weight.
            before: the solution of the layer before.
        """
        clock, memory, rows = _Clock(X.device), _allocated(X.device), self.rows
        X = normalise_rows(X)
        regression, engine = self.settings.regression.after(before), self.engine
        features_of = self.settings.random_features.drawing(X.shape[1], seed, X)
        solved, M, planned = kernel_ridge.fit_and_agop(X, self.Y, regression, engine, rows=rows, mark=clock.mark)
        scale = kernel_ridge.agop_divisor(M, self.settings.agop_scale, rows.total)
        # A constant predictor has nothing to say about features: as in RFM, the metric stays what it was, here I.
        M = M / scale if bool(M.any()) else torch.eye(len(M), dtype=M.dtype, device=M.device)
        # Gradients at the points are combinations of the points.
        root = linalg.psd_sqrt(M, rows=X)
        kernel_ridge.refuse_scale(checks.largest(root), self.settings.agop_scale, X.dtype, "M^(1/2)")
        root = engine.broadcast(root.to(X.dtype))
        clock.mark("root")
        # Layers compute with the root; M itself may leave its dtype where agop_scale keeps the units of the targets.
        layer = Layer(M.to(X.dtype) if kernel_ridge.holds(X.dtype, checks.largest(M)) else M, root, features_of())
        projected, features = layer.stages(X, matmul_nt)
        features, unweighted = engine.broadcast(features), {}
        if rest is not None:
            rest = normalise_rows(rest)
            unweighted = dict(zip(STAGES, (rest, *layer.stages(rest, matmul_nt)), strict=True))
        clock.mark("features")
        of_points = dict(zip(STAGES, (X, projected, features), strict=True))
        of_rows = {stage: rows.all(value, unweighted.get(stage)) for stage, value in of_points.items()}
        nc1, nc2 = self._collapse(of_rows)
        clock.mark("measures")
        peak = _peak(memory, X.device, planned)
        layer.record = LayerRecord(nc1, nc2, solved.solution, scale, sum(clock.stages.values()), clock.stages, peak)
        return layer, Trained(of_rows["projected"], of_rows["features"], features, unweighted.get("features"))

    def readout(self, X: torch.Tensor, before: Solution | None = None) -> tuple[torch.Tensor, Solved]:
        """The kernel machine after the last layer: (its normalised centers (r, width), its solution)."""
        X, regression = normalise_rows(X), self.settings.regression.after(before)
        return X, kernel_ridge.solve(X, self.Y, regression, self.engine, rows=self.rows)

    def _collapse(self, stages: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
        """(NC1, NC2) of all rows by stage, empty where there are no two classes."""
        if self.classes is None or int(self.classes.max()) == 0:
            return {}, {}
        return collapse.of_stages(stages, self.classes)


def train_layer(
    X: torch.Tensor, Y: torch.Tensor, settings: Settings, seed: int, classes: torch.Tensor | None
) -> tuple[Layer, Trained]:
    """One layer by itself, on its input X (n, d), targets Y (n, K) and class indices (n,), or None."""
    return LayerTraining(Y, settings, copies.alone(X), classes).layer(X, seed)


def _allocated(device: torch.device) -> tuple[int, int] | None:
    """(bytes in use, most that ever were) of a GPU; None where nothing counts them (the CPU)."""
    return (torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)) if on_gpu(device) else None


def _peak(before: tuple[int, int] | None, device: torch.device, planned: int) -> int:
    """Bytes taken at most since then; as planned, within what was measured, where more had been in use earlier.

    The process's peak is not counted anew: it is the user's.
    """
    if before is None:
        return planned
    highest = torch.cuda.max_memory_allocated(device)
    taken = highest - before[0]
    return taken if highest > before[1] else min(planned, taken)


def seeds(random_state: np.random.RandomState, depth: int) -> list[int]:
    """One seed per layer, so that a layer can be drawn again without its predecessors."""
    return [int(seed) for seed in random_state.randint(0, 2**31 - 1, size=depth)]


Callback = Callable[[LayerEvent], None]
