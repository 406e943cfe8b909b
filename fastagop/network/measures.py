"""The measures that users call: AGOPs of layers, FACT matrices, and the correlation of either with W^T W."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastagop import linalg
from fastagop.kernels import checks
from fastagop.network.choosing import Chosen
from fastagop.network.collapse_split import NotAMatrixError
from fastagop.network.correlation import in_unit, pearson
from fastagop.network.layer_sum import LayerSum
from fastagop.network.model_access import Layers, Source
from fastagop.network.results import ByLayer
from fastagop.network.sites import KINDS, MATRICES
from fastagop.network.sketch import SketchedSum
from fastagop.network.sweep import Request, sweep
from fastagop.network.targets import Outputs
from fastagop.network.weight_gradients import Loss, fact_matrix, gram_correlation, weight_gradients

__all__ = ["ConstantMatrixError", "NotAMatrixError", "agop", "fact", "fact_correlation", "nfa_correlation"]


class ConstantMatrixError(ValueError):
    """All entries of W^T W, or of the AGOP or the FACT matrix, are equal: there is no correlation between them."""


@torch.no_grad()
def agop(
    model: nn.Module,
    X: Source,
    layers: Layers = None,
    *,
    reduction: str = "mean",
    batch_size: int | None = None,
    outputs: Outputs = None,
    sketch: int | None = None,
    seed: int | torch.Generator = 0,
) -> ByLayer[torch.Tensor]:
    """Average gradient outer product of the model's outputs with respect to the input of each layer.

    Formula: M = (1/n) sum_ic g_ic g_ic^T, g_ic the gradient of output c at sample i with respect to what enters the
    layer (paper, section 3.3). An input of shape (n, ..., d) counts as n times ... vectors (tokens, say), each with its
    own gradients, all summed; so do the calls of a layer that is used more than once. Only the way through the layer
    counts: where its input also goes elsewhere, past a residual connection, the gradient of that branch is left out.

    A convolution is a Linear layer whose tokens are the patches of its padded input, as ``torch.nn.functional.unfold``
    orders them: M is (c k k, c k k), to compare with W^T W of the filters W (c_out, c k k). With groups, M is
    (groups, d, d), d = c k k / groups, a block for each group, since no filter sees two of them. An attention layer
    ``NAME`` has four layers: ``NAME.q_proj``, ``NAME.k_proj``, ``NAME.v_proj`` and ``NAME.out_proj``. At an embedding
    the gradients are those with respect to the vectors that it returns.

    One forward pass and K vector-Jacobian products a batch serve all layers. Sums across batches run in float64.
    Weights are those with which a layer's forward runs, after all hooks that make or mask them, batch by batch.

    Args:
        model, X, layers: see the module's text.
        reduction: "mean" divides by n, "sum" does not.
        batch_size: samples of a tensor X that are taken at once; default 256.
        outputs: which outputs count: indices of them; or a function of what the model returns, or of that and the
            labels that the batches of X bring, with values (n,) or (n, k): a loss, a logit difference. Default all.
        sketch: number (2 or more) of random combinations, with signs drawn anew for every sample, that take the place
            of a sample's outputs: M is unbiased, and costs as much as ``sketch`` outputs do. Default: all outputs.
        seed: seed of the signs, a number or a torch.Generator on the CPU; they do not depend on ``batch_size``.

    Returns:
        By layer name, in the model's order, (d, d) on the layer's device, of its dtype, or float32 where that is
        narrower; zero where the outputs do not depend on the layer. Outputs of any shape (n, ...) count as K numbers
        a sample. A dictionary, whose ``skipped`` says by name which layers are left out and why, and whose
        ``standard_error``, with ``sketch``, has the root of the mean square of |M - exact M|_F to expect. Warns of
        layers that are left out, unless ``layers`` is given.

    Raises:
        TypeError, ValueError: naming the argument, among them a module that mixes the samples of a batch, and a layer
            that the outputs depend on while the model blocks the gradient (torch.no_grad, .detach()).
    """
    checks.choice("reduction", reduction, ("mean", "sum"))
    request = Request(model, X, layers, batch_size, outputs, sketch=sketch, seed=seed)
    sums, n, chosen = sweep(request, KINDS)
    divisor = (n if reduction == "mean" else 1) * (sketch or 1)
    errors = {
        name: math.sqrt(layer_sum.square_error) / divisor
        for name, layer_sum in sums.items()
        if isinstance(layer_sum, SketchedSum)
    }
    chosen.say()
    return ByLayer({name: _finite(name, sums.pop(name).agop(divisor)) for name in list(sums)}, chosen.skipped, errors)


def _finite(name: str, M: torch.Tensor) -> torch.Tensor:
    if not checks.finite(M):
        raise ValueError(f"model: the AGOP at {name!r} leaves the range of {M.dtype}; scale its outputs down")
    return M


@torch.no_grad()
def nfa_correlation(
    model: nn.Module,
    X: Source,
    layers: Layers = None,
    *,
    batch_size: int | None = None,
    outputs: Outputs = None,
    sketch: int | None = None,
    seed: int | torch.Generator = 0,
) -> ByLayer[float]:
    """How well the neural feature ansatz holds: correlation of W^T W with the square root of the AGOP, by layer.

    Formula: Pearson correlation of the entries of W^T W (d, d) and M^(1/2), M as in ``agop`` (paper, section 5 and
    appendix C); 1 where they agree up to scale and offset. Computed without forming them where W is wide. With groups,
    the entries of all blocks are correlated at once. Embeddings have no such matrix and are left out.

    Args, Raises: as ``agop``; also ConstantMatrixError, a ValueError, where either matrix is constant: an AGOP of zero
        (other layers than Linear are then left out with a warning, unless they are named); and a ValueError where hooks
        give a layer another weight with every batch.
    """
    request = Request(model, X, layers, batch_size, outputs, sketch=sketch, seed=seed)
    sums, _, chosen = sweep(request, MATRICES, keep_weights=True)
    return _defined(chosen, "NFA", "AGOP", {name: _nfa(name, layer_sum) for name, layer_sum in sums.items()})


def _nfa(name: str, layer_sum: LayerSum) -> float | None:
    """Both matrices are Q A Q^T, Q (d, r) with orthonormal columns: the identity, or a basis of W's rows."""
    if layer_sum.weight is None or layer_sum.changed:
        raise ValueError(
            f"layers: the weight of {name!r} changes from call to call, so W is no one matrix; leave it out"
        )
    W, total = in_unit(layer_sum.weight.double()), layer_sum.total()
    if layer_sum.at_input:
        gram, M, sums = W.T @ W, total, W.new_ones(W.shape[1])
    else:
        Q, R = torch.linalg.qr(W.mT)
        gram, M, sums = R @ R.mT, R @ in_unit(total) @ R.mT, Q.sum(-2)
    _finite(name, total)
    M = in_unit(M)
    root = linalg.psd_sqrt(M) if M.ndim == 2 else torch.stack([linalg.psd_sqrt(block) for block in M])
    return _of_entries(gram, root, sums, (1 if W.ndim == 2 else len(W)) * W.shape[-1] ** 2)


def _of_entries(A: torch.Tensor, B: torch.Tensor, sums: torch.Tensor, count: int) -> float | None:
    """Pearson correlation of the entries of Q A Q^T and Q B Q^T, count of them, with sums = Q^T 1."""
    a, b = (float((sums * (C @ sums.unsqueeze(-1)).squeeze(-1)).sum()) for C in (A, B))
    return pearson(float((A * B).sum()), (a, b), (float(A.square().sum()), float(B.square().sum())), count)


def _defined(chosen: Chosen, measure: str, matrix: str, correlations: dict[str, float | None]) -> ByLayer[float]:
    """The correlations that there are; a layer without one is refused, or left out where ``chosen`` may do so."""
    for name, correlation in correlations.items():
        why = f"no {measure} correlation, since its W^T W or its {matrix} is constant (zero, say)"
        if correlation is None and not chosen.may_skip(name):
            raise ConstantMatrixError(f"layers: {name!r} has {why}; leave it out of layers")
        if correlation is None:
            chosen.skip(name, f"it has {why}")
    chosen.say()
    return ByLayer({name: c for name, c in correlations.items() if c is not None}, chosen.skipped)


@torch.no_grad()
def fact(
    model: nn.Module,
    X: Source,
    y=None,
    layers: Layers = None,
    *,
    loss: Loss,
    weight_decay: float,
    batch_size: int | None = None,
) -> ByLayer[torch.Tensor]:
    """The FACT matrix of each layer, which W^T W equals where training with weight decay has come to rest.

    Formula: F = -(1 / (n lambda)) sum_i (dL_i / dh_i) h_i^T, (d, d), for what enters a layer, h_i, and the loss L_i of
    sample i, summed over tokens, patches and calls as in ``agop``. Where the gradient of mean_i L_i + (lambda / 2)
    |W|^2 with respect to W is zero, lambda W = -mean_i (dL_i / dz_i) h_i^T at the output z, and W^T times that is W^T W
    = F (Boix-Adsera, Mallinar, Simon and Belkin, The Features at Convergence Theorem, arXiv 2507.05644). Away from
    such a point F need not be symmetric.

    Args:
        model, X, layers, batch_size: as in ``agop``; embeddings are left out.
        y: labels, one row a sample of a tensor X; default those that the batches of X bring.
        loss: maps what the model returns and the labels to one loss a sample (n,), the one that was trained: for
            example ``lambda out, y: torch.nn.functional.cross_entropy(out, y, reduction="none")``.
        weight_decay: lambda, as in ``torch.optim.SGD``, whose gradient has lambda W added to it.

    Returns:
        By layer name (d, d), or (groups, d, d), as ``agop``; of the layer's dtype, or float32 where it is narrower.

    Raises:
        TypeError, ValueError: as ``agop``; also where the model runs in float16, which gradients of weights leave, or
            where a layer's weight changes from call to call.
    """
    decay = checks.nonnegative("weight_decay", weight_decay)
    if decay == 0:
        raise ValueError("weight_decay must be > 0, the one that the model was trained with, got 0")
    found, n, chosen = weight_gradients(model, X, y, layers, loss, batch_size)
    matrices = {name: fact_matrix(gradient, decay, n) for name, gradient in found.items()}
    for name, M in matrices.items():
        if not checks.finite(M):
            raise ValueError(f"model: the FACT matrix of {name!r} leaves the range of {M.dtype}; scale the loss down")
    chosen.say()
    return ByLayer(matrices, chosen.skipped)


@torch.no_grad()
def fact_correlation(
    model: nn.Module, X: Source, y=None, layers: Layers = None, *, loss: Loss, batch_size: int | None = None
) -> ByLayer[float]:
    """Correlation of W^T W with the FACT matrix by layer, to put beside ``nfa_correlation``.

    Formula: Pearson correlation of the entries of W^T W and F, F as in ``fact``; weight decay only scales F, so it need
    not be known. No matrix (d, d) is formed.

    Args, Raises: as ``fact``; also ConstantMatrixError, a ValueError, where either matrix is constant: a loss without
        gradient.
    """
    found, _, chosen = weight_gradients(model, X, y, layers, loss, batch_size)
    return _defined(chosen, "FACT", "FACT matrix", {name: gram_correlation(each) for name, each in found.items()})
