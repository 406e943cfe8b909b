"""Finished layers of a Deep RFM on disk, so that an interrupted fit resumes where it stopped.

A checkpoint folder holds ``manifest.json`` (settings, data fingerprint, seeds, finished layers with their
checksums) and one safetensors file a layer; the features entering the next layer are kept for the newest layer
only. Files are written beside their place and renamed, the manifest last: whatever moment a run is killed at,
the manifest names complete files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastagop.deep_rfm import Layer, LayerRecord, Settings
from fastagop.features import random_features
from fastagop.solve import Solution

FORMAT = 1


def fingerprint(*tensors: torch.Tensor) -> str:
    """SHA-256 of shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


class Checkpoint:
    """A checkpoint folder bound to one fit: its settings, data and seeds."""

    def __init__(self, folder, settings: Settings, X: torch.Tensor, Y: torch.Tensor, seeds: list[int] | None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "manifest.json"
        self._like = X
        self._settings = settings
        wanted = {
            "format": FORMAT,
            "settings": {**dataclasses.asdict(settings), "kernel": repr(settings.kernel)},
            "data": fingerprint(X, Y),
            "dtype": str(X.dtype),
        }
        if seeds is not None:
            wanted["seeds"] = seeds
        if self._path.exists():
            self._manifest = self._read()
            self._refuse_other(wanted)
        else:
            self._manifest = {**wanted, "layers": []}

    @property
    def seeds(self) -> list[int] | None:
        """Seeds of the run that started this checkpoint, where there is one."""
        return self._manifest.get("seeds")

    def start(self, seeds: list[int]) -> None:
        """Fix the seeds of a fit that was given none."""
        self._manifest.setdefault("seeds", seeds)

    def load(self) -> tuple[list[Layer], torch.Tensor | None]:
        """(finished layers, features entering the next one); verifies every checksum."""
        entries = self._manifest["layers"]
        layers = [self._load_layer(index, entry) for index, entry in enumerate(entries)]
        if not entries:
            return [], None
        features = self._tensors(f"features-{len(entries) - 1:03d}.safetensors", entries[-1]["features"])
        return layers, features["features"].to(self._like)

    def save(self, index: int, layer: Layer, features: torch.Tensor) -> None:
        """Add a finished layer; the features of the layer before are dropped once they are not needed."""
        record = dataclasses.asdict(dataclasses.replace(layer.record, solution=_without_alpha(layer.record.solution)))
        record["solution"]["dtype"] = str(layer.record.solution.dtype)
        del record["solution"]["alpha"]
        name, kept = f"layer-{index:03d}.safetensors", f"features-{index:03d}.safetensors"
        tensors = {"agop": layer.agop, "root": layer.root, "alpha": layer.record.solution.alpha}
        entry = {
            "record": record,
            "tensors": self._write(name, tensors),
            "features": self._write(kept, {"features": features}),
        }
        self._manifest["layers"].append(entry)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._manifest, indent=1))
        _settle(temporary, self._path)
        if index:
            (self.folder / f"features-{index - 1:03d}.safetensors").unlink(missing_ok=True)

    def _read(self) -> dict:
        try:
            return json.loads(self._path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"checkpoint_dir {self.folder} holds a manifest that cannot be read ({error}); "
                "remove the folder to start again"
            ) from error

    def _refuse_other(self, wanted: dict) -> None:
        for key, value in wanted.items():
            found = self._manifest.get(key)
            if found == value:
                continue
            if key == "settings":
                old = found or {}
                differ = [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in value.items() if old.get(k) != v]
                what = "; ".join(differ)
            else:
                what = f"the {key} differ" if key in ("data", "seeds") else f"{key} was {found!r}, now {value!r}"
            raise ValueError(
                f"checkpoint_dir {self.folder} belongs to another fit: {what}. Use another folder, or remove this one"
            )

    def _load_layer(self, index: int, entry: dict) -> Layer:
        tensors = self._tensors(f"layer-{index:03d}.safetensors", entry["tensors"])
        tensors = {name: tensor.to(self._like.device) for name, tensor in tensors.items()}
        said = dict(entry["record"])
        words = dict(said.pop("solution"))
        words["dtype"] = getattr(torch, words["dtype"].removeprefix("torch."))
        record = LayerRecord(solution=Solution(alpha=tensors["alpha"], **words), **said)
        s = self._settings
        d = len(tensors["agop"])
        phi = random_features(s.features, d, s.width, s.feature_scale, self._manifest["seeds"][index], self._like)
        return Layer(tensors["agop"], tensors["root"], phi, record)

    def _tensors(self, name: str, checksum: str) -> dict[str, torch.Tensor]:
        path = self.folder / name
        if not path.exists() or _checksum(path) != checksum:
            raise ValueError(
                f"checkpoint file {path} is missing, truncated or corrupt; remove the folder to start again"
            )
        return load_file(path)

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> str:
        temporary, path = self.folder / f"{name}.tmp", self.folder / name
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        checksum = _checksum(temporary)
        _settle(temporary, path)
        return checksum


def _without_alpha(solution: Solution) -> Solution:
    return dataclasses.replace(solution, alpha=torch.empty(0))


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _settle(temporary: Path, path: Path) -> None:
    """Put a finished file in its place: on disk before it is renamed."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
