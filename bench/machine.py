"""What a result was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

import torch
from fastagop.kernels import calibration

_PACKAGES = ("fastagop", "torch", "xrfm", "pykeops", "numpy", "scikit-learn", "pytabkit")


def describe() -> dict:
    """Processor, threads, versions and date."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    """Its name, and where Linux tells family and model: hosts of virtual machines often name the brand only."""
    about = calibration.cpuinfo()
    found = [f"{word} {about[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in about]
    name = calibration.name(torch.device("cpu"))
    return f"{name} ({', '.join(found)})" if found else name


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
