"""Refuse models whose samples interact: one sample's gradient would depend on the batch it is measured in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastagop.network import model_access
from fastagop.network.choosing import Chosen
from fastagop.network.gradient_hooks import ManyGradientsError, Run, tapped
from fastagop.network.lending import Here

_ALONE = "or pass batch_size=1, which takes each sample by itself"


def refuse_mixing(model: nn.Module, chosen: Chosen, inputs: torch.Tensor, runs: Callable[[list[int]], Run]) -> bool:
    """Try the model on two samples of a batch: outputs must keep to their sample, and so must gradients.

    ``runs(index)`` maps these samples of the batch to the outputs that are differentiated. Layers that nobody asked
    for by name, other than Linear ones, are left out where samples meet in them.

    Returns:
        Whether checkpoints may have to compute again (``Taps.recomputing``).

    Raises:
        ValueError: naming the module or layer where samples meet.
    """
    if len(inputs) == 1:
        return False
    refuse_neighbours(model, inputs)
    index = _pair(inputs)
    while True:
        try:
            return _refuse_backward(chosen, inputs[index], runs(index))
        except ManyGradientsError as error:
            if not chosen.may_skip(error.layer):
                raise
            chosen.skip(error.layer, "a backward pass goes more than once through a call of it")


def _pair(inputs: torch.Tensor) -> list[int]:
    """The first sample and the next one that differs from it."""
    unlike = (inputs != inputs[0]).reshape(len(inputs), -1).any(1)
    return [0, int(unlike.int().argmax()) or 1]


class _Reached:
    """Which rows of a layer's output each backward pass reached."""

    def __init__(self):
        self.rows: list[torch.Tensor] = []

    def taken(self, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return weight.detach(), False

    def add(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        self.rows.append((rows != 0).any(1))


def _refuse_backward(chosen: Chosen, pair: torch.Tensor, run: Run) -> bool:
    """A row of gradients belongs to one sample: no row may see a cotangent on the first and one on the second."""
    seen = {site: _Reached() for site in chosen.sites.values()}
    with tapped(seen) as taps:
        out = taps.run(run, pair, asking=True)  # Two samples take little memory.
        for row in (0, 1) if out.requires_grad else ():
            cotangent = torch.zeros_like(out)
            cotangent[row] = torch.linspace(1, 2, out.shape[1], dtype=out.dtype, device=out.device)
            taps.pull_back(out, cotangent, keep=row == 0)
    for name, site in list(chosen.sites.items()):
        rows = seen[site].rows
        calls = len(rows) // 2
        if not any(bool((a & b).any()) for a, b in zip(rows[:calls], rows[calls:], strict=True)):
            continue
        if chosen.may_skip(name):
            chosen.skip(name, "its inputs are shared by the samples of a batch, so that their gradients mix")
        else:
            raise ValueError(
                f"layers: gradients at {name!r} mix the samples of a batch: its inputs are shared by them, or a later "
                f"module brings them together. Leave the layer out, {_ALONE}"
            )
    return taps.recomputing


def refuse_neighbours(model: nn.Module, inputs: torch.Tensor) -> None:
    """The first sample's outputs may not change with another sample; says in which module they do."""
    if len(inputs) < 2:
        return
    calls = list(zip(_trace(model, inputs[_pair(inputs)]), _trace(model, inputs[[0, 0]]), strict=False))
    (_, _, out), (_, _, alike) = calls[-1]
    if not _differ(out, alike):
        return
    mixers = (a[0] for a, b in calls if a[1] and not _differ(a[1], b[1]) and _differ(a[2], b[2]))
    name = next(mixers, "")
    kind = type(model.get_submodule(name)).__name__
    if hint := model_access.sequence_first(model, name):
        raise ValueError(f"model: the samples of a batch are mixed: {hint}")
    raise ValueError(
        f"model: {f'module {name!r} ({kind})' if name else kind} mixes the samples of a batch, or is random: what it "
        "returns for one sample changes with the others. Take it out (batch normalisation needs running statistics), "
        + _ALONE
    )


Call = tuple[str, list[torch.Tensor], list[torch.Tensor]]


def _trace(model: nn.Module, pair: torch.Tensor) -> list[Call]:
    """Every module call as it ends, the model's own last: its name and the first sample's inputs and outputs."""
    calls: list[Call] = []
    here = Here()

    def note(name: str, _, args, out) -> None:
        if here:
            calls.append((name, _first(args), _first(out)))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        with torch.enable_grad():  # Some checkpoints warn where no input requires gradients.
            model_access.called(model, pair.requires_grad_().clone() if pair.is_floating_point() else pair)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first(value) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [t[0].detach().clone() for t in values if isinstance(t, torch.Tensor) and t.ndim > 0 and len(t) == 2]


def _differ(ones: list[torch.Tensor], twos: list[torch.Tensor]) -> bool:
    """Whether tensors differ by more than rounding; NaN differs from nothing, the outputs' check has it."""
    return any(
        bool(((a.double() - b.double()).abs() > 1e3 * _rounding(a)).any()) for a, b in zip(ones, twos, strict=False)
    )


def _rounding(t: torch.Tensor) -> float:
    eps = torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0
    return eps * float(t.double().abs().max()) if t.numel() else 0.0
