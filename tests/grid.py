"""What the contract suite (test_contract.py) runs over. A new cloud or backend is one line in a list here.

Kernels come from kernel_cases.py.

The tests cannot import this file (pytest's importlib mode): conftest.py loads it and turns ``CASES`` and ``PLACES``
into the parameters ``grid_case`` and ``grid_place`` of every test that asks for them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import CONTRACT, cases

from fastagop.solvers import table

KERNELS = [case.kernel for case in cases(CONTRACT)]  # the paper's two come first
WELL_SPREAD = ["spread", "collapsed 1", "offset", "zero-rows"]  # conftest.py says what each cloud is
NEAR = ["collapsed 1e-2", "collapsed 1e-3", "collapsed 1e-4", "nested", "scales", "line", "pairs"]
CLOUDS = [*WELL_SPREAD, *NEAR, "identical"]
FURTHER = [*NEAR[2:], "identical", "zero-rows"]  # left to make test-slow but for the paper's two kernels
FEW_CLOUDS = ["spread", "collapsed 1e-3"]  # for backends whose calls take seconds here
OPERATIONS = ["kernel_matrix", "kernel_matmul", "gradients", "agop", "solve"]
DTYPES = [torch.float32, torch.float64]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Backend(NamedTuple):
    """One backend: where it serves, what it refuses, and the sizes that its speed in the tests allows.

    What it has no method of (``solve_methods=()``) it refuses, too.
    """

    name: str
    devices: list[str]
    dtypes: list[torch.dtype] = DTYPES
    refuses: tuple[str, ...] = ()  # operations answered with BackendUnavailable
    agop_methods: tuple[str, ...] = ("gradient", "gram", "auto")
    solve_methods: tuple[str, ...] = table.methods()[1:]  # but "auto"
    coarseness: float = 1.0  # rounding of its products' factors in units of the dtype's eps
    clouds: list[str] = CLOUDS
    n: int = 120
    d: int = 12
    many: int = 300  # points of which a block of 256 rows leaves some, and from which memory_limit makes small ones
    slow: bool = False

    def holds(self, kernel: Any) -> list[str]:
        """Clouds of a kernel: where calls take seconds, kernels beside the paper's two have the one of near pairs."""
        return self.clouds[1:] if self.clouds is FEW_CLOUDS and kernel not in KERNELS[:2] else self.clouds

    def serves(self, operation: str) -> bool:
        """Whether the contract holds for it there; it must refuse the others."""
        methods = {"agop": self.agop_methods, "solve": self.solve_methods}.get(operation, ("its only one",))
        return operation not in self.refuses and bool(methods)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


_KEOPS = _has("pykeops") and bool(shutil.which("g++") or shutil.which("clang++"))
_TRITON = ["cpu"] if INTERPRETED else DEVICES[1:]
BACKENDS = [
    Backend("torch", DEVICES),
    # Three fp16 products hold 22 of float32's 24 bits.
    Backend(
        "triton",
        _TRITON if _has("triton") else [],
        [torch.float32],
        solve_methods=("cholesky",),
        coarseness=4.0,
        clouds=FEW_CLOUDS if INTERPRETED else CLOUDS,
        n=30,  # one block: triton_cases.py has the tails
        many=30 if INTERPRETED else 300,
        slow=INTERPRETED,
    ),
    # Every feature count is a formula of its own that compiles for ten seconds: five features, as in test_keops.py.
    Backend(
        "keops",
        DEVICES if _KEOPS else [],
        refuses=("kernel_matrix",),
        agop_methods=("gradient", "auto"),
        solve_methods=("cg",),
        clouds=FEW_CLOUDS,
        n=60,
        d=5,
        slow=True,
    ),
]


class Place(NamedTuple):
    """Where an operation runs: a backend on one device in one dtype."""

    backend: Backend
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend.name}-{self.device}-{str(self.dtype).removeprefix('torch.')}"

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype)


class Case(NamedTuple):
    """One kernel on one cloud at one place."""

    kernel: Any
    cloud: str
    place: Place

    def __str__(self) -> str:
        return f"{self.kernel}-{self.cloud}-{self.place}"


def _parameter(value, *, slow: bool):
    return pytest.param(value, id=str(value), marks=[pytest.mark.slow] if slow else [])


_PLACES = [Place(b, device, dtype) for b in BACKENDS for device in b.devices for dtype in b.dtypes]
PLACES = [_parameter(place, slow=place.backend.slow) for place in _PLACES]
CASES = [
    _parameter(Case(kernel, cloud, place), slow=place.backend.slow or (cloud in FURTHER and kernel not in KERNELS[:2]))
    for place in _PLACES
    for kernel in (case.kernel for case in cases(CONTRACT, place.backend.name))
    for cloud in place.backend.holds(kernel)
]
PARAMETERS = {"grid_case": CASES, "grid_place": PLACES}
