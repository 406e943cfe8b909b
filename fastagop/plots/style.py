"""What all pictures have in common: colours, markers, and where and of what they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
DIVERGING = "RdBu_r"  # of everything that has a middle: blue below, white, red above


def require() -> None:
    """Refuse, before work whose picture cannot be drawn: ImportError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib: pip install 'fastagop[plots]'") from error


def on_scale(values: np.ndarray, log: bool) -> np.ndarray:
    """Values, NaN where they have no place on an axis: what is not finite and, on a logarithmic one, below or at 0."""
    return np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)


def array(name: str, value: Any, ndim: int | None) -> np.ndarray:
    """Numbers as a float64 array, of so many dimensions where that matters; ValueError by the argument's name."""
    try:
        found = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{name} must hold numbers in rows of one length, got {type(value).__name__}: {error}"
        ) from error
    if found.dtype.kind not in "fiu" or (ndim is not None and found.ndim != ndim):
        wanted = "numbers" if ndim is None else f"numbers in {ndim} dimension(s)"
        other = found.dtype == object and found.ndim == 0
        got = type(value).__name__ if other else f"{found.dtype} of shape {found.shape}"
        raise ValueError(f"{name} must hold {wanted}, got {got}")
    return found.astype(np.float64)


def mapping(name: str, value: Any, of: str) -> Mapping[Any, Any]:
    """A dictionary as it is, an empty one where none is given; TypeError where something else is."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary {of}, got {type(value).__name__}")
    return value or {}


def next_color(axis: Axes) -> str:
    """The first colour that no line of the Axes has."""
    return COLORS[len(axis.lines) % len(COLORS)]


def whole_numbers(axis: Axes) -> None:
    """Let the ticks of x be whole numbers, also where one layer has one number."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def axes(ax: Axes | None) -> Axes:
    """The Axes to draw on, a new figure's where none are given."""
    return _pyplot().subplots(layout="constrained")[1] if ax is None else drawable("ax", ax)


def figure(given: Figure | None, size: tuple[float, float]) -> Any:
    """The Figure to draw into, a new one of a size in inches where none is given."""
    if given is None:
        return _pyplot().figure(figsize=size, layout="constrained")
    if not hasattr(given, "subplots"):
        raise TypeError(f"figure must be a matplotlib Figure or SubFigure, got {type(given).__name__}")
    return given


def drawable(name: str, ax: Any) -> Any:
    """Axes as they are; TypeError where something else is given, such as the array of several that pyplot makes."""
    if not hasattr(ax, "imshow") or not hasattr(ax, "figure"):
        raise TypeError(f"{name} must be matplotlib's Axes, got {type(ax).__name__}")
    return ax


def drawables(name: str, axes: Any) -> list:
    """Several Axes as a list; TypeError where there are not."""
    if not np.iterable(axes):
        raise TypeError(f"{name} must be a sequence of matplotlib's Axes, got {type(axes).__name__}")
    return [drawable(f"each of {name}", ax) for ax in axes]


def _pyplot() -> Any:
    require()
    import matplotlib.pyplot as plt

    return plt
