"""Refuse layers whose gradient the model blocks: an AGOP of zero has to mean that the outputs do not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from fastagop.network import model_access
from fastagop.network.gradient_hooks import Call, Taps
from fastagop.network.lending import replaced


def refuse_blocked(model: nn.Module, linear: Mapping[str, nn.Linear], taps: Taps, inputs: torch.Tensor) -> None:
    """After a backward pass: where no gradient reached a call, changing what it returns may not change the outputs.

    Raises:
        ValueError: naming the layer and what blocks it; also where the outputs depend on none of the layers.
    """
    made = Counter(call.layer for call in taps.calls)
    silent = {name: layer for name, layer in linear.items() if taps.arrived[layer] < made[layer]}
    blocked = {name: call for name, layer in silent.items() if (call := _blocked(model, layer, taps, inputs))}
    if blocked:
        name, call = next(iter(blocked.items()))
        reason = (
            "its forward detaches it (by .detach(), .data, or an operation that has no derivative)"
            if call.tracked
            else "its forward runs it without gradients (torch.no_grad, inference_mode, or a checkpoint with "
            "use_reentrant=True whose input asks for none)"
        )
        rest = model_access.listed(other for other in linear if other not in blocked)
        raise ValueError(
            f"layers: the model's outputs depend on {name!r}, but {reason}, so that its AGOP is unknown; "
            + (f"leave it out, layers=[{rest}]" if rest else "measure a model that lets gradients through")
        )
    if taps.calls and not any(taps.arrived.values()):
        raise ValueError("layers: the model's output does not depend on them, or its forward detaches it")
    for name, layer in linear.items():
        if taps.arrived[layer] > made[layer]:
            raise ValueError(
                f"layers: a backward pass goes through {name!r} {taps.arrived[layer]} times, a forward pass "
                f"{made[layer]} times (an implicit layer?), so there is no one gradient; leave it out"
            )


def _blocked(model: nn.Module, layer: nn.Linear, taps: Taps, inputs: torch.Tensor) -> Call | None:
    """A call of the layer that the outputs depend on and no gradient reaches; None where all is well."""
    calls = [call for call in taps.calls if call.layer is layer]
    silent = [index for index, call in enumerate(calls) if call.pull == 0]
    matter = [index for index in silent if _matters(model, layer, index, inputs)]
    # Of the calls that were reached, a checkpoint made so many again.
    again = taps.arrived[layer] - (len(calls) - len(silent))
    return calls[matter[-1]] if len(matter) > again else None


def _matters(model: nn.Module, layer: nn.Linear, index: int, inputs: torch.Tensor) -> bool:
    """Whether the model's outputs change with what one call of the layer returns."""
    plain = _changed(model, layer, index, inputs, 0.0)
    return any(model_access.differ(_changed(model, layer, index, inputs, sign), plain) for sign in (1.0, -1.0))


def _changed(model: nn.Module, layer: nn.Linear, index: int, inputs: torch.Tensor, sign: float) -> torch.Tensor:
    """The model's outputs where one call of the layer returns something else: more or less by 1 to 5 times its size."""
    count = 0

    def forward(input: torch.Tensor) -> torch.Tensor:
        nonlocal count
        out = type(layer).forward(layer, input)
        if count == index and sign != 0:
            out = out + sign * (1 + out.abs().max()) * model_access.pattern(out).abs().mul(4).add(1)
        count += 1
        return out

    with torch.no_grad(), replaced({layer: forward}):
        return model_access.outputs(model, inputs, finite=False)
