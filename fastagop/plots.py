"""Pictures of collapse and of learnt metrics, by matplotlib, which is imported when one is drawn.

Functions of one plot take ``ax`` and return the Axes; those of several take ``figure`` or ``axes`` and return the
Figure. Without these pyplot makes a new figure. Colours are Okabe and Ito's, and a stage of a layer has the same colour
and marker everywhere: ``STAGES``, three that stay apart for every kind of colour blindness. Install matplotlib with
``pip install 'fastagop[plots]'``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastagop.kernels import checks
from fastagop.spectra import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "DIVERGING",
    "STAGES",
    "Stage",
    "collapse_curves",
    "cosine_bar",
    "curve",
    "diagonal",
    "eigenvectors",
    "gram_strip",
    "require",
    "spectrum",
]

# Blue, vermilion, green, purple, orange, sky blue, black and yellow of Okabe & Ito (2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


@dataclass(frozen=True)
class Stage:
    """How a stage of a layer is drawn: its colour, marker and name in a legend."""

    color: str
    marker: str
    name: str


STAGES: Mapping[str, Stage] = {
    "input": Stage("#000000", "o", "input"),
    "projected": Stage("#D55E00", "s", "after $M^{1/2}$"),
    "features": Stage("#0072B2", "^", "features"),
}
_MEASURES = {"nc1": r"NC1:  tr $\Sigma_W$ / tr $\Sigma_B$", "nc2": r"NC2:  $||HH^T - \Sigma_{ETF}||_F$"}
DIVERGING = "RdBu_r"  # of everything that has a middle: blue below, white, red above


def require() -> None:
    """Refuse, before work whose picture cannot be drawn: ImportError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib: pip install 'fastagop[plots]'") from error


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
    vectors = _array("found", found.vectors if isinstance(found, Spectrum) else found, 2)
    sides = tuple(int(side) for side in shape) if np.iterable(shape) else ()
    colours = len(sides) == 3 and sides[0] == 3
    d = vectors.shape[1]
    if (len(sides) != 2 and not colours) or min(sides) < 1 or math.prod(sides) != d:
        raise ValueError(f"shape must be (height, width) or (3, height, width) of {d} numbers, got {shape}")
    k = len(vectors) if count is None else checks.integer("count", count, 1, len(vectors))
    columns = min(k, 6)
    rows = math.ceil(k / columns)
    drawn = _figure(figure, (1.5 * columns, 1.7 * rows))
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
    axis = _axes(ax)
    if not isinstance(found, Spectrum) and np.ndim(found) == 2:
        raise ValueError("found must be a Spectrum or eigenvalues (k,), got a matrix; fastagop.spectrum(M) has both")
    values = _array("found", found.values if isinstance(found, Spectrum) else found, 1)
    at = np.arange(1, len(values) + 1)
    if log:
        axis.set_yscale("log")
    (line,) = axis.plot(at, _drawn(values, log), color=_next_color(axis), marker="o", markersize=4, label=label)
    if isinstance(found, Spectrum) and found.intervals is not None:
        low, high = _drawn(_array("intervals", found.intervals, 2), log).T
        shown = np.concatenate([low, high])
        if np.isfinite(shown).any():  # An interval that reaches 0 goes on to half of the least that is shown.
            low = np.where(np.isnan(low), np.nanmin(shown) / 2, low)
            axis.vlines(at, low, high, color=line.get_color(), linewidth=2.5, alpha=0.5)
        axis.set_title(f"{found.confidence:.0%} intervals of {found.draws} draws", fontsize=9)
    _whole_numbers(axis)
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
    M = _array("M", M, None)
    if M.ndim not in (1, 2) or (M.ndim == 2 and M.shape[0] != M.shape[1]):
        raise ValueError(f"M must be (d, d) or its diagonal (d,), got shape {M.shape}")
    entries = M if M.ndim == 1 else M.diagonal()
    if names is not None and len(names) != len(entries):
        raise ValueError(f"names must be of the {len(entries)} features of M, got {len(names)}")
    axis, count = _axes(ax), checks.integer("count", count, 1)
    order = np.argsort(-entries, kind="stable")[:count]
    axis.barh(np.arange(len(order)), entries[order], color=COLORS[0])
    labels = [str(names[i]) if names is not None else str(i) for i in order]
    axis.set_yticks(np.arange(len(order)), labels=labels)
    axis.invert_yaxis()
    axis.set(xlabel="diagonal of M", ylabel="" if names is not None else "feature")
    return axis


def collapse_curves(
    values: Any,
    *,
    measure: str = "nc1",
    labels: Mapping[str, str] | None = None,
    floor: str | float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """NC1 (on a logarithmic axis) or NC2 over layers at the three stages of a layer.

    Args:
        values: a fitted Deep RFM classifier, its ``layers_``, or {stage: (layers,) or (seeds, layers)} with stages
            among "input", "projected" and "features". Several seeds are drawn as their mean, with a band from the least
            to the largest. What is not finite, and 0 on a logarithmic axis, is a gap.
        measure: "nc1" or "nc2".
        labels: {stage: its name in the legend}.
        floor: a level to mark: "float32" or "float64" for eps^2 of that dtype, the NC1 to an order of magnitude that
            storing features in it brings by itself where classes are as far apart as features are long, or a number.
        legend: whether the Axes get a legend.
        ax: Axes to draw on.
    """
    checks.choice("measure", measure, tuple(_MEASURES))
    curves = _stages(values, measure)
    level = _floor(floor)
    axis = _axes(ax)
    if measure == "nc1":
        axis.set_yscale("log")
    for name, seeds in curves.items():
        drawn = _drawn(seeds, measure == "nc1")
        at, stage = np.arange(1, drawn.shape[1] + 1), STAGES[name]
        low, high = (drawn.min(0), drawn.max(0)) if len(drawn) > 1 else (None, None)
        text = (labels or {}).get(name, stage.name)
        curve(axis, at, drawn.mean(0), low, high, color=stage.color, marker=stage.marker, label=text)
    if level is not None:
        axis.axhline(level, color="0.4", linestyle="--", linewidth=1)
        text = f"rounding of {floor}" if isinstance(floor, str) else f"{level:.0e}"
        at = (0.02, level)  # left, where NC1 has not fallen yet
        axis.annotate(text, at, xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8)
    if measure == "nc2":
        axis.set_ylim(bottom=0)
    _whole_numbers(axis)
    axis.set(xlabel="layer", ylabel=_MEASURES[measure])
    if legend:
        axis.legend(frameon=False, fontsize=8)
    return axis


def curve(
    ax: Axes,
    x: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    *,
    color: str,
    marker: str | None = None,
    label: str | None = None,
) -> None:
    """A line with a band from ``low`` to ``high`` around it, over a faint grid.

    Markers tell lines apart that run close, or in print without colours; of many points some twenty have one.

    Args:
        ax, x, middle: Axes to draw on, and the line's points (n,) each.
        low, high: the band's edges (n,), or None; color, marker and label are as in matplotlib's ``plot``.
    """
    apart = max(1, len(x) // 20)
    ax.plot(x, middle, color=color, marker=marker, markevery=apart, markersize=3, linewidth=1.4, label=label)
    if low is not None and high is not None:
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    ax.grid(visible=True, alpha=0.3, linewidth=0.5)


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
    if not isinstance(panels, Mapping):
        raise TypeError(f"panels must be a dictionary {{layer: Gram matrix}}, got {type(panels).__name__}")
    if not panels:
        raise ValueError("panels must hold at least one Gram matrix, got none")
    matrices = {key: _array(f"panels[{key!r}]", matrix, 2) for key, matrix in panels.items()}
    for key, matrix in matrices.items():
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"panels[{key!r}] must be a square Gram matrix (n, n), got shape {matrix.shape}")
    own = axes is None
    if axes is None:
        canvas = _figure(figure, (1.5 * len(panels) + 1.4, 2.2))
        axes = list(canvas.subplots(1, len(panels), squeeze=False)[0])
    if len(axes) < len(panels):
        raise ValueError(f"axes must be one for each of the {len(panels)} panels, got {len(axes)}")
    scale = _cosine_scale(classes)
    for axis, (key, matrix) in zip(axes, matrices.items(), strict=False):
        axis.imshow(matrix.astype(np.float32), cmap=DIVERGING, norm=scale)
        axis.set_title(f"layer {key}" if isinstance(key, (int, np.integer)) else str(key), fontsize=9, pad=3)
        value = (nc1 or {}).get(key, math.nan)
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


def _stages(values: Any, measure: str) -> dict[str, np.ndarray]:
    """{stage: (seeds, layers)} of whatever ``collapse_curves`` takes."""
    records = getattr(values, "layers_", values)
    if not isinstance(records, Mapping):
        records = list(records) if isinstance(records, Iterable) else []
        found = [getattr(record, measure, None) for record in records]
        if not found or not all(isinstance(each, Mapping) and each for each in found):
            raise ValueError(
                f"values must be a fitted Deep RFM classifier, its layers_ with {measure}, or {{stage: numbers}}, got "
                f"{type(values).__name__}"
            )
        records = {stage: [each[stage] for each in found if each is not None] for stage in STAGES}
    if not records or set(records) - set(STAGES):
        raise ValueError(f"values must have stages among {', '.join(STAGES)}, got {list(records)}")
    curves = {
        name: np.atleast_2d(_array(f"values[{name!r}]", records[name], None)) for name in STAGES if name in records
    }
    for name, seeds in curves.items():
        if seeds.ndim != 2:
            raise ValueError(f"values[{name!r}] must have shape (layers,) or (seeds, layers), got {seeds.shape}")
    return curves


def _floor(floor: str | float | None) -> float | None:
    if floor is None:
        return None
    if isinstance(floor, str):
        checks.choice("floor", floor, ("float32", "float64"))
        return float(np.finfo(floor).eps) ** 2
    return checks.nonnegative("floor", floor)


def _drawn(values: np.ndarray, log: bool) -> np.ndarray:
    """Values without those that have no place on the axis."""
    return np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)


def _array(name: str, value: Any, ndim: int | None) -> np.ndarray:
    array = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiu" or (ndim is not None and array.ndim != ndim):
        wanted = "numbers" if ndim is None else f"numbers in {ndim} dimension(s)"
        raise ValueError(f"{name} must hold {wanted}, got {array.dtype} of shape {array.shape}")
    return array.astype(np.float64)


def _next_color(axis: Axes) -> str:
    return COLORS[len(axis.lines) % len(COLORS)]


def _whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # one layer has one number


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    require()
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _figure(figure: Figure | None, size: tuple[float, float]) -> Any:
    if figure is not None:
        return figure
    require()
    import matplotlib.pyplot as plt

    return plt.figure(figsize=size, layout="constrained")
