"""What a result was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

import torch
from fastagop.kernels import _measured


def describe() -> dict:
    """Processor, threads, versions and date."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _measured.name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("fastagop", "torch", "xrfm", "pykeops", "numpy")},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
