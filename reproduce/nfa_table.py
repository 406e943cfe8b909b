"""NFA and FACT correlations at every layer of any torch model, collapse at its Linear layers: a command, a function.

from reproduce.nfa_table import table
print(table(model, loader))  # batches of (inputs, labels); or table(model, X, y)
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastagop import commands, datasets, network
from reproduce import options
from reproduce.settings import DATASETS, load


def table(
    model: nn.Module,
    X,
    y=None,
    layers=None,
    activation: Callable | None = torch.relu,
    loss: Callable | None = None,
) -> str:
    """One line a layer: NC1 of its input, after S V^T, after the nonlinearity; NC2 of its input; NFA correlation.

    With ``loss``, as in ``network.fact``, the correlation of W^T W with the FACT matrix stands beside that.
    X is a tensor with labels y, or an iterable of (inputs, labels) that can be gone through several times. A cell is
    empty where the layer has no such number: NC1 of tokens or patches, the correlation with an AGOP of zero.
    """
    named: list[str] = []

    def names() -> list[str]:
        named[:] = named or _with_weights(model, network.agop(model, X, layers))
        return named

    constant = network.ConstantMatrixError
    nfa = _by_layer(lambda chosen: network.nfa_correlation(model, X, chosen), constant, names, layers)
    linear = _linear(model, nfa)
    splits = _by_layer(
        lambda chosen: network.collapse_split(model, X, y, chosen, activation=activation) if linear else {},
        network.NotAMatrixError,
        lambda: linear,
        linear,
    )
    columns = {"NFA": nfa}
    if loss is not None:
        columns["FACT"] = _by_layer(
            lambda chosen: network.fact_correlation(model, X, y, chosen, loss=loss), constant, lambda: nfa, list(nfa)
        )
    width = max(len(name) for name in ["layer", *nfa])
    head = "".join(f" |{name:>7}" for name in columns)
    lines = [f"{'layer':<{width}} |{'NC1 input':>11}{'S V^T x':>11}{'features':>11} |{'NC2 input':>10}{head}"]
    for name in nfa:
        nc1, nc2, split = " " * 33, " " * 10, splits.get(name)
        if split is not None:
            nc1 = "".join(f"{split.nc1[stage]:>11.2e}" for stage in ("input", "projected", "features"))
            nc2 = f"{split.nc2['input']:>10.3f}"
        values = (column.get(name) for column in columns.values())
        cells = " |".join("" if value is None else f"{value:>7.3f}" for value in values)
        lines.append(f"{name:<{width}} |{nc1} |{nc2} |{cells}")
    return "\n".join(lines)


def _with_weights(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The layers that multiply by a matrix, which embeddings do not."""
    modules = dict(model.named_modules())
    return [name for name in names if not isinstance(modules.get(name), nn.Embedding)]


def _linear(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The Linear layers, of which the output projections of attention are none: it does not call them."""
    modules = dict(model.named_modules())
    return [
        name
        for name in names
        if isinstance(modules.get(name), nn.Linear)
        and not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]


def _by_layer(measure: Callable, error: type[Exception], names: Callable, layers) -> dict:
    """What measure says of all layers at once; where one makes it fail, of each by itself, None for failures."""
    try:
        return measure(layers)
    except error:
        measured = {}
        for name in names():
            try:
                measured[name] = measure(name)[name]
            except error:
                measured[name] = None
        return measured


def example() -> nn.Module:
    """A small network trained on scikit-learn's digits for a few seconds."""
    torch.manual_seed(0)
    X, y = datasets.load("digits")
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        for inputs, labels in DataLoader(TensorDataset(X, y), batch_size=128, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"),
    "mse": lambda out, y: (out - (2.0 * nn.functional.one_hot(y, out.shape[1]) - 1.0)).square().mean(1),  # as figure 7
}


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "none": None,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    text = "module:function that returns your trained model, importable from here; default %(default)s, an example"
    add("--model", default="reproduce.nfa_table:example", help=text)
    add("--dataset", action=options.Once, default="digits", help=f"{DATASETS}; default %(default)s")
    add("--n", type=commands.count, help="points, the first in file order; default all")
    add("--shape", type=commands.count, nargs="+", help="of one input, for example 1 28 28; default flat")
    add("--layers", nargs="+", help='names or patterns of layers, for example "classifier.*"; default all')
    add("--loss", choices=LOSSES, help="that the model was trained with, for its FACT correlations; default none")
    text = 'that follows the model\'s Linear layers, for the column "features"; default %(default)s'
    add("--activation", choices=ACTIVATIONS, default="relu", help=text)
    options.add_data(parser)


def command(args: argparse.Namespace) -> int:
    """Load the model and the data, and print the table."""
    module, _, function = args.model.partition(":")
    try:
        build = getattr(importlib.import_module(module), function or "model", None)
        model = build() if callable(build) and not isinstance(build, nn.Module) else build
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"--model {args.model!r} cannot be imported and called without arguments: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model must be module:function returning a torch.nn.Module, got {args.model!r}")
    X, y = load(args.dataset, args.data_root, n=args.n, download=args.download)
    if args.shape and X[0].numel() != math.prod(args.shape):
        raise ValueError(f"--shape {args.shape} has {math.prod(args.shape)} items, but an input has {X[0].numel()}")
    shaped = X.view(-1, *args.shape) if args.shape else X
    try:
        print(table(model, shaped, y, args.layers, ACTIVATIONS[args.activation], LOSSES.get(args.loss)))
    except RuntimeError as error:
        shape = tuple(args.shape or X.shape[1:])
        raise ValueError(f"the model refuses inputs of shape {shape} ({error}); --shape says what it wants") from error
    return 0
