"""What is differentiated: all outputs of a model, some of them, or a function of them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from fastagop.network import model_access
from fastagop.network.gradient_hooks import Run
from fastagop.network.labels import as_labels

Outputs: TypeAlias = "int | slice | Iterable[int] | Callable[..., Any] | None"


class Target:
    """The model's outputs as (m, K), or what ``outputs`` makes of them."""

    def __init__(self, model: nn.Module, outputs: Outputs, name: str = "outputs"):
        self._name, self._model, self._head, self._columns = name, model, None, None
        if callable(outputs):
            self._head, self._labelled = outputs, _arguments(outputs) == 2
        elif outputs is not None:
            self._columns = outputs if isinstance(outputs, slice) else _indices(outputs)

    def runs(self, labels: Any) -> Callable[..., Run]:
        """runs(index) is the function of these samples of a batch, runs() of the whole batch."""

        def bind(index: list[int] | None = None, finite: bool = True) -> Run:
            return lambda inputs: self._of(inputs, labels, index, finite)

        return bind

    def _of(self, inputs: torch.Tensor, labels: Any, index: list[int] | None, finite: bool) -> torch.Tensor:
        if self._head is None:
            out = model_access.outputs(self._model, inputs, finite)
            return out if self._columns is None else _take(out, self._columns)
        raw = model_access.called(self._model, inputs)
        if not self._labelled:
            return model_access.rows(self._name, self._head(raw), len(inputs), finite)
        if labels is None:
            raise ValueError(
                f"{self._name} takes labels as its second argument, but the batches of X bring none; give X as batches "
                "of (inputs, labels)"
            )
        labels = as_labels(labels)
        labels = (labels if index is None else labels[index]).to(inputs.device)
        return model_access.rows(self._name, self._head(raw, labels), len(inputs), finite)


def _arguments(function: Callable) -> int:
    """How many arguments a function has to be given; one where it cannot be asked."""
    if isinstance(function, nn.Module):  # A loss such as nn.CrossEntropyLoss; a call takes any arguments.
        function = function.forward
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def _indices(outputs) -> list[int]:
    wrong = "outputs must be None, a function of the model's output, or indices of outputs"
    if isinstance(outputs, (torch.Tensor, np.ndarray)):
        if outputs.ndim > 1 or outputs.dtype in (torch.bool, np.dtype(bool)):
            raise TypeError(f"{wrong}, got an array of shape {tuple(outputs.shape)} and {outputs.dtype}")
        outputs = outputs.tolist()
    try:
        found = [*map(_index, outputs)] if isinstance(outputs, Iterable) else [_index(outputs)]
    except TypeError:
        raise TypeError(f"{wrong}, got {outputs!r}") from None
    if not found or isinstance(outputs, (str, bytes)):
        raise ValueError(f"{wrong}, at least one, got {outputs!r}")
    return found


def _index(value) -> int:
    """A number that counts; a truth value does not, since a mask would pass for the outputs 0 and 1."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool)):
        raise TypeError("a mask")
    return operator.index(value)


def _take(out: torch.Tensor, columns: list[int] | slice) -> torch.Tensor:
    K = out.shape[1]
    chosen = list(range(K)[columns]) if isinstance(columns, slice) else columns
    outside = [c for c in chosen if not -K <= c < K]
    chosen = [c % K for c in chosen] if not outside else chosen
    if outside or not chosen or len(set(chosen)) < len(chosen):
        what = f"{outside[0]} is not" if outside else ("one is given twice" if chosen else "none is chosen")
        raise ValueError(f"outputs must be different indices of the model's {K} outputs: {what}, got {columns!r}")
    return out[:, chosen]
