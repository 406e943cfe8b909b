"""The two kinds of Deep RFM figure, laid out; `fastagop.plots` draws the strips of Gram matrices and the curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastagop import plots as drawing
from reproduce import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By stage, its name in the legend.
LABELS = {
    "input": "original data $X_l$",
    "projected": "after $M_l^{1/2}$",
    "features": "after $M_l^{1/2}$ and {map}",
}
MEASURES = (r"NC1:  tr $\Sigma_W$ / tr $\Sigma_B$", r"NC2:  $||\tilde\mu\tilde\mu^T - \Sigma_{ETF}||_F$")
SMALL = 150_000  # Bytes of a picture in the repository.
require = drawing.require


@dataclass(frozen=True)
class Strip:
    """A row of Gram matrices: by layer the matrix, and NC1 of all points to write below it."""

    title: str
    panels: Mapping[int, np.ndarray]
    nc1: Mapping[int, float]
    classes: int


@dataclass(frozen=True)
class Curves:
    """A row of two plots: nc1 and nc2 by stage as (seeds, layers), NaN where nothing was measured.

    ``dtype`` of the features: its floor of NC1 is marked where curves come near.
    """

    title: str
    nc1: Mapping[str, np.ndarray]
    nc2: Mapping[str, np.ndarray]
    dtype: str = "float32"


def strips(rows: Sequence[Strip], title: str) -> Figure:
    """One strip a row, with one colour scale from -1 to 1 for all."""
    from matplotlib.figure import Figure

    sizes = {row.classes for row in rows}
    classes = sizes.pop() if len(sizes) == 1 else None
    columns = max(len(row.panels) for row in rows)
    figure = Figure(figsize=(1.5 * columns + 1.4, 1.9 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for i, (row, axes) in enumerate(zip(rows, grid, strict=True)):
        lettered = f"({chr(65 + i)}) " if len(rows) > 1 else ""
        drawing.gram_strip(row.panels, classes=classes, nc1=row.nc1, label=lettered + row.title, axes=list(axes))
    drawing.cosine_bar(figure, grid, classes, aspect=18 * len(rows))
    return figure


def curves(rows: Sequence[Curves], title: str, feature_map: str) -> Figure:
    """NC1 (log axis) left, NC2 right; the mean over seeds with a band from the least to the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 2.45 * len(rows) + 0.95), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    labels = {stage: name.replace("{map}", feature_map) for stage, name in LABELS.items()}
    for row, axes in zip(rows, grid, strict=True):
        for axis, measure, values in zip(axes, ("nc1", "nc2"), (row.nc1, row.nc2), strict=True):
            floor = row.dtype if measure == "nc1" and _near_floor(values, row.dtype) else None
            drawing.collapse_curves(values, measure=measure, labels=labels, floor=floor, legend=False, ax=axis)
            axis.set(xlabel="", ylabel="")
        axes[0].set_ylabel(row.title, fontsize=11)
    for axis, name in zip(grid[0], MEASURES, strict=True):
        axis.set_title(name, fontsize=10)
    for axis in grid[-1]:
        axis.set_xlabel("layer")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _near_floor(nc1: Mapping[str, np.ndarray], dtype: str) -> bool:
    """Whether a curve comes within four decades of eps^2: elsewhere the line would squeeze the curves."""
    seen = np.concatenate([np.ravel(seeds) for seeds in nc1.values()])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    return len(seen) > 0 and float(seen.min()) < 1e4 * float(np.finfo(dtype).eps) ** 2


def save(figure: Figure, stem: Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write the figure once a format; the same figure gives the same bytes. A .pdf has its fonts inside."""
    import matplotlib as mpl

    paths = [stem.with_suffix(f".{suffix}") for suffix in formats]
    for path, suffix in zip(paths, formats, strict=True):
        content = io.BytesIO()
        dates = {"CreationDate": None} if suffix == "pdf" else None
        with mpl.rc_context({"pdf.fonttype": 42}):
            figure.savefig(content, format=suffix, dpi=200, metadata=dates)
        files.write(path, content.getvalue())
    return paths


def save_small(figure: Figure, path: Path) -> None:
    """A .png of 256 colours and at most 150 kB where 100 dots an inch allow it, for the repository and its pages."""
    for dpi in (150, 125, 100):
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=dpi)
        small = _small_png(content)
        if len(small) < SMALL:
            break
    files.write(path, small)


def shrink(path: Path) -> None:
    """The same for a .png that is there, by its pixels; one that is small already stays as it is."""
    if path.stat().st_size < SMALL:
        return
    for scale in (1.0, 0.75, 0.5):
        small = _small_png(io.BytesIO(path.read_bytes()), scale)
        if len(small) < SMALL:
            break
    files.write(path, small)


def _small_png(content: io.BytesIO, scale: float = 1.0) -> bytes:
    """Half of the colours are those of Gram matrices; a choice by number of pixels would lose the ends of their bar."""
    import matplotlib as mpl
    from PIL import Image
    from scipy.spatial import KDTree

    image = Image.open(content).convert("RGB")
    if scale < 1:
        image = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)
    frequent = np.reshape(image.quantize(127).getpalette() or [], (-1, 3))
    diverging = 255 * mpl.colormaps[drawing.DIVERGING](np.linspace(0, 1, 255 - len(frequent)))[:, :3]
    palette = np.concatenate([[[255, 255, 255]], frequent, diverging.round()]).astype(np.uint8)
    pixels = np.asarray(image, np.int64) @ [1 << 16, 1 << 8, 1]
    seen, where = np.unique(pixels, return_inverse=True)
    nearest = np.asarray(KDTree(palette).query(np.stack([seen >> 16, seen >> 8 & 255, seen & 255], 1))[1], np.uint8)
    small, written = Image.fromarray(nearest[where].reshape(pixels.shape), "P"), io.BytesIO()
    small.putpalette(palette.tobytes())
    small.save(written, format="png", optimize=True)
    return written.getvalue()
