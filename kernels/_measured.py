"""What was measured on a device: launch configurations and rates, in one small file per device.

``python -m bench calibrate`` writes it and nothing else does; without a file the frozen tables hold. The file lies in
$FASTAGOP_CACHE, by default ~/.cache/fastagop, under the name of the chip and of the Triton that compiled for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


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
    """The device's file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("FASTAGOP_CACHE") or cache / "fastagop")
    words = name(device) if device.type != "cuda" else f"{name(device)} triton {importlib.metadata.version('triton')}"
    return folder / (re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-") + ".json")


def measured(device: torch.device) -> Measured:
    """The device's measurements; empty where there are none."""
    return _read(path(device))


@functools.cache
def _read(file: Path) -> Measured:
    if not file.exists():
        return Measured()
    try:
        read = json.loads(file.read_text())
        configs = {key: tuple(int(n) for n in value) for key, value in read["configs"].items()}
        rates = {key: float(value) for key, value in read["rates"].items()}
        if any(len(c) != 5 or min(c) < 1 for c in configs.values()) or any(not r > 0 for r in rates.values()):
            raise ValueError("a configuration or rate out of range")
        return Measured(configs, rates, dict(read["about"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not what `python -m bench calibrate` writes ({error}); delete it or calibrate again"
        ) from error


def save(device: torch.device, result: Measured) -> Path:
    """Write the device's file, whole or not at all."""
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json.dumps(asdict(result), indent=1) + "\n")
    os.replace(draft, file)
    _read.cache_clear()
    return file
