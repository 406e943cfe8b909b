"""The lines of a first contact: one JSON object a measurement, appended and flushed at once, and read again to resume.

Every line says where it comes from (chip, versions, date, sources, whether it is a dry run on the CPU), what was
measured (part, case) and what came out: seconds, relative error against float64, bytes, or the failure, and facts such
as n, d, flop or a configuration.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.checkout import ROOT

FILE = "first_contact.jsonl"
UNDER_WAY = "under_way"  # the file that names the case that is being measured, while one is
DRY = "CPU, DRY RUN"
WHOLE = "whole part"  # the case of the line that says that a part came to its end
STOPPED = "stopped"  # how a failure begins that lack of time made: the case is measured by the next call
FIELDS = ("dry_run", "chip", "versions", "sources", "date", "part", "case", "seconds", "error", "bytes", "failure")
_ORIGIN = ("dry_run", "chip", "versions", "sources")


def origin(dry: bool) -> dict[str, Any]:
    """What a line is measured on: chip, versions and the sources' fingerprint; torch is imported here."""
    import numpy
    import torch

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "numpy": numpy.__version__}
    versions |= {"python": platform.python_version(), "triton": _triton()}
    chip = DRY
    if not dry:
        about = torch.cuda.get_device_properties(0)
        chip = f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} SMs, "
        chip += f"{about.total_memory / 2**30:.0f} GiB"
    return {"dry_run": dry, "chip": chip, "versions": versions, "sources": sources()}


def _triton() -> str:
    import importlib.metadata

    from fastagop.kernels import calibration

    try:
        return calibration.triton_version()
    except importlib.metadata.PackageNotFoundError:
        return ""


def sources(root: Path = ROOT) -> str:
    """Twelve digits of a hash of all that is measured: the files of kernels/ and fastagop/."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ("kernels", "fastagop") for path in (root / room).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def line(about: Mapping[str, Any], part: str, case: str, **found: Any) -> dict[str, Any]:
    """A line: its origin, part and case, and what was found; what was not is None."""
    fixed = {"seconds": None, "error": None, "bytes": None, "failure": None}
    today = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    plain = {key: _plain(value) for key, value in found.items()}
    return {**about, **today, "part": part, "case": case, **fixed, **plain}


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the folder's file and settle it on the disk; what a killed writer left half is ended first."""
    path = folder / FILE
    torn = b"\n" if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n") else b""
    with open(path, "ab") as file:
        file.write(torn + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder; none where there is no file.

    Half a line, which a killed writer leaves, is no line. Raises ValueError naming what is no line of a first contact.
    """
    path = folder / FILE
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if not isinstance(row, dict) or any(name not in row for name in FIELDS):
            raise ValueError(f"{path}, line {number}, is not what `python -m bench first_contact` writes")
        found.append(row)
    return found


def origin_of(rows: Iterable[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """What all lines were measured on; ValueError where they come from two chips, versions, sources or kinds of run."""
    kinds = {json.dumps([row[name] for name in _ORIGIN]) for row in rows}
    if len(kinds) != 1:
        count = "no line" if not kinds else f"lines of {len(kinds)} origins (chip, versions or sources differ)"
        raise ValueError(f"{folder / FILE} must hold one first contact's lines, got {count}; use a folder for each")
    return dict(zip(_ORIGIN, json.loads(kinds.pop()), strict=True))


def check(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder whose lines were measured on something else: they would be taken for one run."""
    rows = read(folder)
    if rows and (there := origin_of(rows, folder)) != dict(about):
        other = ", ".join(f"{key} {there[key]!r}" for key in _ORIGIN if there[key] != about[key])
        raise ValueError(f"--out {folder} holds lines of another first contact ({other}); use another folder")


def done(rows: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(part, case) of what need not be measured again: all but what lack of time stopped."""
    return {(row["part"], row["case"]) for row in rows if not str(row["failure"] or "").startswith(STOPPED)}
