"""A convolutional layer of Deep RFM: patch kernel machine, M^(1/2) of its patch AGOP, random convolutional features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastagop import collapse, linalg
from fastagop.convolution.machine import PatchMachine
from fastagop.convolution.window import Window
from fastagop.deep_rfm.random_features import RandomFeatures
from fastagop.estimators.kernel_ridge import agop_divisor
from fastagop.kernels import checks
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.profile import Kernel
from fastagop.solvers import copies


@dataclass(frozen=True)
class ConvLayerSettings:
    """What a layer is made of.

    Args:
        kernel: of patches, which have length 1.
        window: which patches.
        width: random convolutional features, the channels that the layer gives.
        ridge: of the kernel regression.
    """

    kernel: Kernel
    window: Window
    width: int = 64
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        checks.kernel(self.kernel)
        if not isinstance(self.window, Window):
            raise TypeError(f"window must be a Window, got {self.window!r}; use Window(size)")
        object.__setattr__(self, "width", checks.integer("width", self.width, 1))
        object.__setattr__(self, "ridge", checks.nonnegative("ridge", self.ridge))


@dataclass(frozen=True)
class ConvLayer:
    """A fitted layer: called with images (n, c, h, w) it gives features (n, width, h', w').

    Attributes:
        window: which patches.
        root: M^(1/2) of the patch AGOP over its largest entry, (d, d) with d = c size size.
        weight: of the random features, (width, d).
        nc1, nc2: collapse of "input" (the normalised patches of an image side by side), "projected" (after M^(1/2)) and
            "features", infinite where all class means coincide.
        jitter, residual: of the regression.
        accuracy: of the layer's kernel machine on its own images.
    """

    window: Window
    root: torch.Tensor
    weight: torch.Tensor
    nc1: Mapping[str, float]
    nc2: Mapping[str, float]
    jitter: float
    residual: float
    accuracy: float

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """ReLU(W M^(1/2) p) of every normalised patch p, as images.

        Raises:
            TypeError, ValueError: images unlike those that the layer was fitted to.
        """
        patches = self.window.patches(images)
        if patches.shape[2] != len(self.root) or patches.dtype != self.root.dtype:
            raise ValueError(
                f"images must be {self.root.dtype} with {len(self.root) // self.window.size**2} channels as in "
                f"fit_layer, got {images.dtype} with {images.shape[1]}"
            )
        return _as_images(_stages(patches, self.root, self.weight)[1], self.window, images)


def fit_layer(images: torch.Tensor, y: torch.Tensor, settings: ConvLayerSettings, seed: int) -> ConvLayer:
    """Fit one layer: solve for +-1 one-hot targets, take the patch AGOP, draw random features.

    Args:
        images: (n, c, h, w).
        y: class labels (n,).
        settings: the layer's.
        seed: of the random features.

    Raises:
        ValueError: labels that do not fit the images, fewer than two classes, or what ``Window`` and ``PatchMachine``
            refuse.
    """
    checks.plain("y", y)
    if not isinstance(settings, ConvLayerSettings):
        raise TypeError(f"settings must be ConvLayerSettings, got {settings!r}; use ConvLayerSettings(kernel, window)")
    seed = checks.integer("seed", seed, 0)
    if y.ndim != 1 or len(y) != len(images):
        raise ValueError(f"y must have shape ({len(images)},), one label an image, got {tuple(y.shape)}")
    if y.is_complex() or (y.is_floating_point() and not checks.finite(y)):
        raise ValueError("y must hold real labels, but holds NaN, infinity or complex numbers; leave such images out")
    classes, labels = torch.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y must have two classes or more, got {len(classes)}")
    patches = settings.window.patches(images).detach()
    targets = 2.0 * torch.nn.functional.one_hot(labels, len(classes)).double() - 1.0
    rows = copies.find(patches.flatten(1))
    machine, M, fitted = _learnt(settings, patches, targets, rows)
    # As in Deep RFM, a constant predictor has nothing to say about features: the metric stays I.
    M = M / agop_divisor(M, "max", 1.0) if bool(M.any()) else torch.eye(len(M), dtype=M.dtype, device=M.device)
    root = linalg.psd_sqrt(M)
    weight = RandomFeatures("relu", settings.width).draw(patches.shape[2], seed, patches).weight
    points = rows.take(patches)  # a product may round equal images apart, by where they lie in memory
    stages = dict(zip(("input", "projected", "features"), (points, *_stages(points, root, weight)), strict=True))
    nc1, nc2 = collapse.of_stages({name: rows.all(stage.flatten(1)) for name, stage in stages.items()}, labels)
    accuracy = float((fitted.argmax(1) == labels).double().mean())
    return ConvLayer(settings.window, root, weight, nc1, nc2, machine.jitter, machine.residual, accuracy)


def _learnt(
    settings: ConvLayerSettings, patches: torch.Tensor, targets: torch.Tensor, rows: copies.Rows
) -> tuple[PatchMachine, torch.Tensor, torch.Tensor]:
    """(the kernel machine, its patch AGOP, its outputs at the images).

    Without a ridge equal images have no solution but where their targets agree: as in Deep RFM, one with the mean of
    their targets stands for them, and counts as often.
    """
    merged = settings.ridge == 0.0 and rows.merged > 0
    points = rows.take(patches) if merged else patches
    targets = rows.means(targets) if merged else targets
    machine = PatchMachine.fit(settings.kernel, points, targets, settings.ridge)
    weight = rows.weight.to(points).repeat_interleave(points.shape[1]) if merged else None
    fitted = targets - (settings.ridge + machine.jitter) * machine.alpha  # K alpha, as the equations say
    return machine, machine.agop(sample_weight=weight), rows.all(fitted) if merged else fitted


def _stages(patches: torch.Tensor, root: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Patches after M^(1/2), their features), in the patches' dtype, also where autocast would round products."""
    with matmul_precision("highest", patches.device):
        projected = patches @ root
        return projected, (projected @ weight.T).relu_()


def _as_images(features: torch.Tensor, window: Window, images: torch.Tensor) -> torch.Tensor:
    height, width = (window.positions(side) for side in images.shape[2:])
    return features.mT.reshape(len(features), features.shape[2], height, width)
