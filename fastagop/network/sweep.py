"""One sweep of vector-Jacobian products over a data set: the sums of g g^T at all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fastagop.kernels.precision import matmul_precision
from fastagop.network import model_access
from fastagop.network.blocked import refuse_blocked
from fastagop.network.choosing import Chosen
from fastagop.network.gradient_hooks import Leaf, Sink, Taps, tapped
from fastagop.network.layer_sum import LayerSum
from fastagop.network.lending import lent
from fastagop.network.model_access import Layers, Source
from fastagop.network.sample_independence import refuse_mixing
from fastagop.network.sites import Kind, Site
from fastagop.network.sketch import Signs, SketchedSum
from fastagop.network.targets import Outputs, Target


@dataclass(frozen=True)
class Request:
    """What is measured of a model: ``agop`` says what the fields mean."""

    model: nn.Module
    X: Source
    layers: Layers = None
    batch_size: int | None = None
    outputs: Outputs = None
    name: str = "outputs"  # That of ``outputs`` in errors.
    sketch: int | None = None
    seed: int | torch.Generator = 0


def sweep(
    request: Request, kinds: tuple[Kind, ...], keep_weights: bool = False
) -> tuple[dict[str, LayerSum], int, Chosen]:
    """The sums by layer name, the number of samples, and which layers these are."""
    signs = None if request.sketch is None else Signs(request.sketch, request.seed)
    with lent(request.model):
        chosen = Chosen(request.model, request.layers, kinds)
        kind = LayerSum if signs is None else SketchedSum
        sums = {site: kind(keep_weights, site.kind) for site in chosen.sites.values()}

        def pull(taps: Taps, out: torch.Tensor) -> None:
            if signs is None:
                _pull_each(taps, out)
            else:
                signs.pull(taps, out, [sums[site] for site in taps.sinks])  # pyright: ignore[reportArgumentType]

        ran, count = walk(request, chosen, sums, pull)
        for layer_sum in sums.values():
            if isinstance(layer_sum, SketchedSum):
                layer_sum.finish()
        return {name: sums[site] for name, site in chosen.sites.items() if site in ran}, count, chosen


def walk(
    request: Request,
    chosen: Chosen,
    sinks: Mapping[Site, Sink],
    pull: Callable[[Taps, torch.Tensor], None],
    leaf: Leaf | None = None,
) -> tuple[set[Site], int]:
    """Send all batches through the tapped model and ``pull`` back from each; the sites that ran, and the samples.

    What cannot be measured is refused on the way, or left out of ``chosen``.
    """
    model, target = request.model, Target(request.model, request.outputs, request.name)
    ran: set[Site] = set()
    count, tried, recomputing = 0, False, False
    for inputs, labels in model_access.batches(request.X, request.batch_size, model):
        runs = target.runs(labels)
        if not tried and len(inputs) > 1:  # One sample alone shows nothing.
            recomputing |= refuse_mixing(model, chosen, inputs, runs, request.name)
            tried = True
        with tapped({site: sinks[site] for site in chosen.sites.values()}, recomputing, leaf) as taps:
            out = taps.run(runs(), inputs)
            if out.requires_grad:
                with matmul_precision("highest", out.device):
                    pull(taps, out)
        refuse_blocked(chosen, taps, runs(finite=False), inputs)
        recomputing = taps.recomputing
        ran |= {call.layer for call in taps.calls}
        count += len(inputs)
    chosen.finish(ran)
    return ran, count


def _pull_each(taps: Taps, out: torch.Tensor) -> None:
    """One vector-Jacobian product for each of the K outputs (m, K), for all samples at once."""
    cotangent = torch.zeros_like(out)
    for c in range(out.shape[1]):
        cotangent[:, c] = 1
        taps.pull_back(out, cotangent, keep=c + 1 < out.shape[1])
        cotangent[:, c] = 0
