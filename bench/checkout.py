"""A checkout as it lies there: its packages can be imported where nothing of the project is installed."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Cases of ``python -m bench`` that run where only torch, Triton and NumPy are: modules with their own command line.
ALONE = {
    "first_contact": "ten minutes on a GPU as numbers, from a plain checkout where nothing can be installed",
    "gpu_report": "tables and proposals from what first_contact wrote",
    "predictions": "predicted seconds on GPUs by counts and rates, into docs/pages/gpu.md",
}


def place() -> None:
    """Make fastagop of this checkout importable; what is installed or in the path goes first."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
