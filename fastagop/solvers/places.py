"""Where half of a matrix is stored: a place that exists, and the disk of a folder."""

from __future__ import annotations

import os
import shutil

import torch

from fastagop.kernels.plan import format_bytes
from fastagop.solvers.options import CholeskyCG
from fastagop.solvers.problem import Problem
from fastagop.solvers.symmetric_blocks import default_rows, half_bytes

_IN_MEMORY = ("device", "host")


def check_place(options: CholeskyCG, device: torch.device) -> None:
    """Refuse a place that does not exist for a device."""
    if options.place == "host" and device.type != "cuda":
        raise ValueError(f"place='host' is for tensors on CUDA, and X is on {device}; use 'device' or a folder")
    if options.place not in _IN_MEMORY and not os.path.isdir(options.place):
        raise ValueError(f"place must be 'device', 'host' or a folder that exists, got {options.place!r}")


def check_alone(method: object, ranks: int) -> None:
    """Refuse a place for processes that share half of a matrix: theirs lies in the memory of their devices."""
    if ranks > 1 and isinstance(method, CholeskyCG) and method.place != "device":
        raise ValueError(
            f"place={method.place!r} is for one process, and {ranks} of a group share the matrix in the memory of "
            "their devices; use place='device', or solve without a process group"
        )


def fits_disk(problem: Problem, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a folder has the room for halves of those dtypes beside each other; memory is asked about elsewhere."""
    needed = _disk_bytes(problem, dtypes)
    return needed == 0 or needed <= _free(problem)


def check_disk(problem: Problem, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise MemoryError where ``fits_disk`` says no."""
    if not fits_disk(problem, dtypes):
        raise MemoryError(
            f"place={problem.half.place!r} needs {format_bytes(_disk_bytes(problem, dtypes))} of disk for "
            f"n = {len(problem.X)}, but {format_bytes(_free(problem))} are free there; give a folder on a larger disk, "
            "or fewer points"
        )


def _disk_bytes(problem: Problem, dtypes: tuple[torch.dtype, ...]) -> int:
    if problem.half.place in _IN_MEMORY:
        return 0
    n = len(problem.X)
    return sum(half_bytes(n, dtype, default_rows(n, problem.X.device)) for dtype in dtypes)


def _free(problem: Problem) -> int:
    return shutil.disk_usage(problem.half.place).free
