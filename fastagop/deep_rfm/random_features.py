"""Untrained random feature maps Phi, the layers' nonlinearity in Deep RFM."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fastagop.kernels.gemm import matmul_nt

COS_SCALE = 0.05  # This is the scale of the paper, appendix C.


@dataclass(frozen=True)
class FeatureKind:
    """A kind of feature maps Phi(x) = phi(W x + b): the distribution of W and b, and phi.

    Attributes:
        draw: (generator, width, d) -> (W (width, d), b (width,) or None), in float64.
        phi_: phi of projections (n, width), in place; operations of torch only, since torch.export traces it.
        default_scale: what W is multiplied by where users give no ``feature_scale``; None for a kind that takes none.
    """

    draw: Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray | None]]
    phi_: Callable[[torch.Tensor], torch.Tensor]
    default_scale: float | None = None


def _draw_relu(rng: np.random.Generator, width: int, d: int) -> tuple[np.ndarray, None]:
    """W standard Gaussian; its scale does not matter to a layer that normalises its input."""
    return rng.standard_normal((width, d)), None


def _draw_cos(rng: np.random.Generator, width: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """W standard Cauchy, which is scaled, and b uniform on [0, 2 pi)."""
    weight = rng.standard_cauchy((width, d))
    return weight, rng.uniform(0.0, 2.0 * math.pi, width)


def _relu_(projections: torch.Tensor) -> torch.Tensor:
    """ReLU(W x)."""
    return projections.relu_()


def _cos_(projections: torch.Tensor) -> torch.Tensor:
    """sqrt(2 / width) cos(W x + b), random Fourier features of the l1-Laplacian kernel exp(-scale ||x - z||_1)."""
    return projections.cos_().mul_(math.sqrt(2.0 / projections.shape[1]))


# The paper's kinds (section 3.3 and appendix C), by the name that users give as ``features``.
FEATURES = {"relu": FeatureKind(_draw_relu, _relu_), "cos": FeatureKind(_draw_cos, _cos_, COS_SCALE)}


@dataclass(frozen=True)
class FeatureMap:
    """A drawn map Phi(x) = phi(W x + b); rows are samples.

    Attributes:
        kind: its name in ``FEATURES``.
        weight: W (width, d).
        bias: b (width,), or None for a kind without one.
    """

    kind: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def to(self, device: torch.device) -> FeatureMap:
        """The map on a device."""
        return FeatureMap(self.kind, self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def __call__(self, X: torch.Tensor) -> torch.Tensor:
        """Phi(X), shape (n, width)."""
        return apply_map(self.kind, X, self.weight, self.bias)


def apply_map(kind: str, X: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Phi(X) of a kind, shape (n, width); a function, since torch.export traces it."""
    return FEATURES[kind].phi_(matmul_nt(X, weight, bias))


@dataclass(frozen=True)
class RandomFeatures:
    """The distribution that feature maps are drawn from.

    Attributes:
        kind: a name in ``FEATURES``.
        width: number of features.
        scale: of W; None for the kind's default. A kind without a default takes none.
    """

    kind: str
    width: int
    scale: float | None = None

    def draw(self, d: int, seed: int, like: torch.Tensor) -> FeatureMap:
        """A feature map of d inputs; the same seed gives the same map on every device and in every dtype.

        Args:
            d: input dimension.
            seed: of numpy's PCG64.
            like: tensor whose dtype and device the map gets.
        """
        return self._drawn(d, seed, like.dtype).to(like.device)

    def drawing(self, d: int, seed: int, like: torch.Tensor) -> Callable[[], FeatureMap]:
        """What returns the map of ``draw``, called when it is needed; beside a GPU a thread draws it until then."""
        if not _beside(like.device):
            return functools.partial(self.draw, d, seed, like)
        pool = ThreadPoolExecutor(1)
        drawn = pool.submit(self._drawn, d, seed, like.dtype)
        pool.shutdown(wait=False)
        return lambda: drawn.result().to(like.device)

    def _drawn(self, d: int, seed: int, dtype: torch.dtype) -> FeatureMap:
        """The map on the host."""
        kind, rng = FEATURES[self.kind], np.random.default_rng(seed)
        weight, bias = kind.draw(rng, self.width, d)
        if (scale := kind.default_scale if self.scale is None else self.scale) is not None:
            weight *= scale
        on_host = torch.from_numpy(weight).to(dtype), None if bias is None else torch.from_numpy(bias).to(dtype)
        return FeatureMap(self.kind, *on_host)


def _beside(device: torch.device) -> bool:
    """Whether the host has nothing else to do while the device works."""
    return device.type == "cuda"
