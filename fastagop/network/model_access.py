"""A user's torch model as the measures need it: its batches and outputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastagop.kernels import checks

Source = torch.Tensor | Iterable[Any]
Layers = str | Iterable[str] | None

# What torch says where the shapes of a layer and of its input do not go together.
_MISFIT = re.compile(
    "shapes cannot be multiplied|must match the size|to have .* channels|Given normalized_shape|"
    "expected .*input.* (to|got)|shape .* is invalid for input|running_mean should contain",
    re.IGNORECASE,
)
BATCH = 256  # This many samples are taken at a time where the caller names no other number.


class MisfitError(ValueError, RuntimeError):
    """The model refuses the shape of a batch of X."""


def batches(X, batch_size: int | None, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(inputs on the model's device, labels or None) from a tensor or from an iterable of batches."""
    _check_source(X, batch_size)
    held = next((t for group in (model.parameters(), model.buffers()) for t in group if not t.is_meta), None)
    count = 0
    for batch in X.split(BATCH if batch_size is None else int(batch_size)) if isinstance(X, torch.Tensor) else X:
        inputs, labels = _parts(batch)
        count += len(inputs)
        if len(inputs) == 0:
            continue
        check_numbers(inputs)
        inputs = inputs.detach().to(inputs.device if held is None else held.device)
        yield inputs.clone() if inputs.is_inference() else inputs, labels
    if count == 0:
        raise ValueError("X must have at least one sample, got none")


def _check_source(X, batch_size) -> None:
    if isinstance(X, torch.Tensor):
        check_numbers(X)
        if X.ndim == 0:
            raise ValueError("X must have samples along its first dimension, got a scalar")
    elif not isinstance(X, Iterable) or isinstance(X, (str, bytes, Mapping)) or hasattr(X, "__array__"):
        remedy = "; use torch.as_tensor(X)" if hasattr(X, "__array__") else ""
        raise TypeError(f"X must be a torch.Tensor or an iterable of batches, got {type(X).__name__}{remedy}")
    elif isinstance(X, tuple) and X and all(isinstance(part, torch.Tensor) for part in X):
        raise TypeError(
            "X must be a tensor or an iterable of batches, got a tuple of tensors: [(inputs, labels)] is one batch "
            "with its labels, [X1, X2] are two batches"
        )
    elif batch_size is not None:
        raise ValueError("batch_size must be None for an iterable X, which brings batches of its own")
    if batch_size is not None:
        checks.integer("batch_size", batch_size, 1)


def check_numbers(X: torch.Tensor) -> None:
    """Refuse tensors without numbers, and those whose samples cannot be taken apart."""
    if X.is_meta:
        raise TypeError("X must hold numbers, got a tensor on meta; pass one that does")
    if not dense(X):
        kind = "a nested tensor" if X.is_nested else f"layout {X.layout}"
        raise TypeError(
            f"X must be dense, got {kind}; pass X.to_dense(), or a padded tensor, and let the model convert it"
        )


def dense(t: torch.Tensor) -> bool:
    """Whether a tensor's items lie in memory as its shape says."""
    return t.layout == torch.strided and not t.is_nested


def _parts(batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs and labels of a batch: a tensor, (inputs,) or (inputs, labels, ...)."""
    pair = tuple(batch[:2]) if isinstance(batch, (tuple, list)) else (batch,)
    if not pair or not isinstance(pair[0], torch.Tensor) or pair[0].ndim == 0:
        got = type(pair[0]).__name__ if pair else "an empty tuple"
        raise TypeError(
            f"X must give batches of tensors or of (inputs, labels), got {got}; a model of several inputs is measured "
            "inside a module that makes them of one tensor"
        )
    return pair[0], pair[1] if len(pair) == 2 else None


def outputs(model: Callable, inputs: torch.Tensor, finite: bool = True) -> torch.Tensor:
    """f of a batch as (m, K), whatever the shape of one sample's outputs; refused where not ``finite``."""
    out = called(model, inputs)
    apart = isinstance(out, torch.Tensor) and dense(out) and out.shape[:1] != inputs.shape[:1]
    if apart and (hint := sequence_first(model)):
        raise ValueError(f"model returns shape {tuple(out.shape)} for {len(inputs)} samples: {hint}")
    return rows("model", out, len(inputs), finite)


def called(model: Callable, inputs: torch.Tensor) -> Any:
    """What a model returns; where it fails and X has another dtype than its parameters, the error says so.

    The model gets a copy: it may work in place, and a batch is a view of the caller's data that it sees more than once.
    """
    try:
        return model(inputs.clone())
    except TypeError as error:
        if _takes_one(model):
            raise
        raise TypeError(
            "model must take one tensor, a batch of X; one of several inputs is measured inside a module that makes "
            f"them of one tensor ({error})"
        ) from error
    except RuntimeError as error:
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        held = next((p.dtype for p in parameters if p.is_floating_point()), inputs.dtype)
        if inputs.dtype == held or not (inputs.is_floating_point() or _wants_numbers(model, error)):
            if _MISFIT.search(str(error)) is None:
                raise
            shape = tuple(inputs.shape[1:])
            raise MisfitError(
                "X must have samples of a shape that the model takes, in batches of any size; it fails on "
                f"{len(inputs)} samples of shape {shape} ({error})"
            ) from error
        text = (
            f"X must have the dtype of the model's parameters, {held}, got {inputs.dtype}; use X.to({held}) ({error})"
        )
        raise TypeError(text) from error


def _takes_one(model: Callable) -> bool:
    """Whether a model can be called with one tensor, or cannot be asked."""
    try:
        inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind(None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _wants_numbers(model: Callable, error: RuntimeError) -> bool:
    """Whether a model failed because its input is of integers, say; some models take such inputs."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    takes_any = isinstance(model, nn.Module) and any(isinstance(module, tables) for module in model.modules())
    return not takes_any and "type" in str(error)


def sequence_first(model: Callable, within: str = "") -> str:
    """What to do about modules of a model, or of one of its modules, that take the batch second; "" where none does."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        related = f"{name}.".startswith(f"{within}.") or f"{within}.".startswith(f"{name}.") or not within
        if related and getattr(module, "batch_first", True) is False:
            return f"{name!r} ({type(module).__name__}) takes (sequence, batch, d); build it with batch_first=True"
    return ""


def rows(name: str, out, n: int, finite: bool = True) -> torch.Tensor:
    """What ``name`` returned for n samples as (n, K)."""
    if not isinstance(out, torch.Tensor) or not (out.is_floating_point() and dense(out)):
        kind = type(out).__name__
        if isinstance(out, torch.Tensor):
            what = "" if dense(out) else f", {'nested' if out.is_nested else f'layout {out.layout}'}"
            kind = f"a tensor of {out.dtype}{what}"
        within = "outputs=lambda out: ... of agop takes a tensor out of it, as does a module around the model"
        hint = within if name == "model" else "one row for each sample"
        raise TypeError(f"{name} must return one floating tensor, got {kind}; {hint}")
    if out.ndim == 0 or len(out) != n:
        shape = tuple(out.shape)
        hint = "" if name == "model" else "; take losses with reduction='none'"
        raise ValueError(f"{name} must return a row for each sample of X, got shape {shape} for {n} samples{hint}")
    if finite and not checks.finite(out.detach()):
        raise ValueError(f"{name} returns NaN or infinity for X; check its weights and X's scale")
    return out.reshape(n, -1)


def pattern(like: torch.Tensor) -> torch.Tensor:
    """Numbers in [-1, 1] without regularity, the same at every call; no random numbers are drawn."""
    return torch.sin(torch.arange(1, like.numel() + 1, device=like.device).double() ** 1.5).view(like.shape).to(like)


def rounding(t: torch.Tensor) -> float:
    """Relative rounding error of a tensor's dtype."""
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0
