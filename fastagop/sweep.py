"""One sweep of vector-Jacobian products over a data set: the sum of g g^T at every Linear layer at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fastagop import models
from fastagop.kernels._products import product
from fastagop.mixing import refuse_mixing
from fastagop.models import Layers, Source
from fastagop.taps import Taps, tapped

_BLOCK = 256  # rows of a symmetric sum computed at once, each only up to the diagonal
_GATHERED = 512  # gradients that one product takes: products of fewer run slower


class LayerSum:
    """Sum of g g^T over samples and outputs, g being the gradients at one Linear layer of weight W (d_out, d_in).

    The gradient at the layer's input is W^T times that at its output, so the sum may be taken on either side; it
    is taken on the narrower one. Gradients are gathered; products of what was gathered run in the working precision,
    and their sum in float64.
    """

    def __init__(self, layer: nn.Linear):
        self.weight = layer.weight.detach()
        self.at_input = layer.in_features < layer.out_features
        self._rows: torch.Tensor | None = None  # gradients (_GATHERED, d)
        self._gathered = 0
        self._total: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add the outer products of rows (m, d); the strict upper triangle is left undone."""
        if self._rows is None:
            dtype = torch.promote_types(rows.dtype, torch.float32)
            self._rows = rows.new_empty(_GATHERED, rows.shape[1], dtype=dtype)
        while len(rows):
            now, rows = rows[: _GATHERED - self._gathered], rows[_GATHERED - self._gathered :]
            self._rows[self._gathered : self._gathered + len(now)] = now
            self._gathered += len(now)
            if self._gathered == _GATHERED:
                self._sum_up()

    def _sum_up(self) -> None:
        if self._rows is None or self._gathered == 0:  # the outputs may not depend on this layer
            return
        columns, self._gathered = self._rows[: self._gathered].T.contiguous(), 0
        if self._total is None:
            self._total = columns.new_zeros(len(columns), len(columns), dtype=torch.float64)
        for start in range(0, len(columns), _BLOCK):
            block = slice(start, start + _BLOCK)
            self._total[block, : block.stop] += product(columns[block], columns[: block.stop])

    def total(self) -> torch.Tensor:
        """The float64 sum on its side: (d_in, d_in) where ``at_input``, else (d_out, d_out)."""
        self._sum_up()
        self._rows = None
        if self._total is None:
            d = self.weight.shape[1 if self.at_input else 0]
            return self.weight.new_zeros(d, d, dtype=torch.float64)
        return self._total.tril_().add_(self._total.tril(-1).T)

    def agop(self) -> torch.Tensor:
        """The sum at the layer's input, (d_in, d_in) of the weight's dtype."""
        W = self.weight
        if self.at_input:
            return self.total().to(W.dtype)
        columns = W.T.to(torch.promote_types(W.dtype, torch.float32)).contiguous()
        M = product(product(columns, self.total().to(columns.dtype)), columns)
        return M.add_(M.T.clone()).mul_(0.5).to(W.dtype)


def sweep(model: nn.Module, X: Source, layers: Layers, batch_size: int | None) -> tuple[dict[str, LayerSum], int]:
    """The sums by layer name, and the number of samples."""
    linear = models.linear_layers(model, layers)
    called: set[nn.Linear] = set()
    count = 0
    with models.evaluating(model):  # what reparametrised weights are depends on the mode, too
        sums = {layer: LayerSum(layer) for layer in linear.values()}
        for inputs, _ in models.batches(X, batch_size, model):
            if count == 0:
                refuse_mixing(model, linear, inputs)
            called |= _sweep_batch(model, sums, inputs)
            count += len(inputs)
    ran = {name: sums[layer] for name, layer in linear.items() if layer in called}
    models.refuse_uncalled(linear, ran, layers)
    return ran, count


def _sweep_batch(model: nn.Module, sums: Mapping[nn.Linear, LayerSum], inputs: torch.Tensor) -> set[nn.Linear]:
    """Add a batch to the sums; the layers that were called."""
    with tapped({layer: (one.at_input, one.add) for layer, one in sums.items()}) as taps:
        out = models.outputs(model, inputs)
        if taps.called:
            _pull_back_outputs(taps, out)
    return taps.called


def _pull_back_outputs(taps: Taps, out: torch.Tensor) -> None:
    """One vector-Jacobian product for each of the K outputs (m, K), for all samples at once."""
    if not out.requires_grad:
        raise ValueError("layers: the model's output does not depend on them, or its forward detaches it")
    cotangent = torch.zeros_like(out)
    for c in range(out.shape[1]):
        cotangent[:, c] = 1
        taps.pull_back(out, cotangent, keep=c + 1 < out.shape[1])
        cotangent[:, c] = 0
