"""Refuse layers whose gradient the model blocks: an AGOP of zero has to mean that the outputs do not change."""

from __future__ import annotations

from collections import Counter

import torch

from fastagop.network import model_access
from fastagop.network.choosing import Chosen, listed
from fastagop.network.gradient_hooks import Call, Run, Taps
from fastagop.network.lending import replaced
from fastagop.network.sites import Site, forwards

_SINGLE = torch.finfo(torch.float32).eps


def refuse_blocked(chosen: Chosen, taps: Taps, run: Run, inputs: torch.Tensor) -> None:
    """After a backward pass: where no gradient reached a call, changing what it returns may not change the outputs.

    Layers that nobody asked for by name, other than Linear ones, are left out instead.

    Raises:
        ValueError: naming the layer and what blocks it; also where the outputs depend on none of the layers.
    """
    made = Counter(call.layer for call in taps.calls)
    silent = {name: site for name, site in chosen.sites.items() if taps.arrived[site] < made[site]}
    blocked = {name: call for name, site in silent.items() if (call := _blocked(site, taps, run, inputs))}
    reasons = {
        name: "its forward detaches it (by .detach(), .data, or an operation that has no derivative)"
        if call.tracked
        else "its forward runs it without gradients (torch.no_grad, inference_mode, or a checkpoint with "
        "use_reentrant=True whose input asks for none)"
        for name, call in blocked.items()
    }
    refused = [name for name in blocked if not chosen.may_skip(name)]
    if refused:
        rest = listed(other for other in chosen.sites if other not in blocked)
        raise ValueError(
            f"layers: the model's outputs depend on {refused[0]!r}, but {reasons[refused[0]]}, so that its AGOP is "
            "unknown; " + (f"leave it out, layers=[{rest}]" if rest else "measure a model that lets gradients through")
        )
    for name in blocked:
        chosen.skip(name, f"the outputs depend on it, but {reasons[name]}")
    if taps.calls and not any(taps.arrived.values()):
        raise ValueError("layers: the model's output does not depend on them, or its forward detaches it")
    for name, site in list(chosen.sites.items()):
        if taps.arrived[site] <= made[site]:
            continue
        if chosen.may_skip(name):
            chosen.skip(name, "a backward pass goes more often through it than a forward pass does")
        else:
            raise ValueError(
                f"layers: a backward pass goes through {name!r} {taps.arrived[site]} times, a forward pass "
                f"{made[site]} times (an implicit layer?), so there is no one gradient; leave it out"
            )


def _blocked(site: Site, taps: Taps, run: Run, inputs: torch.Tensor) -> Call | None:
    """A call of the layer that the outputs depend on and no gradient reaches; None where all is well."""
    calls = [call for call in taps.calls if call.layer is site]
    silent = [index for index, call in enumerate(calls) if call.pull == 0]
    matter = [index for index in silent if _matters(site, index, run, inputs)]
    # Of the calls that were reached, a checkpoint made so many again.
    again = taps.arrived[site] - (len(calls) - len(silent))
    return calls[matter[-1]] if len(matter) > again else None


def _matters(site: Site, index: int, run: Run, inputs: torch.Tensor) -> bool:
    """Whether the model's outputs change with what one call of the layer returns, by more than from run to run."""
    plain, again = (_changed(site, index, run, inputs, 0.0) for _ in range(2))
    noise = _largest(plain - again)
    # Two runs may agree by chance where a device adds in any order. One step of half precision is far more than this.
    tolerance = 8 * noise + 4 * min(model_access.rounding(plain), _SINGLE) * _largest(plain)
    changes = (_changed(site, index, run, inputs, sign).double() - plain.double() for sign in (1.0, -1.0))
    return any(not bool((change.abs() <= tolerance).all()) for change in changes)  # NaN is a change.


def _largest(t: torch.Tensor) -> float:
    return float(t.double().abs().max()) if t.numel() else 0.0


def _changed(site: Site, index: int, run: Run, inputs: torch.Tensor, sign: float) -> torch.Tensor:
    """The model's outputs where one call of the layer returns something else: more or less by 1 to 5 times its size."""
    count = 0

    def step(_: Site, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nonlocal count
        out = site.compute(input, weight, bias)
        if count == index and sign != 0:
            change = out.detach().abs().max().add(1) * model_access.pattern(out.detach()).abs().mul(4).add(1)
            out = out + sign * change
        count += 1
        return out

    with replaced(forwards([site], step)):
        try:
            with torch.no_grad():
                return run(inputs).detach()
        except RuntimeError:  # The model may differentiate in its forward.
            count = 0
            with torch.enable_grad():
                return run(inputs).detach()
