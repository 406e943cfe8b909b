"""The two kinds of network figure: NC1 at the parts of each layer, and scatter, NFA and loss; all over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastagop import plots as drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By stage, its name in the legend; fastagop.plots has the colours.
LABELS = {"input": r"$\Phi(X)$", "projected": r"$SV^T\Phi(X)$", "features": r"$\sigma(USV^T\Phi(X))$"}
_SHARES = (
    (drawing.COLORS[1], r"tr $\Sigma_W$ / tr $\Sigma_T$"),
    (drawing.COLORS[0], r"tr $\Sigma_B$ / tr $\Sigma_T$"),
)
_FLOOR = 0.01  # The band's lower end is at least this times the mean (paper, appendix C).


@dataclass(frozen=True)
class TrainingHistory:
    """A row: what a network did over epochs, NaN where nothing was measured.

    ``epochs`` (E,), ``nc1`` by stage (seeds, E, layers), ``nfa`` (seeds, E, layers), ``losses`` (seeds, all epochs).
    """

    title: str
    epochs: np.ndarray
    nc1: Mapping[str, np.ndarray]
    nfa: np.ndarray
    losses: np.ndarray


def band(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds, and mean minus and plus one standard deviation; the lower end is at least 0.01 of the mean."""
    mean, deviation = seeds.mean(0), seeds.std(0)
    return mean, np.maximum(mean - deviation, _FLOOR * mean), mean + deviation


def splits(rows: Sequence[TrainingHistory], title: str) -> Figure:
    """A column a layer: NC1 of its input, after S V^T, and after U and the nonlinearity."""
    from matplotlib.figure import Figure

    layers = max(row.nfa.shape[2] for row in rows)
    figure = Figure(figsize=(2.35 * layers + 0.6, 2.3 * len(rows) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), layers, squeeze=False, sharex="row", sharey="row")
    for row, axes in zip(rows, grid, strict=True):
        for layer, axis in enumerate(axes):
            axis.set_yscale("log")
            for stage, name in LABELS.items():
                seeds, color = row.nc1[stage][:, :, layer], drawing.STAGES[stage].color
                _curve(axis, row.epochs, np.where((seeds > 0) & np.isfinite(seeds), seeds, np.nan), color, name)
        axes[0].set_ylabel(f"{row.title}\n" r"NC1:  tr $\Sigma_W$ / tr $\Sigma_B$", fontsize=9)
    for layer, axis in enumerate(grid[0]):
        axis.set_title(f"layer {layer + 1}", fontsize=10)
    for axis in grid[-1]:
        axis.set_xlabel("epoch", fontsize=9)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def progress(rows: Sequence[TrainingHistory], title: str) -> Figure:
    """Shares of the scatter after the last hidden layer, NFA correlation by layer, and training loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for row, axes in zip(rows, figure.subplots(len(rows), 3, squeeze=False), strict=True):
        between = 1 / (1 + row.nc1["features"][:, :, -1])
        for (color, name), share in zip(_SHARES, (1 - between, between), strict=True):
            _curve(axes[0], row.epochs, share, color, name)
        for layer in range(row.nfa.shape[2]):
            color = drawing.COLORS[layer % len(drawing.COLORS)]
            _curve(axes[1], row.epochs, row.nfa[:, :, layer], color, f"layer {layer + 1}")
        epochs = np.arange(1, row.losses.shape[1] + 1)
        _curve(axes[2], epochs, np.where(row.losses > 0, row.losses, np.nan), "black", "training loss")
        axes[0].set_ylabel(row.title, fontsize=10)
        axes[0].set_ylim(0, 1.02)
        axes[1].set_ylim(top=1.02)
        axes[2].set_yscale("log")
        for axis, text in zip(axes, ("scatter after the last hidden layer", "NFA correlation", "loss"), strict=True):
            axis.set_title(text, fontsize=9)
            axis.set_xlabel("epoch", fontsize=9)
        for axis in axes[:2]:
            axis.legend(fontsize=7, frameon=False)
    return figure


def _curve(axis: Axes, epochs: np.ndarray, seeds: np.ndarray, color: str, name: str) -> None:
    mean, low, high = band(seeds)
    around = (low, high) if len(seeds) > 1 else (None, None)
    drawing.curve(axis, epochs, mean, *around, color=color, label=name)
