"""What was measured on a device: launch configurations and rates, in one small file per device.

``python -m bench calibrate`` writes it and nothing else does; without a file that can be read the frozen tables hold.
The file lies in $FASTAGOP_CACHE, by default ~/.cache/fastagop, under the name of the chip and of the Triton that
compiled for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import atomic_files
from .errors import warn

_LONGEST = 2**20  # bytes of a file; what calibration writes has a few thousand


@dataclass(frozen=True)
class Measured:
    """Measurements of one device.

    Attributes:
        configs: "operation products" -> (rows, columns, inner, warps, stages) of the fastest launch.
        rates: "form products" -> floating-point operations per second of an AGOP form.
        about: chip, versions and date.
    """

    configs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


def name(device: torch.device) -> str:
    """The chip's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def path(device: torch.device) -> Path:
    """The device's file.

    Raises:
        FileNotFoundError: there is no home directory, and neither $FASTAGOP_CACHE nor $XDG_CACHE_HOME names a folder.
    """
    folder = os.environ.get("FASTAGOP_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "fastagop"
    words = name(device) if device.type != "cuda" else f"{name(device)} triton {importlib.metadata.version('triton')}"
    return Path(folder) / (re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-") + ".json")


def _home() -> Path:
    try:
        return Path.home()
    except (RuntimeError, KeyError) as error:
        raise FileNotFoundError("there is no home directory; set FASTAGOP_CACHE to a folder") from error


def measured(device: torch.device) -> Measured:
    """The device's measurements; empty where there are none, or no home directory that they could be in."""
    try:
        file = path(device)
    except (OSError, importlib.metadata.PackageNotFoundError):
        return Measured()
    return _read(file)


@functools.cache
def _read(file: Path) -> Measured:
    """The measurements in a file; a damaged one is warned of once, and counts as none."""
    try:
        with open(file, "rb") as opened:
            text = opened.read(_LONGEST)
    except (OSError, ValueError):  # not there, not to be read, or no name that a file can have
        return Measured()
    try:
        read = json.loads(text)
        configs = {key: tuple(int(n) for n in value) for key, value in read["configs"].items()}
        rates = {key: float(value) for key, value in read["rates"].items()}
        if any(len(c) != 5 or min(c) < 1 for c in configs.values()):
            raise ValueError("a configuration is out of range")
        if not all(0 < rate < math.inf for rate in rates.values()):
            raise ValueError("a rate is out of range")
        return Measured(configs, rates, {str(key): str(value) for key, value in read["about"].items()})
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        warn(
            f"{file} is not what `python -m bench calibrate` writes ({error}), so this device's measurements are not "
            "used; delete it or calibrate again",
            UserWarning,
        )
        return Measured()


def save(device: torch.device, result: Measured) -> Path:
    """Write the device's file, whole or not at all."""
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(file, (json.dumps(asdict(result), indent=1) + "\n").encode())
    _read.cache_clear()
    return file
