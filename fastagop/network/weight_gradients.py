"""The FACT matrix: what W^T W of a layer is where training with weight decay has come to rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from fastagop.kernels import checks
from fastagop.network import model_access
from fastagop.network.choosing import Chosen
from fastagop.network.correlation import in_unit, pearson
from fastagop.network.gradient_hooks import Taps
from fastagop.network.labels import as_labels
from fastagop.network.lending import lent
from fastagop.network.model_access import Layers, Source
from fastagop.network.sites import MATRICES, Site
from fastagop.network.sweep import Request, walk

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class WeightGradient:
    """Sum over samples of the gradient of their losses with respect to a weight W (d_out, d_in), in float64."""

    weight: torch.Tensor | None = None
    total: torch.Tensor | None = field(default=None, repr=False)

    def taken(self, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Gradients are not summed, at neither side."""
        return weight.detach(), False

    def add(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        """Nothing: the gradient of the weight is all that is wanted."""

    def note(self, name: str, W: torch.Tensor, grad: torch.Tensor | None) -> None:
        """Add the gradient that a backward pass found for a call with this weight."""
        W = W.detach()
        if self.weight is None:
            self.weight, self.total = W.clone(), torch.zeros_like(W, dtype=torch.float64)
        elif not torch.equal(W, self.weight):
            raise ValueError(
                f"layers: the weight of {name!r} changes from call to call, so W is no one matrix; leave it out"
            )
        if grad is not None:
            assert self.total is not None
            self.total.add_(grad)

    def fact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W and the sum of gradients, both in float64."""
        assert self.weight is not None and self.total is not None  # noqa: PT018
        return self.weight.double(), self.total


def weight_gradients(
    model: nn.Module, X: Source, y, layers: Layers, loss: Loss, batch_size: int | None
) -> tuple[dict[str, WeightGradient], int, Chosen]:
    """The sums by layer name, the number of samples, and which layers these are."""
    if not callable(loss):
        raise TypeError(f"loss must map outputs and labels to one loss a sample, (n,), got {type(loss).__name__}")

    def losses(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = loss(out, labels)
        if isinstance(found, torch.Tensor) and found.ndim > 1:
            raise ValueError(f"loss must return one loss a sample, (n,), got shape {tuple(found.shape)}; sum the rest")
        return found

    if y is None and isinstance(X, torch.Tensor):
        raise ValueError("y must be given where X is a tensor, which brings no labels")
    source = X if y is None else _labelled(X, y, batch_size)
    request = Request(model, source, layers, batch_size if y is None else None, losses, name="loss")
    with lent(model):
        chosen = Chosen(model, layers, MATRICES)
        found = {site: WeightGradient() for site in chosen.sites.values()}

        def pull(taps: Taps, out: torch.Tensor) -> None:
            if taps.narrow:
                raise ValueError(
                    "model: gradients of float16 weights leave its range; measure it in bfloat16 or float32"
                )
            taps.pull_back(out, torch.ones_like(out), keep=False)
            for site, leaf, grad in taps.leaves:
                W = site.matrix(leaf)
                found[site].note(site.name, W, None if grad is None else site.matrix(grad))

        ran, count = walk(request, chosen, found, pull, _leaf)
        return {name: found[site] for name, site in chosen.sites.items() if site in ran}, count, chosen


def _leaf(_: Site, weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().requires_grad_()


def _labelled(X: Source, y, batch_size: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of X with their labels from y."""
    if not isinstance(X, torch.Tensor):
        raise ValueError("y must be None for an iterable X, whose batches bring labels of their own")
    model_access.check_numbers(X)
    y = as_labels(y, "y")
    if y.ndim == 0 or X.ndim == 0 or len(y) != len(X):
        raise ValueError(f"y must have one row for each sample of X, got shapes {tuple(y.shape)} and {tuple(X.shape)}")
    size = model_access.BATCH if batch_size is None else checks.integer("batch_size", batch_size, 1)
    return zip(X.split(size), y.split(size), strict=True)


def fact_matrix(gradient: WeightGradient, weight_decay: float, n: int) -> torch.Tensor:
    """-(1 / (n lambda)) W^T (sum of gradients), (d_in, d_in), of the weight's dtype, float32 for narrower ones."""
    W, G = gradient.fact()
    assert gradient.weight is not None
    found = (W.mT @ G).div_(-weight_decay * n)
    return found.to(torch.promote_types(gradient.weight.dtype, torch.float32))


def gram_correlation(gradient: WeightGradient) -> float | None:
    """Pearson correlation of the entries of W^T W and -W^T G, None where one is constant; no such matrix is formed."""
    W, G = map(in_unit, gradient.fact())
    gram, w, g = W @ W.mT, W.sum(-1), -G.sum(-1)
    return pearson(
        -float((gram * (W @ G.mT)).sum()),
        (float((w * w).sum()), float((w * g).sum())),
        (float(gram.square().sum()), float((gram * (G @ G.mT)).sum())),
        W.shape[-1] ** 2 * (1 if W.ndim == 2 else len(W)),
    )
