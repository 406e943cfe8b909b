"""Many rows on the CPU: one RFM, a tree of RFMs, xRFM with its defaults and as a tree of the same leaves, and boosting.

Score, seconds and the peak memory of the fit, each contender once. Beyond ONE rows only those run that take minutes.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import clock, files
from bench import tables_contenders as learners
from bench.tables_cpu import attempt
from bench.tables_data import CLASSIFICATION, Table

ROWS = (10_000, 100_000)
ONE = 20_000  # rows up to which everybody runs
TESTED = 5000
FEATURES, LEAF = 20, 4000


CONTENDERS: dict[str, tuple[str, Any, int]] = {  # name: (label, builder, rows at most)
    "fastagop": ("fastagop, scaled, early stopping", learners.CONTENDERS["fastagop"], ONE),
    "fastagop-tree": ("fastagop, tree", learners.ours("RFMTree{}", random_state=0, device="cpu"), 10**9),
    "xrfm": ("xRFM, standardised", learners.xrfm(scaled=True), ONE),
    "xrfm-tree": (f"xRFM, leaves of {LEAF} rows, standardised", learners.xrfm(scaled=True, leaf=LEAF), ONE),
    "boosting": ("HistGradientBoosting", learners.CONTENDERS["boosting"], 10**9),
}


def table_of(n: int) -> Table:
    """n rows to learn from and TESTED beside: clusters of two classes on the corners of a cube, labels partly wrong."""
    from sklearn.datasets import make_classification

    options = {"n_informative": 6, "n_redundant": 4, "n_clusters_per_class": 8, "flip_y": 0.02, "class_sep": 1.0}
    X, y = make_classification(n + TESTED, FEATURES, random_state=0, **options)
    return Table(np.asarray(X), np.asarray(y), CLASSIFICATION)


def measure(n: int, contenders: Mapping[str, tuple], threads: int) -> list[dict]:
    """A row a contender: its score, seconds and peak, or its error."""
    data, rows = table_of(n), []
    train, test = np.arange(n), np.arange(n, n + TESTED)
    for name, (label, build, most) in contenders.items():
        if n > most:
            continue
        attempt(build, threads, data, train[:100], test[:100])  # libraries are loaded and threads started
        gc.collect()
        found: list[dict] = []
        run = functools.partial(attempt, build, threads, data, train, test)
        peak = clock.peak_bytes(lambda run=run, found=found: found.append(run()), clock.CPU)
        rows.append({"n": n, "d": FEATURES, "contender": name, "label": label, "peak_bytes": peak, **found[0]})
        print(table(rows[-1:]).split("\n")[-1], flush=True)
    return rows


def main(out: Path, n: int | None = None) -> None:
    """Measure every number of rows, or one; print the table, write the result file."""
    rows = [row for count in ([n] if n else ROWS) for row in measure(count, CONTENDERS, torch.get_num_threads())]
    files.write_result(out, {"case": {"d": FEATURES, "tested": TESTED, "leaf": LEAF}, "rows": rows})
    print(f"\n{table(rows)}")


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"n": "{n}", " ": "{label}", "accuracy": "{found}", "log loss": "{loss}"}
    columns |= {"fit, seconds": "{took}", "predictions, seconds": "{said}", "peak memory": "{peak}"}
    return files.markdown(columns, [row | _words(row) for row in rows])


def _words(row: dict) -> dict:
    if "error" in row:
        return {"found": row["error"], "loss": "", "took": "", "said": ""}
    took, said = f"{row['fit_seconds']:.3g}", f"{row['predict_seconds']:.2g}"
    return {"found": f"{row['score']:.4f}", "loss": f"{row['log_loss']:.3f}", "took": took, "said": said}
