"""How a Deep RFM run is computed: one estimator, resumed after its last finished layer, with every layer measured.

Beside what every run has, its folder holds layers.csv (a line a layer), gram.npz (panels of the Gram figures) and
checkpoint/ (the estimator's, until the run is complete).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from fastagop import DeepRFMClassifier, NumericalWarning, datasets
from reproduce import files, layers
from reproduce.runs import Procedure
from reproduce.settings import KERNELS, RunLocation, Settings


class DeepRFMProcedure(Procedure):
    """Trains a DeepRFMClassifier, and prints each layer as it finishes."""

    parts = ("classes", "layers", "readout", "seconds")
    checkpoint = "checkpoint"
    prints_table = True

    def compute(self, settings: Settings, location: RunLocation, folder: Path) -> dict[str, Any]:
        """Readout, layers and, where the settings ask for them, accuracies."""
        X, y, *test = _data(settings, location)
        _mention_cost(settings, location)
        checkpoint = folder / self.checkpoint
        resumed = (checkpoint / "manifest.json").exists()
        recorder = layers.LayerRecorder(folder, X, y, settings.depth, resumed)
        print(self.table(recorder.lines), flush=True)
        model = _model(settings, location, checkpoint, recorder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)  # The table and the summary tell it of every layer.
            model.fit(X, y)
        record: dict[str, Any] = {"resumed": resumed, "classes": len(model.classes_)}
        record["layers"] = recorder.complete(model)
        readout = model.solution_
        record["readout"] = {name: getattr(readout, name) for name in ("residual", "jitter", "method", "seconds")}
        record["seconds"] = sum(row["seconds"] for row in record["layers"]) + readout.seconds
        record["peak_resident_bytes"] = files.peak_resident_bytes()
        if settings.score:
            record["accuracy"] = {"training": model.score(X, y), "test": model.score(*test)}
        return record

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The layers as lines below a header."""
        return "\n".join([layers.HEADER, *map(layers.line, rows)])

    def summary(self, record: dict[str, Any]) -> str:
        """Seconds, the largest residual and jitter, and accuracies where the run was scored."""
        jitters = [layers.number(row["jitter"]) for row in record["layers"]]
        residual = max(layers.number(row["residual"]) for row in record["layers"])
        altered = sum(jitter > 0 for jitter in jitters)
        jitter = f"jitter in {altered} layers, at most {max(jitters):.1e}" if altered else "no jitter"
        lines = [f"{record['seconds']:.1f} s; largest residual {residual:.1e}; {jitter}"]
        for split, accuracy in record.get("accuracy", {}).items():
            lines.append(f"accuracy on the {split} points: {accuracy:.4f}")
        return "\n".join(lines)


def _mention_cost(settings: Settings, location: RunLocation) -> None:
    if location.torch_device.type == "cpu" and settings.n > 10_000:
        work = settings.n**3 / 3e12
        print(f"on a CPU this takes long (each solve is {work:.0f} Tflop); --n 2000 shows the same shapes", flush=True)


def _model(
    settings: Settings, location: RunLocation, checkpoint: Path, recorder: layers.LayerRecorder
) -> DeepRFMClassifier:
    return DeepRFMClassifier(
        kernel=KERNELS[settings.kernel](settings.bandwidth),
        depth=settings.depth,
        features=settings.features,
        width=settings.width,
        feature_scale=settings.feature_scale,
        ridge=settings.ridge,
        agop_scale=settings.agop_scale,
        device=location.device,
        dtype=settings.dtype,
        random_state=settings.seed,
        checkpoint_dir=checkpoint,
        callbacks=(recorder,),
        verbose=1,
    )


def _data(settings: Settings, location: RunLocation) -> list[torch.Tensor]:
    """[X, y], and [X_test, y_test] after them where the run is scored."""
    X, y = location.load(settings, n=settings.n)
    test = location.load(settings, split="test") if settings.score else ()
    if settings.standardize:
        X, *shifted = datasets.standardize(X, *test[:1])
        test = (*shifted, *test[1:])
    return [X, y, *test]
