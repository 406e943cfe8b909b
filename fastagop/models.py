"""A user's torch model as the measures need it: its Linear layers, its batches and outputs, lent and given back."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import nn

from fastagop.kernels import _checks

Source = torch.Tensor | Iterable
Layers = str | Iterable[str] | None

BATCH = 256  # samples at a time, unless the caller knows better


def linear_layers(model: nn.Module, patterns: Layers) -> dict[str, nn.Linear]:
    """The model's Linear layers by name, in its order; or those that match a pattern such as "classifier.*"."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    every = dict(model.named_modules(remove_duplicate=patterns is None))
    linear = {name: module for name, module in every.items() if isinstance(module, nn.Linear)}
    if not linear:
        raise ValueError(f"model must have a torch.nn.Linear layer to measure, this {type(model).__name__} has none")
    if patterns is not None:
        linear = _matching(linear, [patterns] if isinstance(patterns, str) else list(patterns))
    for name, layer in linear.items():
        if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
            others = listed(other for other in linear if other != name)
            raise TypeError(
                f"layers: {name!r} is a {type(layer).__name__} with a forward of its own, not a plain torch.nn.Linear; "
                f"leave it out, layers=[{others}]"
            )
    return linear


def _matching(linear: dict[str, nn.Linear], patterns: list[str]) -> dict[str, nn.Linear]:
    if not patterns:
        raise ValueError(f"layers must be None for all or name at least one, there are {listed(linear)}")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"layers: no Linear layer is called {pattern!r}, there are {listed(linear)}")
    return {name: layer for name, layer in linear.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def refuse_uncalled(linear: Iterable[str], ran: Container[str], layers: Layers) -> None:
    """Refuse layers that were asked for and did not run, and a model that runs none."""
    silent = [name for name in linear if name not in ran]
    if silent and (layers is not None or len(silent) == len(list(linear))):
        raise ValueError(
            f"layers: the model's forward does not call {listed(silent)}, so there is no input to measure; "
            "leave it out of layers"
        )


def listed(names: Iterable[str]) -> str:
    """Names in an error message."""
    return ", ".join(map(repr, names))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its parameters frozen, gradients on; afterwards it is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.backends.mha.get_fastpath_enabled()  # the fused transformer layer does not call its Linear layers
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), _uncompiled():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fused)


def _uncompiled() -> contextlib.AbstractContextManager:
    """Compiled models run as written: compiled code calls neither hooks nor replaced functions."""
    compiling = "torch._dynamo" in sys.modules  # it is slow to import, and nothing is compiled without it
    return torch.compiler.set_stance("force_eager") if compiling else contextlib.nullcontext()


def batches(X, batch_size: int | None, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(inputs on the model's device, labels or None) from a tensor or from an iterable of batches."""
    _check_source(X, batch_size)
    held = next((t for group in (model.parameters(), model.buffers()) for t in group), None)
    count = 0
    for batch in X.split(batch_size or BATCH) if isinstance(X, torch.Tensor) else X:
        inputs, labels = _parts(batch)
        count += len(inputs)
        if len(inputs) == 0:
            continue
        inputs = inputs.detach().to(inputs.device if held is None else held.device)
        yield inputs.clone() if inputs.is_inference() else inputs, labels
    if count == 0:
        raise ValueError("X must have at least one sample, got none")


def _check_source(X, batch_size) -> None:
    if isinstance(X, torch.Tensor):
        if X.ndim == 0:
            raise ValueError("X must have samples along its first dimension, got a scalar")
    elif not isinstance(X, Iterable) or isinstance(X, (str, bytes, Mapping)) or hasattr(X, "__array__"):
        raise TypeError(f"X must be a torch.Tensor or an iterable of batches, got {type(X).__name__}")
    elif batch_size is not None:
        raise ValueError("batch_size must be None for an iterable X, which brings batches of its own")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be an integer >= 1 or None, got {batch_size!r}")


def _parts(batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs and labels of a batch: a tensor, (inputs,) or (inputs, labels, ...)."""
    pair = tuple(batch[:2]) if isinstance(batch, (tuple, list)) else (batch,)
    if not pair or not isinstance(pair[0], torch.Tensor) or pair[0].ndim == 0:
        got = type(pair[0]).__name__ if pair else "an empty tuple"
        raise TypeError(f"X must give batches of tensors or of (inputs, labels), got {got}")
    return pair[0], pair[1] if len(pair) == 2 else None


def outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """f of a batch as (m, K), whatever the shape of one sample's outputs."""
    out = model(inputs)
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        what = f"a tensor of {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise TypeError(f"model must return one floating tensor, got {what}; wrap it in a module that does")
    if out.ndim == 0 or len(out) != len(inputs):
        shape = tuple(out.shape)
        raise ValueError(f"model must return a row for each sample of X, got shape {shape} for {len(inputs)} samples")
    if not _checks.finite(out.detach()):
        raise ValueError("model returns NaN or infinity for X; check its weights and X's scale")
    return out.reshape(len(out), -1)
