"""One Deep RFM run: settings in, a folder of records out; resumed where it stopped, reused once complete.

A run folder holds settings.json, layers.csv (a line a layer), gram.npz (panels of the Gram figures), checkpoint/
(the estimator's, until the run is complete) and, written last, record.json: with it the run is complete.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastagop import DeepRFMClassifier, NumericalWarning, datasets, locks
from reproduce import files, layers
from reproduce.settings import KERNELS, POINTS, Experiment, Place, Settings

_PARTS = ("classes", "layers", "readout", "seconds")  # of a record, as figures use it
Rows = tuple[tuple[str, str], ...]  # (data set, what is run on it)


@dataclass(frozen=True)
class Run:
    """A complete run; ``record`` is its record.json."""

    folder: Path
    settings: Any  # an Experiment
    record: dict[str, Any]

    @property
    def place(self) -> str:
        """The folder as result files name it: below --out, wherever that lies."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The layers, as in layers.csv."""
        return self.record["layers"]

    def panels(self) -> dict[int, np.ndarray]:
        """Gram matrices by layer."""
        try:
            arrays = files.read_arrays(self.folder / "gram.npz")
        except ValueError as error:
            raise ValueError(f"{error}; remove {self.folder} to compute the run again") from error
        return {int(name.removeprefix("layer_")): array for name, array in sorted(arrays.items())}


def check_data(settings: Experiment, place: Place) -> None:
    """Raise what loading raises, before any hours are spent; a complete run needs no data."""
    if not (place.folder(settings) / "record.json").exists():
        place.load(settings, n=1)


def rows_of(rows: Rows, asked: Sequence[str]) -> Rows:
    """A figure's rows (data set, kind), or those of the data sets asked for; one it lacks gets each of its kinds."""
    kinds = dict.fromkeys(kind for _, kind in rows)
    own = [[row for row in rows if row[0] == dataset] or [(dataset, kind) for kind in kinds] for dataset in asked]
    return tuple(row for group in own for row in group) or rows


def present(rows: Rows, settings_of: Callable, place: Place, mention: bool) -> tuple[list[list[Any]], dict[str, str]]:
    """(settings of the rows whose data are there, what is missing for the others); may mention a smaller n.

    What is missing is said twice: for the screen, and without this machine's folders for a result file.
    """
    found, missing = [], {}
    for row in rows:
        try:
            asked = settings_of(row)
            for one in asked:
                check_data(one, place)
        except (FileNotFoundError, ImportError) as error:
            message = str(error).replace("pass download=True", "pass --download")
            root = str(Path(place.data_root or "data").resolve())
            missing[message] = message.replace(root, "the data root").replace(row[0], Path(row[0]).name)
            continue
        found.append(asked)
        if mention and asked[0].n < POINTS:
            print(f"{row[0]} has {asked[0].n} training points, not the paper's {POINTS}: all of them are used")
    if not found:
        raise FileNotFoundError("; ".join(missing))
    for message in missing:
        print(f"missing: {message}", flush=True)
    return found, missing


def run(settings: Settings, place: Place) -> Run:
    """Compute, resume or reuse a run, and print its table."""
    folder = place.folder(settings)
    print(f"\n{settings}\n{folder}")
    with alone(folder):
        if (folder / "record.json").exists():
            print("complete, nothing to compute")
            done = Run(folder, settings, files.read_record(folder / "record.json", settings.recorded, _PARTS))
            print("\n".join([layers.HEADER, *map(layers.line, done.rows)]))
        else:
            done = Run(folder, settings, _compute(settings, place, folder))
    _summarise(done)
    return done


def _compute(settings: Settings, place: Place, folder: Path) -> dict[str, Any]:
    X, y, *test = _data(settings, place)
    _mention_cost(settings, place)
    checkpoint = folder / "checkpoint"
    resumed = (checkpoint / "manifest.json").exists()
    recorder = layers.Recorder(folder, X, y, settings.depth, resumed)
    print("\n".join([layers.HEADER, *map(layers.line, recorder.lines)]), flush=True)
    record: dict[str, Any] = {"settings": settings.recorded, "environment": files.environment(place.device)}
    files.write_json(folder / "settings.json", record)
    model = _model(settings, place, checkpoint, recorder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # the table and the summary say it of every layer
        model.fit(X, y)
    record |= {"resumed": resumed, "classes": len(model.classes_), "layers": recorder.complete(model)}
    readout = model.solution_
    record["readout"] = {name: getattr(readout, name) for name in ("residual", "jitter", "method", "seconds")}
    record["seconds"] = sum(row["seconds"] for row in record["layers"]) + readout.seconds
    if settings.score:
        record["accuracy"] = {"training": model.score(X, y), "test": model.score(*test)}
    files.write_record(folder / "record.json", record)
    if not place.keep_checkpoint:
        shutil.rmtree(checkpoint)
    return record


def _mention_cost(settings: Settings, place: Place) -> None:
    on_cpu = place.device == "cpu" or (place.device == "auto" and not torch.cuda.is_available())
    if on_cpu and settings.n > 10_000:
        work = settings.n**3 / 3e12
        print(f"on a CPU this takes long (each solve is {work:.0f} Tflop); --n 2000 shows the same shapes", flush=True)


def _model(settings: Settings, place: Place, checkpoint: Path, recorder: layers.Recorder) -> DeepRFMClassifier:
    return DeepRFMClassifier(
        kernel=KERNELS[settings.kernel](settings.bandwidth),
        depth=settings.depth,
        features=settings.features,
        width=settings.width,
        feature_scale=settings.feature_scale,
        ridge=settings.ridge,
        agop_scale=settings.agop_scale,
        device=place.device,
        dtype=settings.dtype,
        random_state=settings.seed,
        checkpoint_dir=checkpoint,
        callbacks=(recorder,),
        verbose=1,
    )


def _data(settings: Settings, place: Place) -> list[torch.Tensor]:
    """[X, y], and [X_test, y_test] after them where the run is scored."""
    X, y = place.load(settings, n=settings.n)
    test = place.load(settings, split="test") if settings.score else ()
    if settings.standardize:
        X, *shifted = datasets.standardize(X, *test[:1])
        test = (*shifted, *test[1:])
    return [X, y, *test]


def _summarise(done: Run) -> None:
    jitters = [layers.number(row["jitter"]) for row in done.rows]
    residual = max(layers.number(row["residual"]) for row in done.rows)
    altered = sum(jitter > 0 for jitter in jitters)
    jitter = f"jitter in {altered} layers, at most {max(jitters):.1e}" if altered else "no jitter"
    print(f"{done.record['seconds']:.1f} s; largest residual {residual:.1e}; {jitter}")
    for split, accuracy in done.record.get("accuracy", {}).items():
        print(f"accuracy on the {split} points: {accuracy:.4f}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second process from the same run; the system drops the lock with its holder.

    Raises:
        fastagop.locks.FolderInUse: the process that computes the run is stopped.
    """
    with locks.waiting(folder, lambda line: print(line, flush=True)):
        yield
