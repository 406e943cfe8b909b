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
from fastagop.kernels.plan import on_gpu

COS_SCALE = 0.05  # This is the scale of the paper, appendix C.
NAMES = ("relu", "cos")


@dataclass(frozen=True)
class FeatureMap:
    """Phi(x) = ReLU(W x), or sqrt(2 / width) cos(W x + b); rows are samples.

    Attributes:
        weight: W (width, d).
        bias: b (width,), or None for "relu".
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """The map's name, "relu" or "cos"."""
        return "relu" if self.bias is None else "cos"

    def to(self, device: torch.device) -> FeatureMap:
        """The map on a device."""
        return FeatureMap(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def __call__(self, X: torch.Tensor) -> torch.Tensor:
        """Phi(X), shape (n, width)."""
        return mapped(X, self.weight, self.bias)


def mapped(X: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Phi(X) of "relu" (no bias) or "cos", shape (n, width); a function, since torch.export traces it."""
    if bias is None:
        return matmul_nt(X, weight).relu_()
    return matmul_nt(X, weight, bias).cos_().mul_(math.sqrt(2.0 / len(weight)))


@dataclass(frozen=True)
class RandomFeatures:
    """The distribution that feature maps are drawn from.

    "relu": W standard Gaussian (its scale does not matter to a layer that normalises its input). "cos": W Cauchy
    with the given scale, b uniform on [0, 2 pi): random Fourier features of the l1-Laplacian kernel
    exp(-scale ||x - z||_1) (paper, section 3.3 and appendix C).

    Attributes:
        name: "relu" or "cos".
        width: number of features.
        scale: scale of the Cauchy distribution; None for 0.05; "relu" takes none.
    """

    name: str
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
        if not on_gpu(like.device):  # only beside a GPU has the host nothing else to do
            return functools.partial(self.draw, d, seed, like)
        pool = ThreadPoolExecutor(1)
        drawn = pool.submit(self._drawn, d, seed, like.dtype)
        pool.shutdown(wait=False)
        return lambda: drawn.result().to(like.device)

    def _drawn(self, d: int, seed: int, dtype: torch.dtype) -> FeatureMap:
        """The map on the host."""
        rng = np.random.default_rng(seed)
        if self.name == "relu":
            return FeatureMap(torch.from_numpy(rng.standard_normal((self.width, d))).to(dtype))
        weight = rng.standard_cauchy((self.width, d)) * (COS_SCALE if self.scale is None else self.scale)
        bias = rng.uniform(0.0, 2.0 * math.pi, self.width)
        return FeatureMap(torch.from_numpy(weight).to(dtype), torch.from_numpy(bias).to(dtype))
