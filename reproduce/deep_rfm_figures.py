"""Figures 1 and 3 to 6 of the paper: which Deep RFM runs each is made of, and what is drawn from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce import layers, options, plots, settings
from reproduce.deep_rfm_runs import DeepRFMProcedure
from reproduce.figures import Family, Figure, Row, Runs
from reproduce.runs import Run
from reproduce.settings import FEATURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def draw(kind: str, done: Runs, title: str) -> Drawing:
    """The figure as "strips" or "curves", with a row for each list of runs."""
    feature_maps = [FEATURES[name] for name in dict.fromkeys(row[0].settings.features for row in done)]
    titles = [row[0].settings.title for row in done]
    if kind == "curves":
        curves = [_curves(text, row) for text, row in zip(titles, done, strict=True)]
        return plots.curves(curves, title, feature_maps[0])
    if len(feature_maps) > 1:
        titles = [f"{row[0].settings.title}, {FEATURES[row[0].settings.features]}" for row in done]
    return plots.strips([_strip(text, row[0]) for text, row in zip(titles, done, strict=True)], title)


def _strip(title: str, run: Run) -> plots.Strip:
    nc1 = {row["layer"]: layers.number(row["nc1_projected"]) for row in run.rows}
    return plots.Strip(title, layers.read_panels(run.folder), nc1, run.record["classes"])


def _curves(title: str, row: Sequence[Run]) -> plots.Curves:
    def values(measure: str, stage: str) -> np.ndarray:
        return np.array([[layers.number(layer[f"{measure}_{stage}"]) for layer in run.rows] for run in row])

    nc1, nc2 = ({stage: values(measure, stage) for stage in layers.STAGES} for measure in ("nc1", "nc2"))
    return plots.Curves(title, nc1, nc2, row[0].settings.dtype)


def csv_lines(run: Run) -> list[dict[str, Any]]:
    """A run's lines of the figure's .csv: one a layer and stage."""
    columns = {"dataset": run.settings.name, "features": run.settings.features, "seed": run.settings.seed}
    return [
        {**columns, "layer": row["layer"], "stage": stage, "nc1": row[f"nc1_{stage}"], "nc2": row[f"nc2_{stage}"]}
        for row in run.rows
        for stage in layers.STAGES
    ]


def record_of(lines: list[dict[str, str]]) -> dict[str, Any]:
    """The layers of one run's ``csv_lines``."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        row = found.setdefault(int(line["layer"]), {"layer": int(line["layer"])})
        row |= {f"{measure}_{line['stage']}": line[measure] for measure in ("nc1", "nc2")}
    return {"layers": list(found.values())}


def lessons(done: Runs) -> list[str]:
    """For each row, what its first run says of the paper's two claims."""
    return [f"{row[0].settings.title}, {FEATURES[row[0].settings.features]}: {lesson(row[0].rows)}" for row in done]


def lesson(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far M^(1/2) brings NC1 and NC2, and in how many layers the random features raise NC1 again."""
    nc1, nc2 = ([layers.number(row[f"{measure}_projected"]) for row in rows] for measure in ("nc1", "nc2"))
    raised = sum(layers.number(row["nc1_features"]) > at for row, at in zip(rows, nc1, strict=True))
    return (
        f"NC1 after M^(1/2) goes from {nc1[0]:.2g} to {nc1[-1]:.2g} in {len(rows)} layers, NC2 from {nc2[0]:.2g} to "
        f"{nc2[-1]:.2g}; the random features raise NC1 in {raised} of {len(rows)} layers"
    )


def check(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Refuse a scale of cos features where no row has any."""
    if args.feature_scale is not None and all(features != "cos" for _, features in rows):
        raise ValueError("--feature-scale must not be given here: it is that of cos features, and all rows have ReLU's")


def _rows(features: str, *datasets: str) -> tuple[Row, ...]:
    return tuple((dataset, features) for dataset in datasets)


FAMILY = Family(
    procedure=DeepRFMProcedure(),
    add_options=options.add_figure,
    paper=settings.paper,
    options=(
        "quick",
        "width",
        "feature_scale",
        "n",
        "depth",
        "kernel",
        "bandwidth",
        "ridge",
        "agop_scale",
        "dtype",
        "standardize",
    ),
    seeds=(0,),
    draw=draw,
    csv_lines=csv_lines,
    record_of=record_of,
    settings=settings.Settings,
    recorded=("settings", "environment", "seconds", "peak_resident_bytes", "readout", "accuracy", "layers"),
    lessons=lessons,
    check=check,
)
_GRAM, _CURVES = "Gram matrices of $M_l^{1/2}X_l$ in Deep RFM", "Neural collapse in Deep RFM"
_SIMPLEX = (
    "The Gram matrix of the centred, normalised points sharpens layer by layer; in the last panel it is 1 within "
    "classes and -1/(K-1) between them, a simplex"
)
_FALL = (
    "NC1 and NC2 fall over the layers, NC1 about exponentially; all of the fall of NC1 happens at M^(1/2), while "
    "random {} features raise it a little"
)
FIGURES = {
    "figure1": Figure(FAMILY, "strips", (("cifar10", "cos"), ("mnist", "relu")), _GRAM, _SIMPLEX),
    "figure3": Figure(
        FAMILY,
        "curves",
        _rows("relu", "cifar10", "mnist", "svhn"),
        f"{_CURVES}, ReLU features",
        _FALL.format("ReLU"),
    ),
    "figure4": Figure(
        FAMILY, "curves", _rows("cos", "cifar10", "mnist", "svhn"), f"{_CURVES}, cos features", _FALL.format("cos")
    ),
    "figure5": Figure(FAMILY, "strips", _rows("cos", "cifar10", "svhn", "mnist"), f"{_GRAM}, cos features", _SIMPLEX),
    "figure6": Figure(FAMILY, "strips", _rows("relu", "cifar10", "svhn", "mnist"), f"{_GRAM}, ReLU features", _SIMPLEX),
}
