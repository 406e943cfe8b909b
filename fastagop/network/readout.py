"""Which layers no nonlinearity follows: asked of the numbers, whatever tensors a model hands on and in which way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fastagop.network import model_access
from fastagop.network.lending import replaced
from fastagop.network.sites import Site, forwards

_SAMPLES = 8  # So many rows are tried.


@torch.no_grad()
def bare(model: nn.Module, linear: Mapping[str, Site], inputs: torch.Tensor) -> set[str]:
    """Names of the layers, each called once, of whose output h the model's outputs f are an affine function.

    Then f(P) + f(-P) = 2 f(0) and f(2P) + f(0) = 2 f(P), which no usual nonlinearity fulfils for a P of both signs that
    is larger than h and than 1. Where f does not depend on h, nothing is known and the layer is not among them.
    """
    inputs = inputs[:_SAMPLES]
    returned: dict[str, torch.Tensor] = {}

    def keep(site: Site, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = site.compute(input, weight, bias)
        returned[site.name] = out.clone()  # The model may go on to change it in place.
        return out

    with replaced(forwards(linear.values(), keep)):
        out = model_access.outputs(model, inputs)
    found = set()
    for name, h in returned.items():
        module = linear[name].module
        weight, _ = linear[name].layer.weights(module)
        eps = max(model_access.rounding(out), model_access.rounding(h), model_access.rounding(weight))
        if _affine(_outputs_given(model, module, inputs), h, eps):
            found.add(name)
    return found


def _outputs_given(model: nn.Module, layer: nn.Module, inputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's outputs as a function of what the layer returns."""

    def f(h: torch.Tensor) -> torch.Tensor:
        with replaced({layer: lambda input: h.clone()}):
            return model_access.outputs(model, inputs, finite=False).double()

    return f


def _affine(f: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor, eps: float) -> bool:
    size = max(1.0, float(h.abs().max()) if h.numel() else 0.0)
    P = model_access.pattern(h) * min(8.0 * size, torch.finfo(h.dtype).max / 64)
    zero, plus, minus, double = f(torch.zeros_like(h)), f(P), f(-P), f(2 * P)
    change = float((plus - minus).abs().max())
    largest = max(float(value.abs().max()) for value in (zero, plus, minus, double))
    noise = 8 * eps * largest
    if not change > 8 * noise:  # This is true as well where a number is not finite.
        return False
    tolerance = 1e-3 * change + noise
    return all(float(defect.abs().max()) <= tolerance for defect in (plus + minus - 2 * zero, double + zero - 2 * plus))
