"""Pictures of learnt metrics: eigenvectors, eigenvalues and diagonals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastagop.kernels import checks
from fastagop.plots import style
from fastagop.plots.style import COLORS, DIVERGING
from fastagop.spectra import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def eigenvectors(
    found: Spectrum | np.ndarray | torch.Tensor,
    shape: Sequence[int],
    *,
    count: int | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Eigenvectors as images, largest eigenvalue first, each with its own scale around 0.

    Args:
        found: a ``Spectrum``, whose eigenvalues become titles, or directions (k, d).
        shape: of an image, (height, width), or (3, height, width) for colours: grey is 0 then.
        count: how many; default all.
        figure: a matplotlib Figure or SubFigure to draw into.

    Raises:
        ValueError: the shape does not hold d numbers.
    """
    vectors = style.array("found", found.vectors if isinstance(found, Spectrum) else found, 2)
    sides = tuple(int(side) for side in shape) if np.iterable(shape) else ()
    colours = len(sides) == 3 and sides[0] == 3
    d = vectors.shape[1]
    if (len(sides) != 2 and not colours) or min(sides) < 1 or math.prod(sides) != d:
        raise ValueError(f"shape must be (height, width) or (3, height, width) of {d} numbers, got {shape}")
    k = len(vectors) if count is None else checks.integer("count", count, 1, len(vectors))
    columns = min(k, 6)
    rows = math.ceil(k / columns)
    drawn = style.figure(figure, (1.5 * columns, 1.7 * rows))
    for i, axis in enumerate(drawn.subplots(rows, columns, squeeze=False).flat):
        if i < k:
            _image(axis, vectors[i].reshape(sides))
            if isinstance(found, Spectrum):
                share = float(found.shares[i])
                axis.set_title(rf"$\lambda_{{{i + 1}}}$ = {float(found.values[i]):.2g} ({share:.0%})", fontsize=9)
        axis.set_axis_off()
    return drawn


def _image(axis: Axes, image: np.ndarray) -> None:
    largest = float(np.abs(image).max()) or 1.0
    if image.ndim == 3:
        axis.imshow(np.moveaxis(0.5 + image / (2 * largest), 0, 2).clip(0, 1))
    else:
        axis.imshow(image, cmap=DIVERGING, vmin=-largest, vmax=largest)


def spectrum(
    found: Spectrum | np.ndarray | torch.Tensor, *, log: bool = True, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Eigenvalues in descending order, with the intervals where the ``Spectrum`` has them.

    Args:
        found: a ``Spectrum``, or eigenvalues (k,).
        log: a logarithmic axis, on which zeros are left out.
        label: for a legend.
        ax: Axes to draw on.
    """
    axis = style.axes(ax)
    if not isinstance(found, Spectrum) and np.ndim(found) == 2:
        raise ValueError("found must be a Spectrum or eigenvalues (k,), got a matrix; fastagop.spectrum(M) has both")
    values = style.array("found", found.values if isinstance(found, Spectrum) else found, 1)
    at = np.arange(1, len(values) + 1)
    if log:
        axis.set_yscale("log")
    color = style.next_color(axis)
    (line,) = axis.plot(at, style.on_scale(values, log), color=color, marker="o", markersize=4, label=label)
    if isinstance(found, Spectrum) and found.intervals is not None:
        low, high = style.on_scale(style.array("intervals", found.intervals, 2), log).T
        shown = np.concatenate([low, high])
        if np.isfinite(shown).any():  # An interval that reaches 0 goes on to half of the least that is shown.
            low = np.where(np.isnan(low), np.nanmin(shown) / 2, low)
            axis.vlines(at, low, high, color=line.get_color(), linewidth=2.5, alpha=0.5)
        axis.set_title(f"{found.confidence:.0%} intervals of {found.draws} draws", fontsize=9)
    style.whole_numbers(axis)
    axis.set(xlabel="eigenvalue number", ylabel="eigenvalue")
    return axis


def diagonal(
    M: np.ndarray | torch.Tensor,
    names: Sequence[str] | None = None,
    *,
    count: int = 20,
    ax: Axes | None = None,
) -> Axes:
    """The largest diagonal entries of a metric as bars, one for each feature, the largest on top.

    Args:
        M: (d, d), or the diagonal (d,).
        names: of the d features; default their numbers.
        count: number of bars at most.
        ax: Axes to draw on.
    """
    M = style.array("M", M, None)
    if M.ndim not in (1, 2) or (M.ndim == 2 and M.shape[0] != M.shape[1]):
        raise ValueError(f"M must be (d, d) or its diagonal (d,), got shape {M.shape}")
    entries = M if M.ndim == 1 else M.diagonal()
    if names is not None and len(names) != len(entries):
        raise ValueError(f"names must be of the {len(entries)} features of M, got {len(names)}")
    axis, count = style.axes(ax), checks.integer("count", count, 1)
    order = np.argsort(-entries, kind="stable")[:count]
    axis.barh(np.arange(len(order)), entries[order], color=COLORS[0])
    labels = [str(names[i]) if names is not None else str(i) for i in order]
    axis.set_yticks(np.arange(len(order)), labels=labels)
    axis.invert_yaxis()
    axis.set(xlabel="diagonal of M", ylabel="" if names is not None else "feature")
    return axis
