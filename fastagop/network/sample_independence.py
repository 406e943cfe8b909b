"""Refuse models whose samples interact: one sample's gradient would depend on the batch it is measured in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fastagop.network import model_access
from fastagop.network.choosing import Chosen
from fastagop.network.gradient_hooks import ManyGradientsError, Run, tapped
from fastagop.network.lending import Here, transformed

_ALONE = "or pass batch_size=1, which takes each sample by itself"
# Both batches have one shape, so that most models give equal numbers. Where the others change the order of sums, as
# samples do that share an expert, mixing still shows far above the rounding of float32 and float64; of half precision a
# few steps are allowed.
_FULL, _HALF = 1e3, 4.0


def refuse_mixing(
    model: nn.Module, chosen: Chosen, inputs: torch.Tensor, runs: Callable[..., Run], name: str = "outputs"
) -> bool:
    """Try the model on two samples of a batch: outputs must keep to their sample, and so must gradients.

    ``runs(index)`` maps these samples of the batch to the outputs that are differentiated, ``name`` is the argument
    that makes them of what the model returns. Layers that nobody asked for by name, other than Linear ones, are left
    out where samples meet in them.

    Returns:
        Whether checkpoints may have to compute again (``Taps.recomputing``).

    Raises:
        ValueError: naming the module or layer where samples meet.
    """
    refuse_neighbours(model, inputs, runs, name)
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


def refuse_neighbours(model: nn.Module, inputs: torch.Tensor, runs: Callable[..., Run], name: str = "outputs") -> None:
    """What is measured of the first sample may not change with another sample; says in which module it does."""
    traces = (_trace(model, runs(index, finite=False), inputs[index]) for index in (_pair(inputs), [0, 0]))
    (ones, out), (twos, alike) = traces
    if not _differ([out[0]], [alike[0]]):
        return
    calls = list(zip(ones, twos, strict=False))
    mixers = (a[0] for a, b in calls if a[1] and not _differ(a[1], b[1]) and _differ(a[2], b[2]))
    mixer = next(mixers, "")
    kind = type(model.get_submodule(mixer)).__name__
    if hint := model_access.sequence_first(model, mixer):
        raise ValueError(f"model: the samples of a batch are mixed: {hint}")
    returned, alike = calls[-1][0][2], calls[-1][1][2]
    if returned and not _differ(returned, alike):
        raise ValueError(
            f"{name}: the function mixes the samples of a batch, or is random: what it returns for one sample changes "
            f"with the others, while what the model returns does not. Let it take each sample by itself, {_ALONE}"
        )
    raise ValueError(
        f"model: {f'module {mixer!r} ({kind})' if mixer else kind} mixes the samples of a batch, or is random: what it "
        "returns for one sample changes with the others. Take it out (batch normalisation needs running statistics), "
        + _ALONE
    )


Call = tuple[str, list[torch.Tensor], list[torch.Tensor]]


def _trace(model: nn.Module, run: Run, pair: torch.Tensor) -> tuple[list[Call], torch.Tensor]:
    """Every module call as it ends, the model's own last: its name and the first sample's inputs and outputs.

    Beside them what is differentiated, (2, K).
    """
    calls: list[Call] = []
    here = Here()

    def note(name: str, _, args, out) -> None:
        if here and not transformed():
            calls.append((name, _first(args), _first(out)))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        with torch.enable_grad():  # Some checkpoints warn where no input requires gradients.
            out = run(pair.requires_grad_() if pair.is_floating_point() else pair)
    finally:
        for handle in handles:
            handle.remove()
    return calls, out.detach()


def _first(value: Any) -> list[torch.Tensor]:
    return [t[0].detach().clone() for t in _tensors(value) if t.ndim > 0 and len(t) == 2]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what modules take and return: sequences, mappings and dataclasses of them, at any depth."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    for part in value if isinstance(value, (tuple, list)) else ():
        yield from _tensors(part)


def _differ(ones: list[torch.Tensor], twos: list[torch.Tensor]) -> bool:
    """Whether tensors differ by more than rounding; NaN differs from nothing, the outputs' check has it."""
    return any(bool(((a.double() - b.double()).abs() > _rounding(a)).any()) for a, b in zip(ones, twos, strict=False))


def _rounding(t: torch.Tensor) -> float:
    """How far rounding may move the numbers of a tensor."""
    eps = model_access.rounding(t)
    return (_HALF if eps > 1e-4 else _FULL) * eps * float(t.double().abs().max()) if t.numel() else 0.0
