"""The two kinds of Deep RFM figure: strips of Gram matrices, and curves of NC1 and NC2 over layers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each line holds a stage, its colour in the paper and its name in the legend.
CURVES = (
    ("input", "tab:green", "original data $X_l$"),
    ("projected", "tab:orange", "after $M_l^{1/2}$"),
    ("features", "tab:blue", "after $M_l^{1/2}$ and {map}"),
)
MEASURES = (r"NC1:  tr $\Sigma_W$ / tr $\Sigma_B$", r"NC2:  $||\tilde\mu\tilde\mu^T - \Sigma_{ETF}||_F$")
_COLORS = "RdBu_r"


@dataclass(frozen=True)
class Strip:
    """A row of Gram matrices: by layer the matrix, and NC1 of all points to write below it."""

    title: str
    panels: Mapping[int, np.ndarray]
    nc1: Mapping[int, float]
    classes: int


@dataclass(frozen=True)
class Curves:
    """A row of two plots: nc1 and nc2 by stage as (seeds, layers), NaN where nothing was measured."""

    title: str
    nc1: Mapping[str, np.ndarray]
    nc2: Mapping[str, np.ndarray]


def require() -> None:
    """Refuse to start hours of work whose figure cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures are drawn with matplotlib: pip install 'fastagop[reproduce]'") from error


def strips(rows: Sequence[Strip], title: str) -> Figure:
    """One strip a row, with one colour scale from -1 to 1 for all."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure

    sizes = {row.classes for row in rows}
    etf = -1 / (sizes.pop() - 1) if len(sizes) == 1 else None
    centred = etf is not None and etf > -1
    norm = TwoSlopeNorm(etf, -1, 1) if centred and etf is not None else Normalize(-1, 1)
    columns = max(len(row.panels) for row in rows)
    figure = Figure(figsize=(1.5 * columns + 1.4, 1.9 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for i, (row, axes) in enumerate(zip(rows, grid, strict=True)):
        _strip(row, axes, norm, lettered=f"({chr(65 + i)}) " if len(rows) > 1 else "")
    bar = figure.colorbar(ScalarMappable(norm, _COLORS), ax=grid, fraction=0.03, aspect=18 * len(rows), pad=0.01)
    _ticks(bar, etf)
    return figure


def _strip(row: Strip, axes: np.ndarray, norm: Any, lettered: str) -> None:
    for axis, layer in zip(axes, row.panels, strict=False):
        axis.imshow(row.panels[layer].astype(np.float32), cmap=_COLORS, norm=norm)
        axis.set_title(f"layer {layer}", fontsize=9, pad=3)
        axis.set_xlabel(f"NC1 = {row.nc1[layer]:.1e}" if np.isfinite(row.nc1[layer]) else "", fontsize=8, labelpad=3)
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(lettered + row.title, fontsize=9)
    for axis in axes[len(row.panels) :]:
        axis.set_axis_off()


def _ticks(bar: Any, etf: float | None) -> None:
    """Ticks at -1, 0 and 1, and at the value that an equiangular tight frame has between classes."""
    ticks = {-1.0: "$-$1 ", 0.0: "0", 0.5: "0.5", 1.0: "1", -0.5: "$-$0.5"}
    if etf is not None:
        ticks = {at: text for at, text in ticks.items() if abs(at - etf) > 0.15}
        ticks[etf] = f"$-$1/{round(-1 / etf)} (ETF)"
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=8)
    bar.set_label("cosine", fontsize=9)


def curves(rows: Sequence[Curves], title: str, feature_map: str) -> Figure:
    """NC1 (log axis) left, NC2 right; the mean over seeds with a band from the least to the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 2.45 * len(rows) + 0.95), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    for row, (left, right) in zip(rows, grid, strict=True):
        left.set_yscale("log")
        for axis, values in ((left, row.nc1), (right, row.nc2)):
            _curves(axis, values, feature_map)
        right.set_ylim(bottom=0)
        left.set_ylabel(row.title, fontsize=11)
    for axis, name in zip(grid[0], MEASURES, strict=True):
        axis.set_title(name, fontsize=10)
    for axis in grid[-1]:
        axis.set_xlabel("layer")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(CURVES), frameon=False)
    return figure


def _curves(axis: Axes, values: Mapping[str, np.ndarray], feature_map: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for stage, color, name in CURVES:
        seeds = np.where(values[stage] > 0, values[stage], np.nan)  # A log axis has no place for 0.
        layers = np.arange(1, seeds.shape[1] + 1)
        label = name.replace("{map}", feature_map)
        axis.plot(layers, seeds.mean(0), color=color, marker="o", markersize=3, linewidth=1.4, label=label)
        if len(seeds) > 1:
            axis.fill_between(layers, seeds.min(0), seeds.max(0), color=color, alpha=0.2, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(visible=True, alpha=0.3, linewidth=0.5)


def save(figure: Figure, stem: Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write the figure once a format; the same figure gives the same bytes."""
    paths = [stem.with_suffix(f".{suffix}") for suffix in formats]
    for path, suffix in zip(paths, formats, strict=True):
        content = io.BytesIO()
        dates = {"CreationDate": None} if suffix == "pdf" else None
        figure.savefig(content, format=suffix, dpi=200, metadata=dates)
        files.write(path, content.getvalue())
    return paths
