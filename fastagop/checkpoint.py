"""Finished layers of a Deep RFM on disk, so that an interrupted fit resumes where it stopped.

A checkpoint folder holds ``manifest.json`` (settings, data fingerprint, seeds, versions, checksums of the finished
layers) and one safetensors file a layer; the features entering the next layer are kept for the newest layer only.
Every file is written beside its place and renamed, the manifest last: whatever moment a run is killed at, the
manifest names complete files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fastagop import storage
from fastagop.deep_rfm import Layer, Settings

_LAYER, _FEATURES = "Deep RFM layer", "Deep RFM layer's features"


class Checkpoint:
    """A checkpoint folder bound to one fit: what is trained, its settings, data and seeds.

    Args:
        folder: made where it does not exist. task: "classification" or "regression".
        settings: of the fit. X, Y: its data as the first layer sees them.
        seeds: of the layers, or None where any will do: those of an earlier run are then kept.

    Raises:
        ValueError: the folder belongs to another fit (naming what differs), or a file is damaged.
    """

    def __init__(
        self, folder, task: str, settings: Settings, X: torch.Tensor, Y: torch.Tensor, seeds: list[int] | None
    ):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint_dir must be a folder, but {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "manifest.json"
        self._like = X
        wanted = {
            "format": storage.FORMAT,
            "task": task,
            "settings": {**dataclasses.asdict(settings), "kernel": repr(settings.kernel)},
            "data": storage.fingerprint({"X": X, "Y": Y}),
            "dtype": str(X.dtype).removeprefix("torch."),
        }
        if seeds is not None:
            wanted["seeds"] = seeds
        if self._path.exists():
            self._manifest = self._trusted(storage.read_json, self._path)
            self._refuse_other(wanted)
        else:
            self._manifest = {**wanted, "versions": storage.versions(), "layers": [], "features": None}

    @property
    def seeds(self) -> list[int] | None:
        """Seeds of the run that started this checkpoint, where there is one."""
        return self._manifest.get("seeds")

    def start(self, seeds: list[int]) -> None:
        """Fix the seeds of a fit that was given none."""
        self._manifest.setdefault("seeds", seeds)

    def load(self) -> tuple[list[Layer], torch.Tensor | None]:
        """(finished layers, features entering the next one); verifies every checksum."""
        layers = []
        for index, digest in enumerate(self._manifest["layers"]):
            tensors, words = self._trusted(storage.read, self._file("layer", index), _LAYER, digest)
            layers.append(storage.unpack_layer(tensors, words, self._like.device))
        if not layers:
            return [], None
        newest, digest = self._file("features", len(layers) - 1), self._manifest["features"]
        tensors, _ = self._trusted(storage.read, newest, _FEATURES, digest)
        self._forget(newest)
        return layers, tensors["features"].to(self._like)

    def save(self, index: int, layer: Layer, features: torch.Tensor) -> None:
        """Add a finished layer; the features of the layer before are dropped once nothing names them."""
        tensors, words = storage.pack_layer(layer)
        digest = storage.write(self._file("layer", index), _LAYER, tensors, words)
        newest = self._file("features", index)
        self._manifest["features"] = storage.write(newest, _FEATURES, {"features": features}, {})
        self._manifest["layers"].append(digest)
        storage.write_json(self._path, self._manifest)
        self._forget(newest)

    def _file(self, what: str, index: int) -> Path:
        return self.folder / f"{what}-{index:03d}.safetensors"

    def _forget(self, newest: Path) -> None:
        """Remove features that the manifest no longer names, those of a killed run too."""
        for path in self.folder.glob("features-*.safetensors"):
            if path != newest:
                path.unlink(missing_ok=True)

    def _trusted(self, read, path: Path, *args):
        """What a reader makes of a file; where it cannot be trusted, say what to do about it."""
        try:
            return read(path, *args)
        except (ValueError, FileNotFoundError) as error:
            what = f"checkpoint file {path} is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise ValueError(f"checkpoint_dir: {what}. Remove the folder to start again") from error

    def _refuse_other(self, wanted: dict) -> None:
        for key, value in wanted.items():
            found = self._manifest.get(key)
            if found == value:
                continue
            if key == "settings":
                old = found or {}
                names = [name for name in {**old, **value} if old.get(name) != value.get(name)]
                what = "; ".join(f"{name} was {old.get(name)!r}, now {value.get(name)!r}" for name in names)
            else:
                what = f"the {key} differ" if key in ("data", "seeds") else f"{key} was {found!r}, now {value!r}"
            raise ValueError(
                f"checkpoint_dir {self.folder} belongs to another fit: {what}. Use another folder, or remove this one"
            )
