"""Figures 2 and 7 to 12 of the paper: which networks each is made of, and what is drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce import network_plots, network_settings, options, training
from reproduce.figures import Family, Figure, Row, Runs
from reproduce.layers import STAGES, number
from reproduce.network_plots import TrainingHistory
from reproduce.network_settings import HIDDEN, NETWORKS
from reproduce.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def draw(kind: str, done: Runs, title: str) -> Drawing:
    """The figure as "splits" or "progress", with a row for each list of runs."""
    plot = {"splits": network_plots.splits, "progress": network_plots.progress}[kind]
    return plot([history(row) for row in done], title)


def history(row: Sequence[Run]) -> TrainingHistory:
    """Runs that differ in their seed only, as arrays over the hidden layers."""
    settings = row[0].settings
    epochs = sorted({entry["epoch"] for entry in row[0].rows})

    def values(column: str) -> np.ndarray:
        cells = [[number(entry[column]) for entry in run.rows if entry["layer"] <= HIDDEN] for run in row]
        return np.array(cells).reshape(len(row), len(epochs), HIDDEN)

    nc1 = {stage: values(f"nc1_{stage}") for stage in STAGES}
    losses = np.array([run.record["losses"] for run in row])
    title = f"{settings.title}, {NETWORKS[settings.network]}"
    return TrainingHistory(title, np.array(epochs), nc1, values("nfa"), losses)


def lessons(done: Runs) -> list[str]:
    """For each row, what its last measurement says of the paper's two claims."""
    return [_lesson(history(row)) for row in done]


def _lesson(row: TrainingHistory) -> str:
    start, middle, end = (row.nc1[stage][:, -1].mean(0) for stage in STAGES)
    drops = [training.log_drop_share(*values) for values in zip(start, middle, end, strict=True)]
    shares = [f"{100 * share:.0f}%" if share is not None else "no fall" for share in drops]
    nfa = row.nfa[:, -1]
    return (
        f"{row.title}: S V^T makes this part of each hidden layer's fall of NC1 (of its logarithm): "
        f"{', '.join(shares)}; NFA correlation over hidden layers and seeds {nfa.mean():.2f} +- {nfa.std():.2f} "
        "(paper, after its training: 0.74 +- 0.13 for the MLP on MNIST, 0.74 +- 0.17 for ResNet on CIFAR-10)"
    )


def csv_lines(run: Run) -> list[dict[str, Any]]:
    """A run's lines of the figure's .csv: one an epoch and layer."""
    columns = {"dataset": run.settings.name, "network": run.settings.network, "seed": run.settings.seed}
    return [{**columns, **{key: value for key, value in row.items() if key != "name"}} for row in run.rows]


def record_of(lines: list[dict[str, str]]) -> dict[str, Any]:
    """The layers of one run's ``csv_lines``, and its losses: NaN in epochs that were not measured."""
    rows: list[dict[str, Any]] = [{**line, "epoch": int(line["epoch"]), "layer": int(line["layer"])} for line in lines]
    losses = np.full(max(row["epoch"] for row in rows), np.nan)
    for row in rows:
        if row["epoch"] > 0:  # No loss is met before training.
            losses[row["epoch"] - 1] = number(row["loss"])
    return {"layers": rows, "losses": losses.tolist()}


def _rows(network: str) -> tuple[Row, ...]:
    return tuple((dataset, network) for dataset in ("mnist", "cifar10", "svhn"))


FAMILY = Family(
    procedure=training.NetworkProcedure(),
    add_options=options.add_network_figure,
    paper=network_settings.paper,
    options=("quick", "n", "epochs", "learning_rate", "momentum", "init_scale", "width", "every", "standardize"),
    seeds=(0, 1, 2),
    draw=draw,
    csv_lines=csv_lines,
    record_of=record_of,
    settings=network_settings.NetworkSettings,
    recorded=("settings", "environment", "seconds", "accuracy", "resumed"),
    lessons=lessons,
)
_SPLITS, _PROGRESS = "NC1 at the parts of each layer", "Collapse, NFA and training loss"
_PARTS = (
    "Of each layer's fall of NC1 over training, the larger part happens at S V^T, the right singular structure of its "
    "weights, and not at the nonlinearity"
)
_TOGETHER = (
    "While the loss falls, within-class scatter falls against the total, and the Gram matrices of the weights become "
    "correlated with the AGOP of their layers (the NFA)"
)
FIGURES = {
    "figure2": Figure(
        FAMILY, "splits", (("mnist", "mlp"), ("cifar10", "resnet")), f"{_SPLITS} of an MLP and ResNet18", _PARTS
    ),
    "figure7": Figure(FAMILY, "splits", _rows("mlp"), f"{_SPLITS} of an MLP", _PARTS),
    "figure8": Figure(FAMILY, "splits", _rows("resnet"), f"{_SPLITS} of ResNet18's classifier", _PARTS),
    "figure9": Figure(FAMILY, "splits", _rows("vgg"), f"{_SPLITS} of VGG-11's classifier", _PARTS),
    "figure10": Figure(FAMILY, "progress", _rows("mlp"), f"{_PROGRESS} of an MLP", _TOGETHER),
    "figure11": Figure(FAMILY, "progress", _rows("resnet"), f"{_PROGRESS} of ResNet18", _TOGETHER),
    "figure12": Figure(FAMILY, "progress", _rows("vgg"), f"{_PROGRESS} of VGG-11", _TOGETHER),
}
