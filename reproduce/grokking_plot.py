"""The picture of grokking: accuracies over iterations, and M before, during and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastagop import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

_LINES = (("train", plots.COLORS[2], "s", "training pairs"), ("test", plots.COLORS[4], "o", "test pairs"))


def draw(rows: Sequence[Mapping[str, Any]], metrics: Mapping[int, Tensor], task: str) -> Figure:
    """Accuracy and the circulant share left, one picture of M for every iteration given to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 + 2.6 * len(metrics), 3.1), layout="constrained")
    widths = [1.5, *[1.0] * len(metrics)]
    curves, *pictures = figure.subplots(1, len(widths), gridspec_kw={"width_ratios": widths})
    iterations = [row["iteration"] for row in rows]
    for key, color, marker, label in _LINES:
        curves.plot(iterations, [row[key] for row in rows], color=color, marker=marker, markersize=3.5, label=label)
    share = [row["circulant"] for row in rows]
    curves.plot(iterations, share, color=plots.COLORS[3], linestyle="--", label="circulant share of M")
    curves.set(xlabel="iteration", ylabel="accuracy, share", ylim=(-0.03, 1.05), title=task)
    curves.legend(loc="center right", fontsize=8, frameon=False)
    for axis, (iteration, M) in zip(pictures, metrics.items(), strict=True):
        shown = M.clone().fill_diagonal_(0.0)  # the diagonal is many times larger than what there is to see
        bound = float(shown.abs().max()) or 1.0
        axis.imshow(shown.numpy(), cmap=plots.DIVERGING, vmin=-bound, vmax=bound)
        axis.set(xticks=[], yticks=[], title=f"M at iteration {iteration}")
    return figure
