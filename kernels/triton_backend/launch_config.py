"""Launch configurations: tiles, warps and stages per operation, precision and chip, frozen in one table.

A device that was calibrated uses what was fastest on it (``calibration``). Nothing is ever tuned inside a call.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from dataclasses import dataclass, field

import torch

from ..calibration import measured, triton_version

PRODUCTS = {"highest": "fp16x3", "high": "bf16x3", "medium": "tf32"}  # what a precision means here


@dataclass(frozen=True)
class Config:
    """How an operation is launched.

    Attributes:
        rows, columns, inner: of a tile.
        warps, stages: of a program and of its pipeline.
        registers: most that a thread may take; 0 leaves it to the compiler.
        programs: that a multiprocessor holds at once, which tests check of the machine code; nothing is done about it.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    registers: int = 0
    programs: int = field(default=1, compare=False)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What a file of measurements holds of it."""
        limit = (self.registers,) if self.registers else ()
        return (self.rows, self.columns, self.inner, self.warps, self.stages, *limit)

    @property
    def launch(self) -> dict[str, int]:
        """Options of a launch."""
        most = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}


_LARGE = (9, 10, 11)  # of these a program may take 227 KiB of shared memory; of 8.6, 8.9 and 12.x it may take 99
# (operation, precision) -> configuration, for compute capability 9.0 and the like, and for all others. Chosen by the
# machine code, which tests read for every entry: no work is done twice, no accumulator leaves the registers and nothing
# is spilled in the inner loop, and a multiprocessor holds as many programs as the entry says. Where accumulators are
# carried from one product into the next, that takes 16 rows of the tile for each warp.
TABLE = {
    8: {
        ("matrix", "fp16x3"): Config(128, 64, 32, 8, 3, registers=128, programs=2),
        ("matrix", "bf16x3"): Config(128, 64, 32, 8, 3),
        ("matrix", "tf32"): Config(128, 64, 32, 8, 3, registers=128, programs=2),
        ("matrix", "fp64"): Config(64, 64, 16, 8, 3, registers=128, programs=2),
        ("matmul", "fp16x3"): Config(64, 32, 32, 4, 3, programs=2),
        ("matmul", "bf16x3"): Config(64, 32, 32, 4, 3, programs=2),
        ("matmul", "tf32"): Config(64, 32, 32, 8, 3, registers=128, programs=2),
        ("gradient", "fp16x3"): Config(128, 128, 32, 8, 3),
        ("gradient", "bf16x3"): Config(128, 128, 32, 8, 3),
        ("gradient", "tf32"): Config(128, 64, 32, 8, 3, registers=128, programs=2),
        ("gram", "fp16x3"): Config(128, 64, 32, 8, 3, registers=128, programs=2),
        ("gram", "bf16x3"): Config(128, 64, 32, 8, 3),
        ("gram", "tf32"): Config(128, 64, 32, 8, 3, registers=128, programs=2),
        ("panel", "fp16x3"): Config(128, 64, 32, 4, 3, programs=2),
        ("update", "tf32x3"): Config(128, 128, 16, 8, 3),
        ("update", "bf16x3"): Config(128, 128, 16, 8, 3),
        ("update", "tf32"): Config(128, 128, 32, 8, 3),
    },
    9: {
        ("matrix", "fp16x3"): Config(128, 128, 64, 8, 3),
        ("matrix", "bf16x3"): Config(128, 64, 32, 8, 3, registers=128, programs=2),
        ("matrix", "tf32"): Config(128, 128, 32, 8, 3),
        ("matrix", "fp64"): Config(64, 64, 16, 8, 3, registers=128, programs=2),
        ("matmul", "fp16x3"): Config(128, 64, 64, 8, 3),
        ("matmul", "bf16x3"): Config(128, 64, 32, 8, 3),
        ("matmul", "tf32"): Config(128, 64, 32, 8, 3),
        ("gradient", "fp16x3"): Config(128, 128, 64, 8, 3),
        ("gradient", "bf16x3"): Config(128, 128, 32, 8, 3),
        ("gradient", "tf32"): Config(128, 128, 32, 8, 3),
        ("gram", "fp16x3"): Config(128, 128, 64, 8, 3),
        ("gram", "bf16x3"): Config(128, 64, 32, 8, 3),
        ("gram", "tf32"): Config(128, 128, 32, 8, 3),
        ("panel", "fp16x3"): Config(128, 128, 64, 8, 3),
        ("update", "tf32x3"): Config(128, 128, 32, 8, 3),
        ("update", "bf16x3"): Config(128, 128, 32, 8, 3),
        ("update", "tf32"): Config(128, 128, 32, 8, 3),
    },
}
# Those of l1 distances, which take no products of matrices, for every chip: chosen by the machine code, too.
PLAIN = {
    ("matrix", "fp32"): Config(64, 64, 32, 8, 1, programs=2),
    ("matmul", "fp32"): Config(64, 32, 32, 4, 1, registers=128, programs=4),
    ("l1 gradient", "fp32"): Config(32, 64, 1, 4, 1, programs=8),
}
# Rows of tiles that are worked on together. A wave of 132 or 264 programs then reads about 12 MB of 1024 features,
# where in the order of rows it reads 70 MB, more than the second-level cache holds. Of the gradient all outputs of a
# tile come before the next tile, so that fewer tiles fill a wave.
GROUPS = {"matrix": 16, "gradient": 4, "gram": 16, "panel": 16, "update": 16}
# The interpreter runs tile by tile in NumPy: small tiles keep tests short, and leave tails at small sizes.
_INTERPRETER = Config(32, 32, 32, 4, 1)


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_on_trial: contextvars.ContextVar[tuple | None] = contextvars.ContextVar("on trial", default=None)


@contextlib.contextmanager
def trial(operation: str, precision: str, candidate: Config):
    """Launch an operation with a candidate, to time it."""
    token = _on_trial.set((operation, precision, candidate))
    try:
        yield
    finally:
        _on_trial.reset(token)


def config(operation: str, precision: str, device: torch.device) -> Config:
    """The configuration of a launch: one on trial, the interpreter's, the one measured here, or the table's."""
    on_trial = _on_trial.get()
    if on_trial is not None and on_trial[:2] == (operation, precision):
        return on_trial[2]
    if interpreted():
        return _INTERPRETER
    if (operation, precision) in PLAIN:
        return PLAIN[operation, precision]
    if found := measured(device).configs.get(f"{operation} {precision}"):
        return Config(*found)
    major, _ = torch.cuda.get_device_capability(device)
    return TABLE[9 if major in _LARGE else 8][operation, precision]


@functools.cache
def version() -> tuple[int, ...]:
    """The installed Triton's, (major, minor)."""
    return tuple(int(part) for part in triton_version().split(".")[:2])
