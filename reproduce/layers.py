"""What one layer leaves behind: a row of numbers, a line on the screen, a panel of the Gram figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fastagop import collapse, linalg
from fastagop.deep_rfm.layer import LayerEvent, LayerRecord, normalise_rows
from reproduce import files

# What a layer is given, what its linear part makes of it, and what leaves it: x, M^(1/2) x and Phi(M^(1/2) x) in Deep
# RFM; x, S V^T x and ReLU(U S V^T x) in a network.
STAGES = ("input", "projected", "features")
PANELS = 7  # A strip of the paper has seven panels.
LAST_PANEL = 19  # The paper's last panel shows layer 19.
ROWS_PER_CLASS = 60  # A panel shows a sample: at n = 50,000 the whole Gram matrix would be 10 GB.

_GROUPS = f"{'':>5} |{'NC1':>10}{'':>22} |{'NC2':>10}{'':>16} |"
_NAMES = (
    f"{'layer':>5} |{'input':>10}{'M^1/2 x':>11}{'features':>11} |{'input':>10}{'M^1/2 x':>8}{'feat.':>8} | "
    f"{'solver':<17}{'jitter':>9}{'residual':>10}{'seconds':>9}"
)
HEADER = f"{_GROUPS}\n{_NAMES}"


def row(index: int, record: LayerRecord) -> dict[str, Any]:
    """A line of layers.csv; layers count from 1 as in the paper. NaN where nothing could be measured."""
    nan, solution = float("nan"), record.solution
    return {
        "layer": index + 1,
        **{f"nc1_{stage}": record.nc1.get(stage, nan) for stage in STAGES},
        **{f"nc2_{stage}": record.nc2.get(stage, nan) for stage in STAGES},
        "residual": solution.residual,
        "jitter": solution.jitter,
        "method": solution.method,
        "solve_dtype": str(solution.dtype).removeprefix("torch."),
        "iterations": solution.iterations,
        "fallback": solution.fallback,
        "agop_scale": record.agop_scale,
        "seconds": record.seconds,
        **{f"seconds_{stage}": spent for stage, spent in record.stages.items()},
        "peak_bytes": record.peak_bytes,
    }


def line(values: Mapping[str, Any]) -> str:
    """The row as a line below HEADER."""
    nc1 = "".join(f"{number(values[f'nc1_{stage}']):{10 + bool(i)}.2e}" for i, stage in enumerate(STAGES))
    nc2 = "".join(f"{number(values[f'nc2_{stage}']):{8 + 2 * (not i)}.3f}" for i, stage in enumerate(STAGES))
    solver = f"{values['method']} {values['solve_dtype']}"
    numerics = f"{number(values['jitter']):>9.1g}{number(values['residual']):>10.1e}"
    return f"{values['layer']:>5} |{nc1} |{nc2} | {solver:<17}{numerics}{number(values['seconds']):>9.2f}"


def number(cell: Any) -> float:
    """A cell of a CSV or JSON file as float; NaN where it is empty."""
    return float("nan") if cell in ("", None) else float(cell)


def panel_layers(depth: int) -> list[int]:
    """The layers a strip shows, counted from 1: evenly spaced, the first and layer 19 (or the last) among them."""
    last = min(depth, LAST_PANEL)
    return sorted({round(layer) for layer in np.linspace(1, last, min(PANELS, last))})


def panel_rows(classes: np.ndarray) -> np.ndarray:
    """At most 60 row numbers a class, evenly spaced in file order."""
    members = [np.flatnonzero(classes == c) for c in np.unique(classes)]
    picks = [np.linspace(0, len(m) - 1, min(len(m), ROWS_PER_CLASS)).round().astype(int) for m in members]
    return np.concatenate([m[p] for m, p in zip(members, picks, strict=True)])


def panel(projected: torch.Tensor, classes: np.ndarray) -> np.ndarray:
    """Gram matrix of a panel's rows of M^(1/2) X, sorted by class.

    collapse.gram centres by the mean of the class means of the rows it is given. That of a sample with equally
    many rows from every class estimates the mean of all points' class means, and no class weighs more for being
    larger. float16 is ten times finer than what a colour shows.
    """
    return collapse.gram(projected, classes).cpu().numpy().astype(np.float16)


class LayerRecorder:
    """Callback of the estimator: prints and stores each layer as it finishes.

    The estimator saves a layer before it calls back. A run killed in between lacks that layer's row and panel
    when it resumes; ``complete`` takes the row from the fitted model and computes the panel again.
    """

    def __init__(self, folder: Path, X: torch.Tensor, y: torch.Tensor, depth: int, resumed: bool):
        self.folder, self.X = folder, X
        self.rows = panel_rows(y.numpy())
        self.classes = y.numpy()[self.rows]
        self.panel_layers = panel_layers(depth)
        self.lines = _shown(folder / "layers.csv") if resumed else []
        self.panels = files.read_arrays(folder / "gram.npz") if resumed else {}

    def __call__(self, event: LayerEvent) -> None:
        """Print and store one layer."""
        values = row(event.layer, event.record)
        tqdm.write(line(values))
        self.lines.append(values)
        files.write_csv(self.folder / "layers.csv", self.lines)
        if event.layer + 1 in self.panel_layers:
            self.store(event.layer + 1, event.projected[torch.from_numpy(self.rows).to(event.projected.device)])

    def store(self, layer: int, projected: torch.Tensor) -> None:
        """Add a panel."""
        self.panels[panel_name(layer)] = panel(projected, self.classes)
        files.write_arrays(self.folder / "gram.npz", self.panels)

    def complete(self, model) -> list[dict[str, Any]]:
        """All rows, from the model; all panels on disk."""
        for layer in self.panel_layers:
            if panel_name(layer) not in self.panels:
                entering = model.transform(self.X[self.rows], layer - 1)
                root = linalg.psd_sqrt(model.agops_[layer - 1]).cpu()
                self.store(layer, normalise_rows(entering.cpu()) @ root)
        lines = [row(index, record) for index, record in enumerate(model.layers_)]
        shown = {int(values["layer"]) for values in self.lines}
        for values in lines:
            if values["layer"] not in shown:
                print(line(values))
        files.write_csv(self.folder / "layers.csv", lines)
        return lines


def _shown(path: Path) -> list[dict[str, Any]]:
    """Rows of a layers.csv that can be shown as lines."""
    rows = files.read_csv(path)
    try:
        for values in rows:
            line(values)
            int(values["layer"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it, the checkpoint has the layers") from error
    return rows


def panel_name(layer: int) -> str:
    """A panel's name in gram.npz."""
    return f"layer_{layer:02d}"


def read_panels(folder: Path) -> dict[int, np.ndarray]:
    """Gram matrices by layer, from a complete run's folder."""
    try:
        arrays = files.read_arrays(folder / "gram.npz")
    except ValueError as error:
        raise ValueError(f"{error}; remove {folder} to compute the run again") from error
    return {int(name.removeprefix("layer_")): array for name, array in sorted(arrays.items())}
