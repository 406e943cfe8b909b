"""Curves over the layers of Deep RFM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagop.kernels import checks
from fastagop.plots import style
from fastagop.plots.style import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class _Measure:
    """How a measure of the layers' records is drawn: its label, and whether its axis is logarithmic or begins at 0."""

    label: str
    log: bool


_MEASURES = {
    "nc1": _Measure(r"NC1:  tr $\Sigma_W$ / tr $\Sigma_B$", log=True),
    "nc2": _Measure(r"NC2:  $||HH^T - \Sigma_{ETF}||_F$", log=False),
}


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
    level, how, names = _floor(floor), _MEASURES[measure], style.mapping("labels", labels, "{stage: name}")
    axis = style.axes(ax)
    if how.log:
        axis.set_yscale("log")
    for name, seeds in curves.items():
        drawn = style.on_scale(seeds, how.log)
        at, stage = np.arange(1, drawn.shape[1] + 1), STAGES[name]
        low, high = (drawn.min(0), drawn.max(0)) if len(drawn) > 1 else (None, None)
        text = names.get(name, stage.name)
        curve(axis, at, drawn.mean(0), low, high, color=stage.color, marker=stage.marker, label=text)
    if level is not None:
        axis.axhline(level, color="0.4", linestyle="--", linewidth=1)
        text = f"rounding of {floor}" if isinstance(floor, str) else f"{level:.0e}"
        at = (0.02, level)  # left, where NC1 has not fallen yet
        axis.annotate(text, at, xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8)
    if not how.log:
        axis.set_ylim(bottom=0)
    style.whole_numbers(axis)
    axis.set(xlabel="layer", ylabel=how.label)
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
    ax = style.drawable("ax", ax)
    ax.plot(x, middle, color=color, marker=marker, markevery=apart, markersize=3, linewidth=1.4, label=label)
    if low is not None and high is not None:
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    ax.grid(visible=True, alpha=0.3, linewidth=0.5)


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
        name: np.atleast_2d(style.array(f"values[{name!r}]", records[name], None)) for name in STAGES if name in records
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
