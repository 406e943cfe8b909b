"""How the benchmarks' pictures look: a contender has one colour and marker in all of them, axes name what was measured.

Colours are `fastagop.plots.COLORS`, which everybody can tell apart, without the yellow, which vanishes on white.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench import files
from fastagop.plots import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS[:7]
# By contender its colour and marker; the same colour is the same house.
STYLES = {
    "fastagop": (BLUE, "o"),
    "fastagop keops": (SKY, "o"),
    "xrfm": (VERMILION, "s"),
    "torch composition": (GREEN, "^"),
    "KeOps LazyTensor": (PURPLE, "D"),
    "scikit-learn KernelRidge": (ORANGE, "v"),
    "vmap(jacrev)": (BLACK, "P"),
    "solve": (BLUE, "o"),
    "agop": (SKY, "D"),
    "layer": (PURPLE, "P"),
    "xrfm's solve": (VERMILION, "s"),
    "potrf float64": (BLACK, "v"),
    "potrf float32": ("0.5", "^"),
}


def new(width: float, height: float) -> Figure:
    """A figure of its own, which no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(name: str) -> tuple[str, str]:
    """A contender's colour and marker; grey circles for one that has none yet."""
    return STYLES.get(name, ("0.5", "o"))


def house(learner: str) -> str:
    """The colour of a learner of tables: fastagop's, xRFM's and whatever wraps it, all others."""
    if learner.startswith("fastagop"):
        return BLUE
    return VERMILION if learner.startswith(("xrfm", "pytabkit")) else "0.35"


def by_n(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Seconds against n on logarithmic axes, with a tick at every n that was measured and at no other."""
    for name, points in lines.items():
        color, marker = style(name)
        dashes = "--" if name.startswith("potrf") else "-"
        axes.loglog(*zip(*sorted(points), strict=True), color=color, marker=marker, linestyle=dashes, label=name)
    named_ticks(axes.xaxis, {n for points in lines.values() for n, _ in points})
    axes.set(xlabel="n", ylabel="seconds")
    axes.grid(visible=True, alpha=0.3, linewidth=0.5)
    axes.legend(frameon=False)


def named_ticks(axis, values: Iterable[float]) -> None:
    """Ticks at these values alone, written out."""
    at = sorted(values)
    axis.set_ticks(at, [f"{value:,g}" for value in at])
    axis.set_ticks([], minor=True)


def save(figure: Figure, path: Path) -> Path:
    """Write a .png and say where."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    files.write(path, content.getvalue())
    return path
