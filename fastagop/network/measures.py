"""The measures that users call: AGOPs of Linear layers, and their correlation with W^T W."""

from __future__ import annotations

import torch
from torch import nn

from fastagop import linalg
from fastagop.kernels import checks
from fastagop.network.collapse_split import NotAMatrixError
from fastagop.network.layer_agop import LayerSum, sweep
from fastagop.network.model_access import Layers, Source

__all__ = ["ConstantMatrixError", "NotAMatrixError", "agop", "nfa_correlation"]


class ConstantMatrixError(ValueError):
    """All entries of W^T W or of the AGOP are equal: there is no correlation between them."""


@torch.no_grad()
def agop(
    model: nn.Module, X: Source, layers: Layers = None, *, reduction: str = "mean", batch_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Average gradient outer product of the model's outputs with respect to the input of each Linear layer.

    Formula: M = (1/n) sum_ic g_ic g_ic^T, g_ic the gradient of output c at sample i with respect to what enters the
    layer (paper, section 3.3). An input of shape (n, ..., d) counts as n times ... vectors (tokens, say), each with its
    own gradients, all summed; so do the calls of a layer that is used more than once. Only the way through the layer
    counts: where its input also goes elsewhere, past a residual connection, the gradient of that branch is left out.

    One forward pass and K vector-Jacobian products a batch serve all layers. Sums across batches run in float64.
    Weights are those with which a layer's forward runs, after all hooks that make or mask them, batch by batch.

    Args:
        model, X, layers: see the module's text.
        reduction: "mean" divides by n, "sum" does not.
        batch_size: samples of a tensor X that are taken at once; default 256.

    Returns:
        By layer name, in the model's order, (d, d) on the layer's device, of its dtype, or float32 where that is
        narrower; zero where the outputs do not depend on the layer. Outputs of any shape (n, ...) count as K numbers
        a sample. Warns of layers with weights that are no Linear layers, unless ``layers`` is given.

    Raises:
        TypeError, ValueError: naming the argument, among them a module that mixes the samples of a batch, and a layer
            that the outputs depend on while the model blocks the gradient (torch.no_grad, .detach()).
    """
    checks.choice("reduction", reduction, ("mean", "sum"))
    sums, n = sweep(model, X, layers, batch_size)
    divisor = n if reduction == "mean" else 1
    return {name: _finite(name, sums.pop(name).agop(divisor)) for name in list(sums)}


def _finite(name: str, M: torch.Tensor) -> torch.Tensor:
    if not checks.finite(M):
        raise ValueError(f"model: the AGOP at {name!r} leaves the range of {M.dtype}; scale its outputs down")
    return M


@torch.no_grad()
def nfa_correlation(
    model: nn.Module, X: Source, layers: Layers = None, *, batch_size: int | None = None
) -> dict[str, float]:
    """How well the neural feature ansatz holds: correlation of W^T W with the square root of the AGOP, by layer.

    Formula: Pearson correlation of the entries of W^T W (d, d) and M^(1/2), M as in ``agop`` (paper, section 5 and
    appendix C); 1 where they agree up to scale and offset. Computed without forming them where W is wide.

    Args, Raises: as ``agop``; also ConstantMatrixError, a ValueError, where either matrix is constant: an AGOP of zero;
        and a ValueError where hooks give a layer another weight with every batch.
    """
    sums, _ = sweep(model, X, layers, batch_size, keep_weights=True)
    return {name: _nfa(name, layer_sum) for name, layer_sum in sums.items()}


def _nfa(name: str, layer_sum: LayerSum) -> float:
    """Both matrices are Q A Q^T, Q (d, r) with orthonormal columns: the identity, or a basis of W's rows."""
    if layer_sum.weight is None or layer_sum.changed:
        raise ValueError(
            f"layers: the weight of {name!r} changes from call to call, so W is no one matrix; leave it out"
        )
    W = layer_sum.weight.double()
    if layer_sum.at_input:
        gram, M, sums = W.T @ W, layer_sum.total(), W.new_ones(W.shape[1])
    else:
        Q, R = torch.linalg.qr(W.T)
        gram, M, sums = R @ R.T, R @ layer_sum.total() @ R.T, Q.sum(0)
    correlation = _pearson(gram, linalg.psd_sqrt(_finite(name, M)), sums, W.shape[1] ** 2)
    if correlation is None:
        raise ConstantMatrixError(
            f"layers: {name!r} has no NFA correlation, since its W^T W or its AGOP is constant (zero, say); "
            "leave it out of layers"
        )
    return correlation


def _pearson(A: torch.Tensor, B: torch.Tensor, sums: torch.Tensor, count: int) -> float | None:
    """Pearson correlation of the entries of Q A Q^T and Q B Q^T, count of them, with sums = Q^T 1."""
    a, b = sums @ A @ sums, sums @ B @ sums  # These are the sums of all entries.
    covariance = float((A * B).sum() - a * b / count)
    variances = [float(C.square().sum() - c * c / count) for C, c in ((A, a), (B, b))]
    scales = [float(C.square().sum()) for C in (A, B)]
    rounding = count * torch.finfo(A.dtype).eps
    if any(variance <= rounding * scale for variance, scale in zip(variances, scales, strict=True)):
        return None
    return covariance / (variances[0] * variances[1]) ** 0.5
