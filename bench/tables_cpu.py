"""Learners of small tables beside each other on the CPU: score, log loss and seconds by cross-validation, in one run.

In every fold all contenders take their turn, so that the drift of a shared machine meets all of them. The gap of a
contender on a table is the best contender's score less its own. Log losses are of probabilities of at least CLIP.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, log_loss, r2_score
from sklearn.model_selection import KFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from bench import drawing, files
from bench.contenders import Unable
from bench.tables_contenders import CONTENDERS, HELD_OUT, LABELS, Builder
from bench.tables_data import CLASSIFICATION, QUICK, SETS, Table
from bench.tables_summary import gaps, scores, summary, table
from fastagop import commands

FOLDS, QUICK_FOLDS = 5, 2
CLIP = 1e-6
_FEW = 60  # rows of the fits that come before all others


def main(out: Path, threads: int | None = None, only: list[str] | None = None, quick: bool | None = None) -> None:
    """Measure, print scores and summary, write the result file and its plot; ``quick``: few tables, folds, no plot."""
    folds = QUICK_FOLDS if quick else FOLDS
    builders = {name: CONTENDERS[name] for name in CONTENDERS if only is None or name in only}
    with _threads(threads or torch.get_num_threads()) as count:
        rows = measure({name: SETS[name] for name in (QUICK if quick else SETS)}, builders, folds, count)
        about = {"folds": folds, "held out": HELD_OUT, "clip": CLIP, "contenders": {n: LABELS[n] for n in builders}}
        files.write_result(out, {"case": about, "summary": summary(rows), "rows": rows})
    print(f"\n{scores(rows)}\n\n{table(rows)}")
    if not quick:
        plot(rows, out.with_suffix(".png"))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[int]:
    """So many for torch, for the libraries of NumPy and SciPy, and for scikit-learn's own loops."""
    with commands.threads(count), threadpool_limits(count):
        yield count


def measure(
    sets: Mapping[str, Callable[[], Table]], builders: Mapping[str, Builder], folds: int, threads: int
) -> list[dict]:
    """One row a table and contender: means over the folds, total seconds; or the first error."""
    rows, warm = [], set()
    for name, make in sets.items():
        data = make()
        splits = list(_splits(data, folds))
        if data.task not in warm:  # libraries loaded and threads started: none of that is counted
            warm.add(data.task)
            for build in builders.values():
                attempt(build, threads, data, splits[0][0][:_FEW], splits[0][1])
        tried: dict[str, list[dict]] = {contender: [] for contender in builders}
        for train, test in splits:
            for contender, build in builders.items():
                tried[contender].append(attempt(build, threads, data, train, test))
        made = [{"set": name, **data.facts, "contender": who, **_together(tries)} for who, tries in tried.items()]
        for row in made:
            print(_line(row), flush=True)
        rows += made
    return rows


def _splits(data: Table, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows for every contender and in every run, in random order."""
    kind = StratifiedKFold if data.task == CLASSIFICATION else KFold
    yield from kind(folds, shuffle=True, random_state=0).split(data.X, data.y)


def attempt(build: Builder, threads: int, data: Table, train: np.ndarray, test: np.ndarray) -> dict:
    """Score, log loss and seconds of one fit, or its error: a contender that fails is a row, not the end."""
    said = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        warnings.simplefilter("always")
        try:
            return _scored(build(data.task, threads), data, train, test) | {"warnings": len(warned)}
        except Unable as reason:
            return {"error": str(reason)}
        except Exception as error:  # whatever a contender raises is what its row says
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _scored(model: Any, data: Table, train: np.ndarray, test: np.ndarray) -> dict:
    start = time.perf_counter()
    model.fit(data.X[train], data.y[train])
    fitted = time.perf_counter()
    found = np.asarray(model.predict(data.X[test]))
    seconds = {"fit_seconds": fitted - start, "predict_seconds": time.perf_counter() - fitted}
    if data.task != CLASSIFICATION:
        return {"score": float(r2_score(data.y[test], found)), "log_loss": None, **seconds}
    likely = np.clip(np.asarray(model.predict_proba(data.X[test]), dtype=np.float64), CLIP, None)
    loss = log_loss(data.y[test], likely / likely.sum(1, keepdims=True), labels=np.unique(data.y))
    return {"score": float(accuracy_score(data.y[test], found)), "log_loss": float(loss), **seconds}


def _together(tries: list[dict]) -> dict:
    """The folds' results as one row."""
    failed = next((found["error"] for found in tries if "error" in found), None)
    if failed is not None:
        return {"error": failed}
    losses = [found["log_loss"] for found in tries if found["log_loss"] is not None]
    return {
        "score": float(np.mean([found["score"] for found in tries])),
        "scores": [found["score"] for found in tries],
        "log_loss": float(np.mean(losses)) if losses else None,
        **{key: sum(found[key] for found in tries) for key in ("fit_seconds", "predict_seconds", "warnings")},
    }


def _line(row: dict) -> str:
    place = f"{row['set']}, {LABELS[row['contender']]}: "
    if "error" in row:
        return place + row["error"]
    return place + f"{row['score']:.4f}, fits {row['fit_seconds']:.2f} s, predictions {row['predict_seconds']:.2f} s"


def plot(rows: list[dict], path: Path) -> None:
    """Gaps by contender with a dot a table, and seconds against the mean gap; a colour is a house."""
    measured = sorted((one for one in summary(rows) if one["sets"]), key=lambda one: -one["gap"])
    figure = drawing.new(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    for height, one in enumerate(measured):
        found = [gap for (_, who), gap in gaps(rows).items() if who == one["contender"]]
        color = drawing.house(one["contender"])
        left.plot(found, [height] * len(found), "o", color=color, alpha=0.45, markersize=5)
        left.plot(one["gap"], height, "|", color="black", markersize=18, markeredgewidth=2)
        place, rank = (one["seconds"], one["gap"]), len(measured) - height
        right.plot(*place, "o", color=color, markersize=14)
        right.annotate(str(rank), place, color="white", fontsize=9, weight="bold", ha="center", va="center")
    named = [f"{LABELS[one['contender']]}  {len(measured) - height}" for height, one in enumerate(measured)]
    left.set_yticks(range(len(measured)), named)
    left.set_xscale("symlog", linthresh=0.01)
    left.set(xlabel="gap to the best score of a table; the bar is the mean", title="A dot is a table")
    left.set_xlim(-0.001, 1.5 * max([0.01, *gaps(rows).values()]))
    right.set_xscale("log")
    right.set_yscale("symlog", linthresh=0.01)
    right.set(xlabel="seconds of all fits and predictions", ylabel="mean gap", title="Time and gap, numbers as beside")
    right.set_ylim(0.0, 1.5 * max([0.01, *(one["gap"] for one in measured)]))
    seconds = [one["seconds"] for one in measured]
    low, high = min(seconds) / 1.3, max(seconds) * 1.3
    right.set_xlim(low, high)
    ticks = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    drawing.named_ticks(right.xaxis, [tick for tick in ticks if low <= tick <= high])
    print(f"written to {drawing.save(figure, path)}")
