"""Figures 1 and 3 to 6 of the paper: which runs each is made of, and what is drawn from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reproduce import files, layers, plots, runs, settings
from reproduce.options import place
from reproduce.runs import Run
from reproduce.settings import FEATURES, POINTS, Settings

Rows = tuple[tuple[str, str], ...]  # (data set, features)


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


def rows_of(name: str, asked: Sequence[str]) -> Rows:
    """The figure's rows, or those of the data sets asked for; one it lacks gets each of the figure's feature maps."""
    rows = FIGURES[name].rows
    maps = dict.fromkeys(features for _, features in rows)
    own = [[row for row in rows if row[0] == dataset] or [(dataset, m) for m in maps] for dataset in asked]
    return tuple(row for group in own for row in group) or rows


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
    rows, missing = _present(rows_of(name, args.dataset), args)
    done = [[runs.run(one, place(args)) for one in row] for row in rows]
    title = f"Figure {name.removeprefix('figure')}. {FIGURES[name].title}"
    written = draw(FIGURES[name].kind, done, title, args.out / name) + record(done, args.out / name, missing)
    print(f"\nwrote {', '.join(map(str, written))}")
    for message in missing:
        print(f"not drawn: {message}")
    return 0


def _present(rows: Rows, args: argparse.Namespace) -> tuple[list[list[Settings]], list[str]]:
    """Settings of the rows whose data are there, and what is missing for the others."""
    present, missing = [], {}
    for row in rows:
        try:
            asked = settings_of(row, args)
            for one in asked:
                runs.check_data(one, place(args))
        except (FileNotFoundError, ImportError) as error:
            missing[str(error).replace("pass download=True", "pass --download")] = None
            continue
        present.append(asked)
        if args.n is None and asked[0].n < POINTS:
            print(f"{row[0]} has {asked[0].n} training points, not the paper's {POINTS}: all of them are used")
    if not present:
        raise FileNotFoundError("; ".join(missing))
    for message in missing:
        print(f"missing: {message}", flush=True)
    return present, list(missing)


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


def record(done: Sequence[Sequence[Run]], stem: Path, missing: Sequence[str] = ()) -> list[Path]:
    """The figure's numbers in long format, and where they come from."""
    every = [run for row in done for run in row]
    table, source = stem.with_suffix(".csv"), stem.with_suffix(".json")
    files.write_csv(table, [line for run in every for line in _long(run)])
    kept = ("settings", "environment", "seconds", "readout", "accuracy")
    about = [{"folder": run.folder, **{key: run.record[key] for key in kept if key in run.record}} for run in every]
    files.write_json(source, {"runs": about, "missing": list(missing), "drawn with": files.environment("cpu")})
    return [table, source]


def _long(run: Run) -> list[dict[str, Any]]:
    named = {"dataset": run.settings.name, "features": run.settings.features, "seed": run.settings.seed}
    return [
        {**named, "layer": row["layer"], "stage": stage, "nc1": row[f"nc1_{stage}"], "nc2": row[f"nc2_{stage}"]}
        for row in run.rows
        for stage in layers.STAGES
    ]
