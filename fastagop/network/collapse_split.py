"""Collapse inside a network's layers: before a weight matrix, after its right singular part, after the nonlinearity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastagop import collapse
from fastagop.kernels import checks
from fastagop.kernels.errors import warn
from fastagop.kernels.precision import matmul_precision
from fastagop.network import model_access
from fastagop.network.choosing import Chosen
from fastagop.network.labels import Labels
from fastagop.network.lending import lent, refuse_transforms, replaced
from fastagop.network.model_access import Layers, Source
from fastagop.network.readout import bare
from fastagop.network.results import ByLayer
from fastagop.network.sample_independence import refuse_neighbours
from fastagop.network.sites import Site, forwards, own_forward
from fastagop.network.targets import Target

Activation = Callable[[torch.Tensor], torch.Tensor]
_SAMPLES = 8  # rows that show whether the activation is the model's
_ALIKE = 0.02  # of the largest number; a few roundings of bfloat16
_SHOWN = 3  # layers that a warning names


class NotAMatrixError(ValueError):
    """What enters a layer is no single matrix (n, d): tokens, or the inputs of several calls."""


@dataclass(frozen=True)
class Split:
    """What the parts of a Linear layer W = U S V^T do to collapse (paper, section 5 and figure 2).

    Attributes:
        nc1, nc2: collapse measures of "input" (the features x that enter), "projected" (S V^T x) and "features"
            (after U, the bias and the nonlinearity); infinite where all class means coincide.
    """

    nc1: Mapping[str, float]
    nc2: Mapping[str, float]


@torch.no_grad()
def split(layer: nn.Linear, X: torch.Tensor, y, activation: Activation | None = torch.relu) -> Split:
    """NC1 and NC2 before a Linear layer, after S V^T, and after U and the nonlinearity.

    U preserves distances, so W x has the NC1 and NC2 of S V^T x and no decomposition is needed.

    Args:
        layer: a torch.nn.Linear with torch's own forward. Its weight is that with which the forward runs in evaluation
            mode, after the layer's pre-hooks (weight normalisation, pruning).
        X: features that enter it (n, d).
        y: integer labels (n,).
        activation: the nonlinearity after the layer; None where there is none, as after a readout.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"layer must be a torch.nn.Linear, got {type(layer).__name__}")
    if own_forward(layer):
        raise TypeError(
            f"layer must be a plain torch.nn.Linear, got a {type(layer).__name__} with a forward of its own, which "
            "need not multiply by its weight; give a torch.nn.Linear of the weight that it multiplies by"
        )
    _check_activation(activation)
    if isinstance(X, torch.Tensor) and X.dtype in (torch.float16, torch.bfloat16):
        X = X.float()
    checks.matrix("X", X, columns=(layer.in_features, "layer"))
    with lent(layer), torch.no_grad():
        return _of_parts(X, *_weights(layer, X), y, activation)


def _weights(layer: nn.Linear, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias with which the forward runs: pre-hooks may make them, so it is run on a sample."""
    found = []

    def forward(input: torch.Tensor) -> torch.Tensor:
        found.append((layer.weight, layer.bias))
        return nn.functional.linear(input, *found[-1])

    held = next((t for group in (layer.parameters(), layer.buffers()) for t in group), X)
    with replaced({layer: forward}):
        layer(X[:1].to(held.device, held.dtype, copy=True))  # A pre-hook may work in place.
    return found[-1]


def _check_activation(activation: Activation | None) -> None:
    """Refuse what is no nonlinearity."""
    if activation is not None and not callable(activation):
        raise TypeError(f"activation must be a function of tensors such as torch.relu, or None, got {activation!r}")


def _of_parts(X: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, y, activation: Activation | None) -> Split:
    """The Split of features X (n, d) at a layer, computed in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(X.dtype, W.dtype), torch.float32)
    X = X.to(dtype)
    with matmul_precision("highest", X.device):
        projected = nn.functional.linear(X, W.to(dtype))
        out = projected if bias is None else projected + bias.to(dtype)
        features = out if activation is None else activation(out.clone())  # The activation may work in place.
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(X):
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"activation must return a row for each of the {len(X)} rows that it is given, got {shape}")
    return Split(*collapse.of_stages({"input": X, "projected": projected, "features": features}, y))


@torch.no_grad()
def collapse_split(
    model: nn.Module,
    X: Source,
    y: torch.Tensor | np.ndarray | None = None,
    layers: Layers = None,
    *,
    activation: Activation | None = torch.relu,
    batch_size: int | None = None,
) -> ByLayer[Split]:
    """``split`` of each Linear layer of a model, on the features that its samples have there.

    Args:
        model, X, layers, batch_size: as in ``agop``. The inputs of all chosen layers, (n, d) each, are held at once.
        y: integer labels (n,); default those that come with the batches of X. Where these bring labels, too, y has to
            name the same classes; what they bring may be floats, one-hot rows or no labels at all.
        activation: the nonlinearity after every layer but those that none follows: what the model returns is the
            layer's output, seen another way or shifted and scaled.

    Returns:
        Split by layer name, in the model's order; ``skipped`` says by name which layers are left out and why. Warns of
        them, unless ``layers`` is given, and, where none is left out, of layers whose "features" do not enter the next
        one: the activation is not read from the model.

    Raises:
        TypeError, ValueError: naming the argument, as in ``agop``. NotAMatrixError, a ValueError: a layer's input is
            no matrix, or the layer is called more than once, or hooks change its weight from batch to batch.
    """
    _check_activation(activation)
    with lent(model), torch.no_grad():
        chosen = Chosen(model, layers, ("linear",), whole=True)
        gathered = _Inputs(chosen.sites)
        labels = Labels(y)
        gathered.run(model, X, batch_size, labels, find_bare=activation is not None)
        y = labels.settle()
        chosen.finish({site for name, site in chosen.sites.items() if name in gathered.rows})
        chosen.say()
        others = ""
        if activation is not None and layers is None and not chosen.skipped:
            others = gathered.not_followed_by(model, activation)
        if others:
            warn(
                f"collapse_split: {others}: another nonlinearity, a normalisation or a sum comes between, which "
                "'features' leave out; pass the model's own activation, as in activation=torch.tanh, for the layers "
                "that it follows",
                UserWarning,
            )
        found = {
            name: _of_parts(
                torch.cat(gathered.rows[name]), *gathered.weights[name], y, gathered.after(name, activation)
            )
            for name in chosen.sites
        }
        return ByLayer(found, chosen.skipped)


class _Inputs:
    """What enters each layer, batch by batch, its weight and bias, and the names of the layers without nonlinearity."""

    def __init__(self, linear: Mapping[str, Site]):
        self.linear, self.bare = dict(linear), set()
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.weights: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._called: set[str] = set()
        self._some = torch.empty(0, device="cpu")  # the first samples

    def run(self, model: nn.Module, X: Source, batch_size: int | None, labels: Labels, find_bare: bool) -> None:
        """Send all samples through the model, and take the batches' labels."""
        tried = False
        for i, (inputs, brought) in enumerate(model_access.batches(X, batch_size, model)):
            if not tried and len(inputs) > 1:  # One sample alone shows nothing.
                refuse_neighbours(model, inputs, Target(model, None).runs(None))
                tried = True
            self._called.clear()
            self._some = inputs[:_SAMPLES] if i == 0 else self._some
            with replaced(forwards(self.linear.values(), self._note)):
                model_access.outputs(model, inputs)
            if i == 0 and find_bare:
                self.bare = bare(model, {name: self.linear[name] for name in self._called}, inputs)
            labels.add(brought, len(inputs))

    def after(self, name: str, activation: Activation | None) -> Activation | None:
        """The activation, where one follows the layer."""
        return None if name in self.bare else activation

    def not_followed_by(self, model: nn.Module, activation: Activation) -> str:
        """Which layers are followed by something else than the activation before the next layer, in words.

        A layer is next if what enters it depends on what the one before returns. All Linear layers are recorded, or
        others may lie between them.
        """
        found = []
        for name, after in itertools.pairwise(self.weights):  # in the order of their calls
            x, seen = (self.rows[of][0][:_SAMPLES] for of in (name, after))
            W, bias = (None if part is None else part.float() for part in self.weights[name])
            if name in self.bare or W is None or seen.shape != (len(x), len(W)) or seen.device != W.device:
                continue  # the next layer sees something else anyway
            with matmul_precision("highest", W.device):
                h = nn.functional.linear(x.float(), W, bias)
            made = activation(h.clone())
            size = max(float(part.abs().max()) for part in (h, seen)) if len(x) else 0.0
            same = isinstance(made, torch.Tensor) and made.shape == seen.shape
            unlike = same and not float((made - seen.float()).abs().max()) <= _ALIKE * size
            if unlike and self._feeds(model, name, after, h.to(seen.dtype), seen):
                found.append(f"what enters {after!r} is not the activation of what {name!r} returns")
        return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if found[_SHOWN:] else "")

    def _feeds(self, model: nn.Module, name: str, after: str, h: torch.Tensor, seen: torch.Tensor) -> bool:
        """Whether what enters a layer changes with what another one returns."""
        entered: list[torch.Tensor] = []

        def note(site: Site, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            entered.append(input.clone())
            return site.compute(input, weight, bias)

        other = {self.linear[name].module: lambda input: torch.zeros_like(h)}
        with replaced({**forwards([self.linear[after]], note), **other}):
            model_access.outputs(model, self._some, finite=False)
        return len(entered) == 1 and not torch.equal(entered[0], seen)

    def _note(self, site: Site, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        name = site.name
        if name in self._called:
            raise NotAMatrixError(f"layers: {name!r} is called more than once, so it has no one input; leave it out")
        refuse_transforms(name, NotAMatrixError)
        if input.ndim != 2:
            shape = tuple(input.shape)
            raise NotAMatrixError(f"layers: the input of {name!r} must be a matrix (n, d), got {shape}; leave it out")
        self._called.add(name)
        weights = weight, bias
        if name not in self.weights:
            self.weights[name] = (weight.clone(), None if bias is None else bias.clone())
        elif not all(_equal(now, then) for now, then in zip(weights, self.weights[name], strict=True)):
            raise NotAMatrixError(f"layers: the weight of {name!r} changes from batch to batch; leave it out")
        self.rows.setdefault(name, []).append(input.clone())  # The model may go on to change it in place.
        return site.compute(input, weight, bias)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
