"""Finished layers of a Deep RFM on disk, so that an interrupted fit resumes where it stopped.

A checkpoint folder holds ``manifest.json`` (settings, data fingerprint, seeds, versions, checksums of the finished
layers) and one safetensors file a layer; the features entering the next layer are kept for the newest layer only.
Every file is written beside its place and renamed, the manifest last: whatever moment a run is killed at, the
manifest names complete files. One fit at a time works in a folder: it holds the folder's lock until it is done.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch

from fastagop.deep_rfm.layer import Layer, Settings
from fastagop.deep_rfm.layer_files import pack_layer, unpack_layer
from fastagop.estimators import files as storage
from fastagop.estimators.base import Training
from fastagop.kernels import atomic_files
from fastagop.kernels.precision import dtype_name
from fastagop.locks import Lock

_LAYER, _FEATURES = "Deep RFM layer", "Deep RFM layer's features"
_FORMAT = "3"  # This is the folder's format; that of a file is storage.FORMAT.
_MEASURED = ("seconds", "stages", "peak_bytes")  # These parts of a record differ between two runs of the same fit.


class Checkpoint:
    """A checkpoint folder bound to one fit: what is trained, its settings, data and seeds.

    Args:
        folder: made where it does not exist.
        settings: of the fit.
        data: the fit's data as its first layer sees them; without classes the task is a regression.
        seeds: of the layers, or None where any will do: those of an earlier run are then kept.

    Raises:
        ValueError: the folder belongs to another fit (naming the difference), or a file is damaged.
        fastagop.locks.FolderInUse: another fit works in it (naming its process). OSError: a file cannot be read.
    """

    def __init__(self, folder, settings: Settings, data: Training, seeds: list[int] | None):
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"checkpoint_dir must be the path of a folder, got {folder!r}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint_dir must be a folder, but {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "manifest.json"
        self._like = data.X
        tensors = {"X": data.X, "Y": data.Y} | ({} if data.weights is None else {"weights": data.weights})
        identity = {
            "format": _FORMAT,
            "task": "regression" if data.classes is None else "classification",
            "settings": _identity(settings),
            "data": storage.fingerprint(tensors),
            "dtype": dtype_name(data.X.dtype),
        }
        if seeds is not None:
            identity["seeds"] = seeds
        self._lock = Lock(self.folder, "checkpoint_dir")
        try:
            self._open(identity)
        except BaseException:
            self.close()
            raise

    def _open(self, identity: dict) -> None:
        """Read the manifest that is there, or begin one."""
        atomic_files.remove_left_behind(self.folder)
        try:
            self._manifest = self._trusted(self._path, _manifest)
        except FileNotFoundError:
            self._manifest = {**identity, "versions": storage.versions(), "layers": [], "features": None}
        else:
            self._refuse_other(identity)

    def close(self) -> None:
        """Let another fit have the folder."""
        self._lock.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def seeds(self) -> list[int] | None:
        """Seeds of the run that started this checkpoint, where there is one."""
        return self._manifest.get("seeds")

    def start(self, seeds: list[int]) -> None:
        """Fix the seeds of a fit that has none yet."""
        self._manifest.setdefault("seeds", seeds)

    def load(self) -> tuple[list[Layer], torch.Tensor | None]:
        """(finished layers, features entering the next one); verifies every checksum, and gives up on an error."""
        try:
            return self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> tuple[list[Layer], torch.Tensor | None]:
        layers = []
        for index, digest in enumerate(self._manifest["layers"]):
            path = self._file("layer", index)
            tensors, metadata = self._contents(path, _LAYER, digest)
            layers.append(self._trusted(path, lambda _, t=tensors, m=metadata: unpack_layer(t, m, self._like.device)))
        if not layers:
            return [], None
        newest = self._file("features", len(layers) - 1)
        tensors, _ = self._contents(newest, _FEATURES, self._manifest["features"])
        features = self._trusted(newest, lambda _: tensors["features"].to(self._like))
        self._forget(newest)
        return layers, features

    def save(self, index: int, layer: Layer, features: torch.Tensor) -> None:
        """Add a finished layer; the features of the layer before are dropped once nothing names them."""
        tensors, metadata = pack_layer(layer)
        storage.write(self._file("layer", index), _LAYER, tensors, metadata)
        newest = self._file("features", index)
        storage.write(newest, _FEATURES, {"features": features}, {})
        self._manifest["features"] = _digest({"features": features}, {})
        self._manifest["layers"].append(_digest(tensors, metadata))
        storage.write_json(self._path, self._manifest)
        self._forget(newest)

    def _file(self, stem: str, index: int) -> Path:
        """The path of a layer's file of a kind, "layer" or "features"."""
        return self.folder / f"{stem}-{index:03d}.safetensors"

    def _forget(self, newest: Path) -> None:
        """Remove features that the manifest no longer names, those of a killed run too."""
        for path in self.folder.glob("features-*.safetensors"):
            if path != newest:
                path.unlink(missing_ok=True)

    def _contents(self, path: Path, kind: str, digest: str) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, description) of the file that the manifest names by its digest."""

        def read(path: Path):
            tensors, metadata = storage.read(path, kind)
            if _digest(tensors, metadata) != digest:
                raise ValueError(f"{path} was replaced: it is whole, but not the file that was written here")
            return tensors, metadata

        try:
            return self._trusted(path, read)
        except FileNotFoundError as error:
            raise ValueError(
                f"checkpoint_dir: checkpoint file {path} is missing. Remove the folder to start again"
            ) from error

    def _trusted(self, path: Path, read):
        """The object that a reader makes of a file; an error says how to mend a file that cannot be trusted."""
        try:
            with storage.restoring(path):
                return read(path)
        except ValueError as error:
            raise ValueError(f"checkpoint_dir: {error}. Remove the folder to start again") from error
        except FileNotFoundError:
            raise
        except OSError as error:  # The layers may be whole, so the message does not say that they should go.
            reason = f"{error.strerror}: a checkpoint file that is there cannot be read; mend that and fit again"
            raise OSError(error.errno, reason, str(path)) from error

    def _refuse_other(self, identity: dict) -> None:
        """Raise an error that names what differs where the folder's manifest is that of another fit."""
        for key, value in identity.items():
            found = self._manifest.get(key)
            if found == value:
                continue
            if key == "settings":
                old = found or {}
                names = [name for name in {**old, **value} if old.get(name) != value.get(name)]
                difference = "; ".join(f"{name} was {old.get(name)!r}, now {value.get(name)!r}" for name in names)
            elif key in ("data", "seeds"):
                difference = f"the {key} differ"
            else:
                difference = f"{key} was {found!r}, now {value!r}"
            raise ValueError(
                f"checkpoint_dir {self.folder} belongs to another fit: {difference}. "
                "Use another folder, or remove this one"
            )


def _digest(tensors: dict[str, torch.Tensor], metadata: dict) -> str:
    """SHA-256 of a fit's results without its times and memory: two runs of the same fit agree on it."""
    record = metadata.get("record", {})
    found = {name: value for name, value in record.items() if name not in _MEASURED}
    if "solution" in found:
        found["solution"] = {name: value for name, value in found["solution"].items() if name not in _MEASURED}
    rest = {name: value for name, value in metadata.items() if name not in ("record", "kind")}
    return storage.fingerprint(tensors, json.dumps({**rest, "record": found}, sort_keys=True))


def _manifest(path: Path) -> dict:
    """A manifest whose parts have the types that are expected of them."""
    manifest = storage.read_json(path)
    layers, seeds = manifest["layers"], manifest.get("seeds", [])
    if not isinstance(layers, list) or not all(isinstance(digest, str) for digest in layers):
        raise ValueError(f"{path} is corrupt: its layers are no list of checksums")
    if not isinstance(seeds, list) or not isinstance(manifest["settings"], dict) or "features" not in manifest:
        raise ValueError(f"{path} is corrupt: its seeds, settings or features are none")
    return manifest


def _identity(settings: Settings) -> dict:
    """The settings that tell fits apart; the memory that a fit may take is not among them."""
    identity = {**dataclasses.asdict(settings), "kernel": repr(settings.kernel)}
    del identity["memory_limit"]
    return identity
