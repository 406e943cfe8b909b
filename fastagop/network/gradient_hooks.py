"""Taps at a model's layers: the gradients that pass by in a backward pass, without those of any weight.

While a model is tapped, the forward of each chosen layer computes the same numbers and, on the way back, hands the
gradients to a sink. No gradient is kept unless the sink keeps it, and no weight's gradient is formed unless the model
makes the weight from other layers' outputs, or ``leaf`` asks for it. Weights are those with which the layer's forward
runs, call by call.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fastagop.kernels.gemm import matmul_nt
from fastagop.network.lending import Here, refuse_transforms, replaced
from fastagop.network.sites import Site, forwards

Leaf = Callable[[Site, torch.Tensor], torch.Tensor]
Run = Callable[[torch.Tensor], torch.Tensor]  # It maps inputs to the outputs that are differentiated, (m, K).


class ManyGradientsError(ValueError):
    """One backward pass goes more than once through a call of a layer, so that there is no one gradient."""

    def __init__(self, layer: str):
        super().__init__(
            f"layers: one backward pass goes more than once through a call of {layer!r}, as in implicit models, so "
            "that there is no one gradient; leave the layer out"
        )
        self.layer = layer


class Sink(Protocol):
    """Where the gradients at one layer go."""

    def taken(self, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The matrix to hand back of one that a call computes with, and whether gradients are taken at the input."""
        ...

    def add(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        """Add gradients (m, d) of a call; ``taken`` returned this weight for it."""
        ...


@dataclass(eq=False)
class Call:
    """One call of a tapped layer: ``tracked`` where autograd records it, ``pull`` the last pass that reached it."""

    taps: Taps
    layer: Site
    tracked: bool
    pull: int = 0


class _Tap(torch.autograd.Function):
    """rows W^T + bias; backwards, the sink gets the gradients (m, d) at the output or at the input.

    The graph starts at the first tapped layer: only the anchor, an empty leaf, requires a gradient by itself.
    """

    @staticmethod
    def forward(ctx, anchor, rows, weight, bias, call: Call):
        ctx.weight, ctx.at_input = call.taps.sinks[call.layer].taken(weight)
        ctx.call, ctx.dtype = call, rows.dtype
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None)
        out = nn.functional.linear(rows, weight, bias)
        call.taps.narrow |= torch.float16 in (rows.dtype, out.dtype)
        return out

    @staticmethod
    def backward(ctx, *grads):
        weight, taps = ctx.weight, ctx.call.taps
        grad = grads[0].to(weight.dtype)
        if not taps.here.backward:  # The model differentiates in its own forward, which may be differentiated again.
            return None, (grad @ weight).to(ctx.dtype), None, None, None
        grad = grad.contiguous()
        _, pass_on, to_weight, to_bias, _ = ctx.needs_input_grad
        below = matmul_nt(grad, weight.T) if pass_on or ctx.at_input else grad
        taps.receive(ctx.call, below if ctx.at_input else grad, weight)
        return (
            None,
            below.to(ctx.dtype) if pass_on else None,
            grad.T @ ctx.saved_tensors[0].to(grad.dtype) if to_weight else None,
            grad.sum(0) if to_bias else None,
            None,
        )


class _Pass(torch.autograd.Function):
    """The output of a convolution or an embedding as it is; backwards, the sink gets the gradients at it, as rows.

    The gradients at the patches of a convolution are W^T times these, so that no patch is ever formed.
    """

    @staticmethod
    def forward(ctx, anchor, out, matrix, call: Call):
        ctx.weight, _ = call.taps.sinks[call.layer].taken(matrix)
        ctx.call = call
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, *grads):
        taps = ctx.call.taps
        if taps.here.backward:
            taps.receive(ctx.call, ctx.call.layer.rows(grads[0]), ctx.weight)
        return None, grads[0] if ctx.needs_input_grad[1] else None, None, None


class Taps:
    """A tapped forward pass: ``run`` the model, then ``pull_back`` cotangents as often as wanted.

    Attributes:
        calls: the calls of tapped layers in the forward pass.
        arrived: how many calls of each layer the last backward pass reached.
        recomputing: whether checkpoints with use_reentrant=True are provided for.
        leaves: weights that ``leaf`` made to be differentiated by, with what the last pass found.
    """

    def __init__(self, sinks: Mapping[Site, Sink], recomputing: bool = False, leaf: Leaf | None = None):
        self.sinks, self.recomputing, self.here, self._leaf = sinks, recomputing, Here(), leaf
        self.leaves: list[tuple[Site, torch.Tensor, torch.Tensor | None]] = []
        self.anchor = torch.empty(0, requires_grad=True, device="cpu")
        self.calls: list[Call] = []
        self.arrived: Counter[Site] = Counter()
        self.narrow = False  # It is set where float16 occurs.
        self._pulls = 0
        self._held: list[tuple[Call, torch.Tensor, torch.Tensor]] = []
        self._scale, self._ceiling = 1.0, math.inf

    def run(self, run: Run, inputs: torch.Tensor, asking: bool = False) -> torch.Tensor:
        """The outputs (m, K); ``asking``: inputs require gradients, which takes more memory.

        A checkpoint with use_reentrant=True runs its function without gradients and again, with them, in the backward
        pass; it does so only where its input asks for gradients. So where a layer ran without, the model runs again.
        """
        asking |= self.recomputing
        out = run(self._asking(inputs) if asking else inputs)
        if not all(call.tracked for call in self.calls):
            self.recomputing = True
            if not asking:
                self.calls.clear()
                self.leaves.clear()
                return self.run(run, inputs)
        self.recomputing |= _recomputes(out)
        return out

    @staticmethod
    def _asking(inputs: torch.Tensor) -> torch.Tensor:
        """Inputs that require gradients; the model gets a copy of them, which is no leaf."""
        return inputs.detach().requires_grad_() if inputs.is_floating_point() else inputs

    def step(self, site: Site, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What takes the place of a layer's own multiplication."""
        if site not in self.sinks:
            return site.compute(input, weight, bias)
        refuse_transforms(site.name)
        call = Call(self, site, torch.is_grad_enabled())
        if not self.here.backward:  # A checkpoint that computes again makes no new call.
            self.calls.append(call)
        if self._leaf is not None:
            weight = self._leaf(site, weight)
            self.leaves.append((site, weight, None))
        if site.kind != "linear":
            return self._pass(call, input, weight, bias)
        # The function sees matrices only, since its output must not be a view.
        rows = input.reshape(-1, input.shape[-1])
        out = _Tap.apply(self.anchor, rows, weight, bias, call)
        return out if input.ndim == 2 else out.view(*input.shape[:-1], out.shape[-1])

    def _pass(self, call: Call, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = call.layer.compute(input, weight, bias)
        self.narrow |= torch.float16 in (input.dtype, out.dtype)
        out = out.clone() if out._is_view() else out  # The function marks it as changed in place.
        return _Pass.apply(self.anchor, out, call.layer.matrix(weight).detach(), call)

    def receive(self, call: Call, rows: torch.Tensor, weight: torch.Tensor) -> None:
        """Take the gradients of a call in a backward pass."""
        if call.pull == self._pulls:
            raise ManyGradientsError(call.layer.name)
        call.pull = self._pulls
        self.arrived[call.layer] += 1
        if self.narrow:
            self._held.append((call, rows, weight))
        else:
            self.sinks[call.layer].add(rows, weight)

    def pull_back(self, out: torch.Tensor, cotangent: torch.Tensor, keep: bool) -> None:
        """Send one vector-Jacobian product past all taps; keep the graph for the next one.

        Where float16 occurs the cotangent is multiplied by a power of two that keeps gradients within its range.
        """
        if not self.narrow:
            self._pull(out, cotangent, keep)
            return
        self._ceiling = min(self._ceiling, 2.0**15 if out.dtype == torch.float16 else 2.0**30)
        while True:
            self._held.clear()
            self._pull(out, cotangent * self._scale, True)
            if not self._rescale():
                break
        for call, rows, weight in self._held:
            self.sinks[call.layer].add(rows.float() / self._scale, weight)
        self._held.clear()

    def _pull(self, out: torch.Tensor, cotangent: torch.Tensor, keep: bool) -> None:
        self._pulls += 1
        self.arrived.clear()
        self.here.backward = True
        try:
            if self.recomputing:  # Such checkpoints refuse a backward pass towards chosen tensors.
                torch.autograd.backward(out, cotangent, retain_graph=keep)
                self.leaves = [(site, leaf, leaf.grad) for site, leaf, _ in self.leaves]
            else:
                leaves = list(self.leaves)  # A checkpoint that computes again makes more of them.
                ends = [self.anchor, *(leaf for _, leaf, _ in leaves)]
                found = torch.autograd.grad(out, ends, cotangent, retain_graph=keep, allow_unused=True)[1:]
                self.leaves = [(site, leaf, grad) for (site, leaf, _), grad in zip(leaves, found, strict=True)]
        finally:
            self.here.backward = False

    def _rescale(self) -> bool:
        """Whether the pass has to run again at the new scale: it left float16's range, or stayed near its lower end."""
        top = max((float(rows.abs().max()) for _, rows, _ in self._held if rows.numel()), default=1.0)
        if not math.isfinite(top):
            self._scale = self._ceiling = self._scale / 256
            if self._scale < 2.0**-24:
                raise ValueError("model: its gradients leave float16's range; measure it in bfloat16 or float32")
            return True
        if top >= 64 or self._scale >= self._ceiling:
            return False
        self._scale = min(self._ceiling, self._scale * 2.0 ** (10 - math.frexp(top)[1]) if top > 0 else self._ceiling)
        return True


def _recomputes(out: torch.Tensor) -> bool:
    """Whether a checkpoint with use_reentrant=True lies on the way back from the outputs."""
    todo, seen = [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        todo += [function for function, _ in node.next_functions]
    return False


@contextlib.contextmanager
def tapped(sinks: Mapping[Site, Sink], recomputing: bool = False, leaf: Leaf | None = None) -> Iterator[Taps]:
    """Tap each site while the block runs the model forwards and backwards."""
    taps = Taps(sinks, recomputing, leaf)
    with replaced(forwards(sinks, taps.step), taps.here):
        yield taps
