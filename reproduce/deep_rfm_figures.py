"""Figures 1 and 3 to 6 of the paper: which runs each is made of, and what is drawn from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reproduce import files, layers, plots, runs, settings
from reproduce.options import place
from reproduce.runs import Rows, Run
from reproduce.settings import FEATURES, Settings


@dataclass(frozen=True)
class Figure:
    """A figure's rows, drawn as "strips" or "curves"."""

    kind: str
    rows: Rows
    title: str


def _rows(features: str, *names: str) -> Rows:
    return tuple((name, features) for name in names)


_GRAM, _CURVES = "Gram matrices of $M_l^{1/2}X_l$ in Deep RFM", "Neural collapse in Deep RFM"
FIGURES = {
    "figure1": Figure("strips", (("cifar10", "cos"), ("mnist", "relu")), _GRAM),
    "figure3": Figure("curves", _rows("relu", "cifar10", "mnist", "svhn"), f"{_CURVES}, ReLU features"),
    "figure4": Figure("curves", _rows("cos", "cifar10", "mnist", "svhn"), f"{_CURVES}, cos features"),
    "figure5": Figure("strips", _rows("cos", "cifar10", "svhn", "mnist"), f"{_GRAM}, cos features"),
    "figure6": Figure("strips", _rows("relu", "cifar10", "svhn", "mnist"), f"{_GRAM}, ReLU features"),
}


def settings_of(row: tuple[str, str], args: argparse.Namespace) -> list[Settings]:
    """One Settings a seed."""
    names = "n depth width feature_scale ridge kernel bandwidth agop_scale dtype standardize"
    given = {name: getattr(args, name) for name in names.split()}
    return [settings.paper(*row, seed=seed, **given) for seed in dict.fromkeys(args.seeds)]


def figure(name: str, args: argparse.Namespace) -> int:
    """Compute what is missing, draw, and say what was written and which rows lack their data; 0.

    Raises:
        FileNotFoundError: where every row's data are missing.
    """
    plots.require()
    wanted = runs.rows_of(FIGURES[name].rows, args.dataset)
    rows, missing = runs.present(wanted, partial(settings_of, args=args), place(args), mention=args.n is None)
    done = [[runs.run(one, place(args)) for one in row] for row in rows]
    title = f"Figure {name.removeprefix('figure')}. {FIGURES[name].title}"
    written = draw(FIGURES[name].kind, done, title, args.out / name) + record(
        done, args.out / name, list(missing.values())
    )
    print(f"\nwrote {', '.join(map(str, written))}")
    for message in missing:
        print(f"not drawn: {message}")
    return 0


def draw(kind: str, done: Sequence[Sequence[Run]], title: str, stem: Path, formats=("png", "pdf")) -> list[Path]:
    """A row of the figure for each list of runs, which differ in their seed only."""
    maps = [FEATURES[name] for name in dict.fromkeys(row[0].settings.features for row in done)]
    titles = [row[0].settings.title for row in done]
    if kind == "curves":
        drawn = plots.curves([_curves(text, row) for text, row in zip(titles, done, strict=True)], title, maps[0])
    else:
        if len(maps) > 1:
            titles = [f"{row[0].settings.title}, {FEATURES[row[0].settings.features]}" for row in done]
        drawn = plots.strips([_strip(text, row[0]) for text, row in zip(titles, done, strict=True)], title)
    return plots.save(drawn, stem, formats)


def _strip(title: str, run: Run) -> plots.Strip:
    nc1 = {row["layer"]: layers.number(row["nc1_projected"]) for row in run.rows}
    return plots.Strip(title, run.panels(), nc1, run.record["classes"])


def _curves(title: str, row: Sequence[Run]) -> plots.Curves:
    def values(measure: str, stage: str) -> np.ndarray:
        return np.array([[layers.number(layer[f"{measure}_{stage}"]) for layer in run.rows] for run in row])

    nc1, nc2 = ({stage: values(measure, stage) for stage in layers.STAGES} for measure in ("nc1", "nc2"))
    return plots.Curves(title, nc1, nc2)


def record(done: Sequence[Sequence[Run]], stem: Path, missing: Iterable[str] = ()) -> list[Path]:
    """The figure's numbers in long format, and where they come from."""
    every = [run for row in done for run in row]
    table, source = stem.with_suffix(".csv"), stem.with_suffix(".json")
    files.write_csv(table, [line for run in every for line in _long(run)])
    kept = ("settings", "environment", "seconds", "readout", "accuracy")
    about = [{"folder": run.place, **{key: run.record[key] for key in kept if key in run.record}} for run in every]
    files.write_json(source, {"runs": about, "missing": list(missing), "drawn with": files.environment("cpu")})
    return [table, source]


def _long(run: Run) -> list[dict[str, Any]]:
    named = {"dataset": run.settings.name, "features": run.settings.features, "seed": run.settings.seed}
    return [
        {**named, "layer": row["layer"], "stage": stage, "nc1": row[f"nc1_{stage}"], "nc2": row[f"nc2_{stage}"]}
        for row in run.rows
        for stage in layers.STAGES
    ]
