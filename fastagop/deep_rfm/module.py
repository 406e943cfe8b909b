"""A fitted Deep RFM as the neural network it is."""

from __future__ import annotations

import torch

from fastagop.deep_rfm.layer import FixedPrecision, Layer, normalise_rows
from fastagop.kernels import checks
from fastagop.kernels.profile import Profile, weight_at_zero, weight_slope

# Rows have length 1: up to so many eps of a fit's dtype apart two of them are one point. A training row is computed in
# float64 here, and its center was computed in that dtype: in float32 six layers put 1.6e-5 between them.
_SAME = 256


class _SquaredDistances(torch.autograd.Function):
    """||h_i - c_j||^2 of rows h (..., m, d) and c (..., n, d), accurate for near pairs, differentiable without end."""

    @staticmethod
    def forward(h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.cdist(h, c, compute_mode="donot_use_mm_for_euclid_dist").square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        (g,), (h, c) = grads, ctx.saved_tensors
        # A derivative that is taken once only is computed by differences, which cancel nothing.
        if not torch.is_grad_enabled() and not ctx.needs_input_grad[1]:
            r = torch.cdist(h, c, compute_mode="donot_use_mm_for_euclid_dist")
            return torch.ops.aten._cdist_backward(2.0 * r * g, h, c, 2.0, r), None
        to_h = 2.0 * (h * g.sum(-1, keepdim=True) - g @ c) if ctx.needs_input_grad[0] else None
        to_c = 2.0 * (c * g.sum(-2).unsqueeze(-1) - g.mT @ h) if ctx.needs_input_grad[1] else None
        return to_h, to_c

    @staticmethod
    def jvp(ctx, *tangents):
        (dh, dc), (h, c) = tangents, ctx.saved_tensors
        total = torch.zeros((), dtype=h.dtype, device=h.device)
        if dh is not None:
            total = total + 2.0 * ((h * dh).sum(-1, keepdim=True) - dh @ c.mT)
        if dc is not None:
            total = total + 2.0 * ((c * dc).sum(-1).unsqueeze(-2) - h @ dc.mT)
        return total

    @staticmethod
    def vmap(info, in_dims, *args):
        tensors = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(args, in_dims, strict=True)]
        return _SquaredDistances.apply(*tensors), 0


class _OfDistances(torch.autograd.Function):
    """A function of squared distances, the kernel, and the square up to which a pair is one point.

    Its derivatives are taken in the distances.
    """

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.kernel, ctx.same = inputs[1:]


class _Profile(_OfDistances):
    """phi of squared distances; its derivative in r^2 is -w / 2, w the gradient weight."""

    @staticmethod
    def forward(sq: torch.Tensor, kernel: Profile, same: float) -> torch.Tensor:
        return kernel.value_(sq.clone())

    @staticmethod
    def vmap(info, in_dims, *args):
        return _Profile.apply(*args), in_dims[0]

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * (-0.5 * _Weight.apply(ctx.saved_tensors[0], ctx.kernel, ctx.same)), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return tangents[0] * (-0.5 * _Weight.apply(ctx.saved_tensors[0], ctx.kernel, ctx.same))


class _Weight(_OfDistances):
    """The gradient weight w of squared distances; of one point its limit at 0, or zero where the kernel has a kink."""

    @staticmethod
    def forward(sq: torch.Tensor, kernel: Profile, same: float) -> torch.Tensor:
        return torch.where(sq > same, kernel.weight_(sq.clone()), weight_at_zero(kernel))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _Weight.apply(*args), in_dims[0]

    @staticmethod
    def _slope(ctx) -> torch.Tensor:
        (sq,) = ctx.saved_tensors
        apart = sq > ctx.same
        slope = weight_slope(ctx.kernel, torch.where(apart, sq, 1.0), _Weight.apply(sq, ctx.kernel, ctx.same))
        return torch.where(apart, slope, 0.0)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * _Weight._slope(ctx), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return tangents[0] * _Weight._slope(ctx)


class Readout(FixedPrecision):
    """The kernel machine f(x) = sum_j alpha_j k(x / ||x||, c_j) + offset of rows x, in their dtype.

    Args:
        kernel: k.
        centers: c_j, normalised features of the training points (n, width).
        alpha: coefficients (n, K).
        offset: added to the K outputs, (K,); None for nothing.
    """

    centers: torch.Tensor
    alpha: torch.Tensor
    offset: torch.Tensor | None

    def __init__(self, kernel: Profile, centers: torch.Tensor, alpha: torch.Tensor, offset=None):
        super().__init__()
        self.kernel = kernel
        self.register_buffer("centers", centers.clone())
        self.register_buffer("alpha", alpha.clone())
        self.register_buffer("offset", None if offset is None else checks.tensor(offset).to(alpha).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs (m, K) of rows x (m, width)."""
        sq = _SquaredDistances.apply(normalise_rows(x), self.centers.to(x.dtype))
        f = _Profile.apply(sq, self.kernel, (_SAME * torch.finfo(self.centers.dtype).eps) ** 2) @ self.alpha.to(x.dtype)
        return f if self.offset is None else f + self.offset.to(x.dtype)


class DeepRFMModule(FixedPrecision):
    """Layers x -> Phi(M^(1/2) x / ||x||), then a kernel machine on the normalised features.

    All trained and random numbers are buffers, so that state_dict holds everything. The network computes in
    float64, as the estimators' own prediction does, and answers in its input's dtype. Casts of the module, such as
    ``.half()``, leave its numbers as they are; moves to a device are followed.

    Args:
        layers: trained layers, which are copied.
        readout: the kernel machine.
        binary: answer with the second of two outputs only, shape (m,), scikit-learn's convention.
        flat: answer with shape (m,) for a single output.
    """

    def __init__(self, layers: list[Layer], readout: Readout, *, binary: bool, flat: bool):
        super().__init__()
        self.layers = torch.nn.Sequential(*(layer.copy() for layer in layers))
        self.readout = readout
        self.binary, self.flat = binary, flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """decision_function (classifier) or predict (regressor) of rows x (m, d)."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor(x)")
        f = self.readout(self.layers(x.double()))
        f = f[:, 1] if self.binary else f.squeeze(1) if self.flat else f
        return f.to(x.dtype) if x.is_floating_point() else f
