"""A fitted Deep RFM as the neural network it is."""

from __future__ import annotations

import torch

from fastagop.deep_rfm import Layer, normalise_rows
from fastagop.features import mapped
from fastagop.kernels.radial import Radial


class _Profile(torch.autograd.Function):
    """phi(r) of squared distances; its derivative in r^2 is -w / 2, w the gradient weight."""

    @staticmethod
    def forward(ctx, sq: torch.Tensor, kernel: Radial):
        ctx.save_for_backward(sq)
        ctx.kernel = kernel
        return kernel.value_(sq.clone())

    @staticmethod
    def backward(ctx, *grads):
        (sq,) = ctx.saved_tensors
        return ctx.kernel.weight_(sq.clone()).mul_(-0.5).mul_(grads[0]), None


class DeepRFMModule(torch.nn.Module):
    """Layers x -> Phi(M^(1/2) x / ||x||), then a kernel machine on the normalised features.

    All trained and random numbers are buffers, so that state_dict holds everything. The network computes in
    float64, as the estimators' own prediction does, and answers in its input's dtype.

    Args:
        layers: trained layers. kernel: of the readout.
        centers: normalised features of the training points (n, width). alpha: readout coefficients (n, K).
        binary: answer with the second of two outputs only, shape (m,), scikit-learn's convention.
        flat: answer with shape (m,) for a single output.
        offset: what a regressor adds to its outputs, (K,) in float64; None for nothing.
    """

    centers: torch.Tensor
    alpha: torch.Tensor
    offset: torch.Tensor | None

    def __init__(self, layers: list[Layer], kernel: Radial, centers, alpha, *, binary, flat, offset=None):
        super().__init__()
        self.kernel, self.depth, self.binary, self.flat = kernel, len(layers), binary, flat
        for i, layer in enumerate(layers):
            self.register_buffer(f"root_{i}", layer.root.clone())
            self.register_buffer(f"weight_{i}", layer.map.weight.clone())
            if layer.map.bias is not None:
                self.register_buffer(f"bias_{i}", layer.map.bias.clone())
        self.register_buffer("centers", centers.clone())
        self.register_buffer("alpha", alpha.clone())
        self.register_buffer("offset", None if offset is None else offset.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """decision_function (classifier) or predict (regressor) of rows x (m, d)."""
        h = x.double()
        for i in range(self.depth):
            root, weight = getattr(self, f"root_{i}"), getattr(self, f"weight_{i}")  # get_buffer: no export before 2.7
            bias = getattr(self, f"bias_{i}", None)
            projected = normalise_rows(h) @ root.double()
            h = mapped(projected, weight.double(), None if bias is None else bias.double())
        distance = torch.cdist(normalise_rows(h), self.centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
        sq = distance.square()
        k = _Profile.apply(sq, self.kernel) if sq.requires_grad else self.kernel.value_(sq)
        f = k @ self.alpha.double()
        f = f if self.offset is None else f + self.offset.double()
        f = f[:, 1] if self.binary else f.squeeze(1) if self.flat else f
        return f.to(x.dtype) if x.is_floating_point() else f
