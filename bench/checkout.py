"""A checkout as it lies there: its packages can be imported where nothing of the project is installed.

kernels/ lies beside fastagop/ and installs as fastagop.kernels. Where it is not installed, a finder behind all others
says where it is; nothing is written, linked or copied for that.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Cases of ``python -m bench`` that run where only torch, Triton and NumPy are: modules with their own command line.
ALONE = ("first_contact", "gpu_report", "predictions")
_NAME, _FOLDER = "fastagop.kernels", ROOT / "kernels"


class _KernelsRoom:
    """Finds fastagop.kernels, and nothing else, in the checkout's folder kernels/."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != _NAME:
            return None
        places = [str(_FOLDER)]
        return importlib.util.spec_from_file_location(name, _FOLDER / "__init__.py", submodule_search_locations=places)


def place() -> None:
    """Make fastagop and fastagop.kernels of this checkout importable; what is installed or in the path goes first."""
    if _KernelsRoom not in sys.meta_path:
        sys.meta_path.append(_KernelsRoom)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
