"""One sweep of vector-Jacobian products over a data set: the sum of g g^T at every Linear layer at once."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastagop.kernels.gemm import matmul_nt
from fastagop.kernels.precision import matmul_precision
from fastagop.network import model_access
from fastagop.network.blocked import refuse_blocked
from fastagop.network.gradient_hooks import Taps, tapped
from fastagop.network.lending import lent
from fastagop.network.model_access import Layers, Source
from fastagop.network.sample_independence import refuse_mixing

_BLOCK = 256  # A symmetric sum is computed in blocks of so many rows, each only up to the diagonal.
_GATHERED = 512  # One product takes so many gradients, since products of fewer run slower.


class LayerSum:
    """Sum of g g^T over samples and outputs, g being the gradients at one Linear layer of weight W (d_out, d_in).

    The gradient at the layer's input is W^T times that at its output, so the sum may be taken on either side; it
    is taken on the narrower one. Gradients are gathered; products of what was gathered run in the working precision,
    scaled by a power of two so that no square leaves its range, and their sum in float64.

    W is what the layer computes with: where hooks change it, the sum so far moves to the input, and a new one begins.

    Attributes:
        weight: W of the calls whose gradients came last.
        changed: whether there were others.
    """

    def __init__(self, keep_weight: bool = False):
        self.weight: torch.Tensor | None = None
        self.at_input = self.changed = False
        self._keeps = keep_weight
        self._rows: torch.Tensor | None = None  # It holds gradients, (_GATHERED, d).
        self._gathered = 0
        self._total: torch.Tensor | None = None
        self._before: torch.Tensor | None = None  # It is the sum of earlier weights, at the input.

    def taken(self, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The weight as it is now, unless it is one seen before, and whether sums are taken at the input."""
        weight = weight.detach()
        if self.weight is None:
            self.at_input = weight.shape[1] < weight.shape[0]
            self._keeps |= not self.at_input
            self.weight = weight.clone() if self._keeps else weight  # A hook may change the weight in place.
        elif self._keeps and not torch.equal(weight, self.weight):
            return weight.clone(), self.at_input
        return self.weight if self._keeps else weight, self.at_input

    def add(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the outer products of rows (m, d); the strict upper triangle is left undone."""
        if self._keeps and weight is not self.weight:
            if self._gathered or self._total is not None:
                self._move()
            self.weight = weight
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
        if self._rows is None or self._gathered == 0:  # The outputs may not depend on this layer.
            return
        columns, self._gathered = self._rows[: self._gathered].T.contiguous(), 0
        factor = _shrink_(columns)
        if self._total is None:
            self._total = columns.new_zeros(len(columns), len(columns), dtype=torch.float64)
        for start in range(0, len(columns), _BLOCK):
            block = slice(start, start + _BLOCK)
            part = matmul_nt(columns[block], columns[: block.stop])
            self._total[block, : block.stop] += part if factor is None else part.double().mul_(factor)

    def _move(self) -> None:
        """Begin a new sum, for another weight."""
        self._before, self.changed = self._at_input(), True
        self._total = None

    def total(self) -> torch.Tensor:
        """The float64 sum for the last weight on its side: (d_in, d_in) where ``at_input``, else (d_out, d_out)."""
        assert self.weight is not None  # The layer was called.
        self._sum_up()
        self._rows = None
        if self._total is None:
            d = self.weight.shape[1 if self.at_input else 0]
            return self.weight.new_zeros(d, d, dtype=torch.float64)
        return self._total.tril_().add_(self._total.tril(-1).T)

    def _at_input(self) -> torch.Tensor:
        """The float64 sum at the layer's input, (d_in, d_in)."""
        total, W = self.total(), self.weight
        assert W is not None
        if not self.at_input:
            working = torch.promote_types(W.dtype, torch.float32)
            columns, scale = _scaled(W.T.to(working))
            inner, factor = _scaled(total)
            total = matmul_nt(matmul_nt(columns, inner.to(working)), columns).double().mul_(factor * scale * scale)
            total = total.add_(total.T.clone()).mul_(0.5)
        return total if self._before is None else total.add_(self._before)

    def agop(self, divisor: int) -> torch.Tensor:
        """The sum at the layer's input over divisor, (d_in, d_in) of the weight's dtype, float32 for narrower ones."""
        assert self.weight is not None
        with matmul_precision("highest", self.weight.device):
            total = self._at_input()
        return total.div_(divisor).to(torch.promote_types(self.weight.dtype, torch.float32))


def _shrink_(columns: torch.Tensor) -> torch.Tensor | None:
    """Divide by a power of two, where squares might leave the dtype, and return its square, a float64 scalar.

    On a GPU nothing is asked of the numbers: the host would wait for them.
    """
    if not columns.is_cuda and all(end == 0 or 1e-12 < abs(end) < 1e12 for end in map(float, columns.aminmax())):
        return None
    exponent = torch.frexp(columns.abs().amax())[1].double()
    half = torch.floor(exponent / 2)  # The division takes two steps, since the power itself may leave the dtype.
    columns.mul_(torch.exp2(-half)).mul_(torch.exp2(half - exponent))
    return torch.exp2(2 * exponent)


def _scaled(M: torch.Tensor) -> tuple[torch.Tensor, float]:
    """M over a power of two, largest entry about 1, and that power."""
    top = float(M.abs().max()) if M.numel() else 0.0
    scale = 2.0 ** math.frexp(top)[1] if math.isfinite(top) else 1.0
    return (M.double() / scale).to(M.dtype).contiguous(), scale


def sweep(
    model: nn.Module, X: Source, layers: Layers, batch_size: int | None, keep_weights: bool = False
) -> tuple[dict[str, LayerSum], int]:
    """The sums by layer name, and the number of samples."""
    with lent(model):
        linear = model_access.linear_layers(model, layers)
        model_access.say_unmeasured(model, layers)
        sums = {layer: LayerSum(keep_weights) for layer in linear.values()}
        called: set[nn.Linear] = set()
        count, recomputing = 0, False
        for inputs, _ in model_access.batches(X, batch_size, model):
            if count == 0:
                recomputing = refuse_mixing(model, linear, inputs)
            with tapped(sums, recomputing) as taps:
                _sweep_batch(model, taps, inputs)
            refuse_blocked(model, linear, taps, inputs)
            recomputing = taps.recomputing
            called |= {call.layer for call in taps.calls}
            count += len(inputs)
        ran = {name: sums[layer] for name, layer in linear.items() if layer in called}
        model_access.refuse_uncalled(linear, ran, layers)
        return ran, count


def _sweep_batch(model: nn.Module, taps: Taps, inputs: torch.Tensor) -> None:
    """One vector-Jacobian product for each of the K outputs (m, K), for all samples at once."""
    out = taps.run(model, inputs)
    if not out.requires_grad:
        return
    cotangent = torch.zeros_like(out)
    with matmul_precision("highest", out.device):
        for c in range(out.shape[1]):
            cotangent[:, c] = 1
            taps.pull_back(out, cotangent, keep=c + 1 < out.shape[1])
            cotangent[:, c] = 0
