"""Deep RFM, layer by layer (paper, algorithm 1): normalise, solve, AGOP, project by M^(1/2), random features."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fastagop import collapse, distributed, linalg
from fastagop.deep_rfm.random_features import FeatureMap, random_features
from fastagop.estimators import kernel_ridge
from fastagop.estimators.kernel_ridge import KernelRidge
from fastagop.kernels.gemm import matmul_nt
from fastagop.kernels.radial import Radial
from fastagop.solvers import copies
from fastagop.solvers.cg import ConjugateGradients
from fastagop.solvers.copies import Rows
from fastagop.solvers.solution import Solution, Solved, size_of


@dataclass(frozen=True)
class Settings:
    """What a layer needs to know; the estimators' parameters, checked."""

    kernel: Radial
    depth: int
    features: str
    width: int
    feature_scale: float | None
    ridge: float
    agop_scale: str
    precision: str
    backend: str
    solver: str | ConjugateGradients = "auto"
    memory_limit: float | None = None

    @property
    def regression(self) -> KernelRidge:
        """The kernel regression of every layer."""
        return KernelRidge(self.kernel, self.ridge, self.precision, self.backend, self.solver, self.memory_limit)


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
        peak_bytes: memory beyond the layer's input: measured on CUDA, the plan's figure on the CPU.
    """

    nc1: Mapping[str, float]
    nc2: Mapping[str, float]
    solution: Solution
    agop_scale: float
    seconds: float
    stages: Mapping[str, float]
    peak_bytes: int

    def __repr__(self):
        nc1 = f"NC1 {self.nc1['projected']:.1e}, " if "projected" in self.nc1 else ""
        return f"LayerRecord({nc1}agop_scale {self.agop_scale:.2g}, {self.seconds:.2g} s, {self.solution})"


@dataclass(frozen=True)
class Layer:
    """The trained part of a layer and its record; ``features`` is Phi(X M^(1/2)), the next layer's input."""

    agop: torch.Tensor
    root: torch.Tensor
    map: FeatureMap
    record: LayerRecord

    def __repr__(self):
        return f"Layer(agop {size_of(self.agop)}, {self.map.name} features {len(self.map.weight)}, {self.record})"


@dataclass(frozen=True)
class LayerEvent:
    """What callbacks see after each layer; tensors are valid during the call only.

    Attributes:
        layer: index from 0. depth: number of layers.
        record: the LayerRecord.
        projected: X M^(1/2), shape (n, d). features: Phi of it, shape (n, width).
        classes: class indices (n,), or None in regression.
    """

    layer: int
    depth: int
    record: LayerRecord
    projected: torch.Tensor
    features: torch.Tensor
    classes: torch.Tensor | None

    def __repr__(self):
        made = f"projected {size_of(self.projected)}, features {size_of(self.features)}"
        return f"LayerEvent(layer {self.layer} of {self.depth}, {made}, {self.record})"


@dataclass(frozen=True)
class Trained:
    """What a layer makes of its input.

    Attributes:
        projected, features: of all rows given (n, d) and (n, width), in their order.
        points: the features of the points (r, width). rest: those of rows without weight (e, width), or None.
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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.stages[stage] = now - self.last
        self.last = now


def normalise_rows(X: torch.Tensor) -> torch.Tensor:
    """Rows divided by their length, whatever that is; a zero row stays zero."""
    most = math.frexp(torch.finfo(X.dtype).max)[1] - 2
    exponent = torch.frexp(X.abs().amax(1, keepdim=True))[1].clamp(-most, most)
    X = X * torch.exp2(-exponent.to(X.dtype))  # a power of two: squares stay in range, and no digit is lost
    length = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    return X / torch.where(length > 0, length, 1.0)


def train_layer(
    X: torch.Tensor,
    Y: torch.Tensor,
    settings: Settings,
    seed: int,
    classes: torch.Tensor | None,
    group=None,
    rows: Rows | None = None,
    rest: torch.Tensor | None = None,
) -> tuple[Layer, Trained]:
    """One layer on its input X (r, d); what it makes is the same on every rank of a group.

    Args:
        X: input of the points (r, d). Y: targets (n, K) of the rows given.
        settings, seed: of the layer. classes: of the rows given (n,), or None.
        group: ranks that share the work.
        rows: how rows became points (``copies.find``); default as they are. rest: input of rows without weight (e, d).
    """
    clock, base, rows = _Clock(X.device), _reset_peak(X.device), rows or copies.alone(X)
    X = normalise_rows(X)
    solution, M, planned = kernel_ridge.fit_and_agop(X, Y, settings.regression, group, rows=rows, mark=clock.mark)
    scale = kernel_ridge.agop_divisor(M, settings.agop_scale, rows.total)
    # a constant predictor has nothing to say about features: as in RFM, the metric stays what it was, here I
    M = M / scale if bool(M.any()) else torch.eye(len(M), dtype=M.dtype, device=M.device)
    root = linalg.psd_sqrt(M, rows=X).to(X.dtype)  # gradients at the points are combinations of the points
    root = root if group is None else distributed.broadcast(root, group)
    clock.mark("root")
    projected = matmul_nt(X, root)  # root is symmetric
    phi = random_features(settings.features, X.shape[1], settings.width, settings.feature_scale, seed, X)
    features = phi(projected)
    features = features if group is None else distributed.broadcast(features, group)
    unweighted = [] if rest is None else [normalise_rows(rest)]
    unweighted += [matmul_nt(unweighted[0], root)] if unweighted else []
    unweighted += [phi(unweighted[1])] if unweighted else []
    clock.mark("features")
    stages = {"input": X, "projected": projected, "features": features}
    all_rows = {k: rows.all(v, *unweighted[i : i + 1]) for i, (k, v) in enumerate(stages.items())}
    nc1, nc2 = {}, {}
    if classes is not None and int(classes.max()) > 0:
        nc1, nc2 = collapse.of_stages(all_rows, classes)
    clock.mark("measures")
    peak = planned if base is None else torch.cuda.max_memory_allocated(X.device) - base
    record = LayerRecord(nc1, nc2, solution, scale, sum(clock.stages.values()), clock.stages, peak)
    return Layer(M.to(X.dtype), root, phi, record), Trained(
        all_rows["projected"], all_rows["features"], features, *unweighted[2:]
    )


def _reset_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def readout(
    X: torch.Tensor, Y: torch.Tensor, settings: Settings, group=None, rows: Rows | None = None
) -> tuple[torch.Tensor, Solved]:
    """The kernel machine after the last layer: (its normalised centers (r, width), its solution)."""
    X = normalise_rows(X)
    return X, kernel_ridge.solve(X, Y, settings.regression, group, rows=rows)


def apply_layer(X: torch.Tensor, layer: Layer) -> torch.Tensor:
    """New rows through a trained layer, in X's dtype."""
    return layer.map.to(X)(normalise_rows(X) @ layer.root.to(X))


def seeds(random_state: np.random.RandomState, depth: int) -> list[int]:
    """One seed per layer, so that a layer can be drawn again without its predecessors."""
    return [int(s) for s in random_state.randint(0, 2**31 - 1, size=depth)]


Callback = Callable[[LayerEvent], None]
