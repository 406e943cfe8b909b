"""Files that are complete or absent, and what a result says about where it came from."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastagop.kernels import atomic_files, calibration

import fastagop
from fastagop.datasets import npz
from fastagop.estimators import files as storage


def write(path: Path, content: bytes | str) -> None:
    """Write a file, and its folder, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """JSON as everybody reads it: numbers that are not finite become null."""
    write(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """A run's record as JSON with its own checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, _plain(record))


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote of a mapping.

    Raises:
        ValueError: naming the file, which holds something else. OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and make its figure again") from error
    return found


def read_record(path: Path, settings: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """A record that ``write_record`` wrote, of these settings and with these parts.

    Raises:
        ValueError: naming the file, which is damaged or another run's. OSError: it cannot be read.
    """
    try:
        record = storage.read_json(path)
        if record.get("settings") != _plain(settings):
            raise ValueError(f"{path} is another run's: its settings differ")
        if missing := [part for part in parts if part not in record]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
    except ValueError as error:
        raise ValueError(f"{error}; remove {path.parent} to compute the run again") from error
    return record


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row under the first row's keys; numbers that are not finite become empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_plain(list(rows)))
    write(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a file that may not be there."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A compressed .npz."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write(path, content.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz that may not be there; ValueError naming the file where it is damaged."""
    return npz.read(path) if path.exists() else {}


def environment(device: str | torch.device) -> dict[str, Any]:
    """Versions, chip and commit of this moment."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastagop": fastagop.__version__,
        "device": calibration.name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        described = subprocess.run(
            command, cwd=Path(__file__).parent, env=quiet, capture_output=True, text=True, check=False
        )
    except OSError:  # There is no git here.
        return None
    return described.stdout.strip() or None


def peak_resident_bytes() -> int:
    """The most memory this process has held at once; what ran before a run was resumed is not in it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
