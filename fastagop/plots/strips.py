"""Gram matrices of layers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastagop.kernels import checks
from fastagop.plots import style
from fastagop.plots.style import DIVERGING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gram_strip(
    panels: Mapping[Any, np.ndarray | torch.Tensor],
    *,
    classes: int | None = None,
    nc1: Mapping[Any, float] | None = None,
    label: str = "",
    axes: Sequence[Axes] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Gram matrices of layers (``collapse.gram``) side by side, in one scale from -1 to 1.

    Args:
        panels: {layer: matrix}; a number is titled "layer 3", any other key as it is written.
        classes: number of classes K. The scale's middle is then -1 / (K - 1), the cosine between collapsed classes.
        nc1: {layer: NC1} to write below the panels.
        label: to the left of the strip.
        axes: Axes to draw on, as many as panels or more: those that are left over are switched off. No colour bar is
            drawn then; ``cosine_bar`` adds one.
        figure: a matplotlib Figure or SubFigure to draw into.
    """
    panels, values = style.mapping("panels", panels, "{layer: Gram matrix}"), style.mapping("nc1", nc1, "{layer: NC1}")
    if not panels:
        raise ValueError("panels must hold at least one Gram matrix, got none")
    matrices = {key: style.array(f"panels[{key!r}]", matrix, 2) for key, matrix in panels.items()}
    for key, matrix in matrices.items():
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"panels[{key!r}] must be a square Gram matrix (n, n), got shape {matrix.shape}")
    own = axes is None
    if axes is None:
        canvas = style.figure(figure, (1.5 * len(panels) + 1.4, 2.2))
        axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    axes = style.drawables("axes", axes)
    if len(axes) < len(panels):
        raise ValueError(f"axes must be one for each of the {len(panels)} panels, got {len(axes)}")
    scale = _cosine_scale(classes)
    for axis, (key, matrix) in zip(axes, matrices.items(), strict=False):
        axis.imshow(matrix.astype(np.float32), cmap=DIVERGING, norm=scale)
        axis.set_title(f"layer {key}" if isinstance(key, (int, np.integer)) else str(key), fontsize=9, pad=3)
        value = values.get(key, math.nan)
        axis.set_xlabel(f"NC1 = {value:.1e}" if math.isfinite(value) else "", fontsize=8, labelpad=3)
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(label, fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    drawn: Any = axes[0].figure
    if own:
        cosine_bar(drawn, axes, classes)
    return drawn


def cosine_bar(figure: Figure, axes: Any, classes: int | None = None, *, aspect: float = 18) -> None:
    """A colour bar for ``gram_strip``: -1, 0 and 1, and where K classes are given -1 / (K - 1).

    Args:
        figure, axes, classes: as in ``gram_strip``; axes give up room. aspect: how many times longer than wide it is.
    """
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(_cosine_scale(classes), DIVERGING)
    bar = figure.colorbar(mappable, ax=axes, fraction=0.03, aspect=aspect, pad=0.01)
    ticks = {-1.0: "$-$1 ", 0.0: "0", 0.5: "0.5", 1.0: "1", -0.5: "$-$0.5"}
    if classes is not None:
        frame = -1 / (classes - 1)
        ticks = {at: text for at, text in ticks.items() if abs(at - frame) > 0.15}
        ticks[frame] = f"$-$1/{classes - 1} (ETF)"
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=8)
    bar.set_label("cosine", fontsize=9)


def _cosine_scale(classes: int | None) -> Any:
    from matplotlib.colors import Normalize, TwoSlopeNorm

    if classes is not None:
        checks.integer("classes", classes, 2)
    return Normalize(-1, 1) if classes is None or classes == 2 else TwoSlopeNorm(-1 / (classes - 1), -1, 1)
