"""Taps at Linear layers: the gradients that pass by in a backward pass, without those of any weight.

While a model is tapped, the forward of each chosen layer computes the same numbers and, on the way back, hands the
gradients to a sink. No gradient is kept unless the sink keeps it, and no weight's gradient is ever formed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from fastagop.kernels._products import product

Sink = Callable[[torch.Tensor], None]


class _Tap(torch.autograd.Function):
    """rows W^T + bias; backwards, the sink gets the gradients (m, d) at the output or, ``at_input``, at the input.

    The graph starts at the first tapped layer: only the anchor, an empty leaf, requires a gradient by itself.
    """

    @staticmethod
    def forward(ctx, anchor, rows, layer: nn.Linear, at_input: bool, sink: Sink):
        ctx.weight, ctx.at_input, ctx.sink, ctx.dtype = layer.weight.detach(), at_input, sink, rows.dtype
        return nn.functional.linear(rows, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, *grads):
        grad = grads[0].to(ctx.weight.dtype).contiguous()
        pass_on = ctx.needs_input_grad[1]
        below = product(grad, ctx.weight.T) if pass_on or ctx.at_input else grad
        ctx.sink(below if ctx.at_input else grad)
        return None, below.to(ctx.dtype) if pass_on else None, None, None, None


class Taps:
    """What a tapped forward pass leaves: ``pull_back`` it as often as wanted; ``called`` are the layers that ran."""

    def __init__(self):
        self.anchor = torch.empty(0, requires_grad=True)
        self.called: set[nn.Linear] = set()

    def forward(self, layer: nn.Linear, at_input: bool, sink: Sink, input: torch.Tensor) -> torch.Tensor:
        """What the layer's forward becomes."""
        self.called.add(layer)
        rows = input.reshape(-1, input.shape[-1])  # the function sees matrices only: its output must not be a view
        out = _Tap.apply(self.anchor, rows, layer, at_input, sink)
        return out if input.ndim == 2 else out.view(*input.shape[:-1], layer.out_features)

    def pull_back(self, out: torch.Tensor, cotangent: torch.Tensor, keep: bool) -> None:
        """Send one vector-Jacobian product past all taps; keep the graph for the next one."""
        torch.autograd.grad(out, self.anchor, cotangent, retain_graph=keep, allow_unused=True)


@contextlib.contextmanager
def tapped(sinks: Mapping[nn.Linear, tuple[bool, Sink]]) -> Iterator[Taps]:
    """Tap each layer, given (at_input, sink), while the block runs the model forwards and backwards."""
    taps = Taps()
    try:
        for layer, (at_input, sink) in sinks.items():
            layer.forward = partial(taps.forward, layer, at_input, sink)
        yield taps
    finally:
        for layer in sinks:
            vars(layer).pop("forward", None)
