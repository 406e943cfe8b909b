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
# Colour, marker and name; black, vermilion and blue are for stages alone.
_SHARES = (
    (drawing.COLORS[3], "o", r"tr $\Sigma_W$ / tr $\Sigma_T$"),
    (drawing.COLORS[2], "s", r"tr $\Sigma_B$ / tr $\Sigma_T$"),
)
_LAYERS, _MARKERS = "cividis", "os^Dv"  # Layers have an order, and so do their colours, whichever cones an eye has.
_LOSS = "0.35"
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
                seeds, style = row.nc1[stage][:, :, layer], drawing.STAGES[stage]
                shown = np.where((seeds > 0) & np.isfinite(seeds), seeds, np.nan)
                _curve(axis, row.epochs, shown, style.color, style.marker, name)
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
        for style, share in zip(_SHARES, (1 - between, between), strict=True):
            _curve(axes[0], row.epochs, share, *style)
        for layer, style in enumerate(_layer_styles(row.nfa.shape[2])):
            _curve(axes[1], row.epochs, row.nfa[:, :, layer], *style)
        known = np.flatnonzero(np.isfinite(row.losses).any(0))
        losses = row.losses[:, known]
        _curve(axes[2], known + 1, np.where(losses > 0, losses, np.nan), _LOSS, None, "training loss")
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


def _layer_styles(count: int) -> list[tuple[str, str, str]]:
    """Colour, marker and name of each layer."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps[_LAYERS](np.linspace(0, 0.9, count))
    return [
        (to_hex(shade), _MARKERS[layer % len(_MARKERS)], f"layer {layer + 1}") for layer, shade in enumerate(shades)
    ]


def _curve(axis: Axes, epochs: np.ndarray, seeds: np.ndarray, color: str, marker: str | None, name: str) -> None:
    mean, low, high = band(seeds)
    around = (low, high) if len(seeds) > 1 else (None, None)
    drawing.curve(axis, epochs, mean, *around, color=color, marker=marker, label=name)
