"""Figures 2 and 7 to 12 of the paper: which networks each is made of, and what is drawn from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reproduce import files, network_plots, network_settings, plots, runs, training
from reproduce.layers import number
from reproduce.network_settings import HIDDEN, NETWORKS, NetworkSettings
from reproduce.options import place
from reproduce.runs import Rows, Run

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Figure:
    """A figure's rows, drawn as "splits" or "progress"."""

    kind: str
    rows: Rows
    title: str


def _rows(network: str) -> Rows:
    return tuple((dataset, network) for dataset in ("mnist", "cifar10", "svhn"))


_SPLITS, _PROGRESS = "NC1 at the parts of each layer", "Collapse, NFA and training loss"
FIGURES = {
    "figure2": Figure("splits", (("mnist", "mlp"), ("cifar10", "resnet")), f"{_SPLITS} of an MLP and ResNet18"),
    "figure7": Figure("splits", _rows("mlp"), f"{_SPLITS} of an MLP"),
    "figure8": Figure("splits", _rows("resnet"), f"{_SPLITS} of ResNet18's classifier"),
    "figure9": Figure("splits", _rows("vgg"), f"{_SPLITS} of VGG-11's classifier"),
    "figure10": Figure("progress", _rows("mlp"), f"{_PROGRESS} of an MLP"),
    "figure11": Figure("progress", _rows("resnet"), f"{_PROGRESS} of ResNet18"),
    "figure12": Figure("progress", _rows("vgg"), f"{_PROGRESS} of VGG-11"),
}


def settings_of(row: tuple[str, str], args: argparse.Namespace) -> list[NetworkSettings]:
    """One NetworkSettings a seed."""
    names = "n epochs learning_rate momentum init_scale width every standardize"
    given = {name: getattr(args, name) for name in names.split()}
    seeds = args.seeds or (SEEDS[:1] if args.quick else SEEDS)
    return [network_settings.paper(*row, quick=args.quick, seed=seed, **given) for seed in dict.fromkeys(seeds)]


def figure(name: str, args: argparse.Namespace) -> int:
    """Train what is missing, draw, and say what was written and which rows lack their data; 0.

    Raises:
        FileNotFoundError: where every row's data are missing.
    """
    plots.require()
    rows = runs.rows_of(FIGURES[name].rows, args.dataset)
    present, missing = runs.present(
        rows, partial(settings_of, args=args), place(args), mention=args.n is None and not args.quick
    )
    done = [[training.run(one, place(args)) for one in row] for row in present]
    courses = [_course(row) for row in done]
    title = f"Figure {name.removeprefix('figure')}. {FIGURES[name].title}"
    drawn = getattr(network_plots, FIGURES[name].kind)(courses, title)
    written = plots.save(drawn, args.out / name) + record(done, args.out / name, missing.values())
    for course in courses:
        print(f"\n{course.title}: {_lesson(course)}")
    print(f"\nwrote {', '.join(map(str, written))}")
    for message in missing:
        print(f"not drawn: {message}")
    return 0


def _course(row: Sequence[Run]) -> network_plots.Course:
    """Runs that differ in their seed only, as arrays over the hidden layers."""
    one = row[0].settings
    epochs = sorted({entry["epoch"] for entry in row[0].rows})

    def values(column: str) -> np.ndarray:
        cells = [[number(entry[column]) for entry in run.rows if entry["layer"] <= HIDDEN] for run in row]
        return np.array(cells).reshape(len(row), len(epochs), HIDDEN)

    nc1 = {stage: values(f"nc1_{stage}") for stage in training.STAGES}
    losses = np.array([run.record["losses"] for run in row])
    return network_plots.Course(f"{one.title}, {NETWORKS[one.network]}", np.array(epochs), nc1, values("nfa"), losses)


def _lesson(course: network_plots.Course) -> str:
    """What the last measurement says of the paper's two claims."""
    start, middle, end = (course.nc1[stage][:, -1].mean(0) for stage in training.STAGES)
    falls = [training.fall(a, b, c) for a, b, c in zip(start, middle, end, strict=True)]
    shares = [f"{100 * share:.0f}%" if share is not None else "no fall" for share in falls]
    nfa = course.nfa[:, -1]
    return (
        f"S V^T makes this part of each hidden layer's fall of NC1 (of its logarithm): {', '.join(shares)}; "
        f"NFA correlation over hidden layers and seeds {nfa.mean():.2f} +- {nfa.std():.2f} "
        "(paper, after its training: 0.74 +- 0.13 for the MLP on MNIST, 0.74 +- 0.17 for ResNet on CIFAR-10)"
    )


def record(done: Sequence[Sequence[Run]], stem: Path, missing: Iterable[str]) -> list[Path]:
    """The figure's numbers, a line a run, epoch and layer, and where they come from."""
    every = [run for row in done for run in row]
    table, source = stem.with_suffix(".csv"), stem.with_suffix(".json")
    files.write_csv(table, [line for run in every for line in _long(run)])
    kept = ("settings", "environment", "seconds", "accuracy", "resumed")
    about = [{"folder": run.place, **{key: run.record[key] for key in kept}} for run in every]
    files.write_json(source, {"runs": about, "missing": list(missing), "drawn with": files.environment("cpu")})
    return [table, source]


def _long(run: Run) -> list[dict[str, Any]]:
    named = {"dataset": run.settings.name, "network": run.settings.network, "seed": run.settings.seed}
    return [{**named, **{key: value for key, value in row.items() if key != "name"}} for row in run.rows]
