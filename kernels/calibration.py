"""What was measured on a device, launch configurations and rates, and how fast each AGOP form runs by that.

``python -m bench calibrate`` writes it and nothing else does; without a file that can be read the frozen tables hold.
The file lies in $FASTAGOP_CACHE, by default ~/.cache/fastagop, under the name of the chip and of the Triton that
compiled for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import itertools
import json
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
        configs: "operation products" -> numbers of the fastest launch: rows, columns, inner, warps, stages, and
            registers where they are limited.
        rates: "form products" -> floating-point operations per second of an AGOP form.
        about: chip, versions and date.
    """

    configs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


def name(device: torch.device) -> str:
    """Name of the chip, by which measured rates are stored."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def cpuinfo() -> dict[str, str]:
    """What Linux tells of the first processor; empty on other systems."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = itertools.takewhile(str.strip, file)  # a blank line ends a processor
            return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return {}


@functools.cache
def cache_bytes() -> int:
    """Bytes of the cache that Linux names: the last level of Intel's processors, a core's second of AMD's; else 0."""
    size, _, unit = cpuinfo().get("cache size", "").partition(" ")
    return int(size) * 1024 if size.isdigit() and unit == "KB" else 0


def path(device: torch.device) -> Path:
    """The device's file.

    Raises:
        FileNotFoundError: there is no home directory, and neither $FASTAGOP_CACHE nor $XDG_CACHE_HOME names a folder.
    """
    folder = os.environ.get("FASTAGOP_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "fastagop"
    title = name(device) if device.type != "cuda" else f"{name(device)} triton {triton_version()}"
    return Path(folder) / (re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-") + ".json")


def triton_version() -> str:
    """The installed Triton's, whose distribution has other names, too, such as pytorch-triton.

    Raises:
        importlib.metadata.PackageNotFoundError: there is none.
    """
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        try:
            return importlib.import_module("triton").__version__
        except ImportError:
            pass
        raise


def _home() -> Path:
    try:
        return Path.home()
    except (RuntimeError, KeyError) as error:
        raise FileNotFoundError("there is no home directory; set FASTAGOP_CACHE to a folder") from error


def measured(device: torch.device) -> Measured:
    """The device's measurements; empty where there are none, or no home directory that they could be in."""
    file = _place(device, *(os.environ.get(name) for name in ("FASTAGOP_CACHE", "XDG_CACHE_HOME", "HOME")))
    return Measured() if file is None else _read(file)


@functools.cache
def _place(device: torch.device, *folders: str | None) -> Path | None:
    """The device's file, looked up once for what the environment names; None where there is no place for it."""
    try:
        return path(device)
    except (OSError, importlib.metadata.PackageNotFoundError):
        return None


_RATES = 1.0, 1e30  # between which operations a second are taken for measured; times made of others leave float64


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
        if any(len(c) not in (5, 6) or min(c) < 1 for c in configs.values()):
            raise ValueError("a configuration is out of range")
        if not all(_RATES[0] <= rate <= _RATES[1] for rate in rates.values()):
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


# Floating-point operations per second by form and products. Only ratios decide. The CPU's were measured by
# `python -m bench calibrate` (bench/results/rates_cpu.json: n = 4000, d = 784, K = 10, two cores of an AMD EPYC);
# CUDA's are the vendors' figures for library products and compiled estimates for ours, from that compute capability on:
# nothing was measured on a GPU yet. Blackwell's and consumer chips' estimates are the shares of the tensor cores' peaks
# that ours are thought to reach on an H200 and an A100. float64 is a 64th of float32 but for A100, H100, H200 and B200.
_CPU = {
    "gradient float32": 3.8e11,
    "gram float32": 3.2e11,
    "gradient float64": 8.7e10,
    "gram float64": 8.9e10,
}
_CUDA = {
    (8, 0): {"float32": 19e12, "float64": 19e12, "fp16x3": 90e12, "bf16x3": 50e12, "tf32": 120e12},  # A100
    (8, 6): {"float32": 80e12, "float64": 1.3e12, "fp16x3": 47e12, "bf16x3": 26e12, "tf32": 64e12},  # RTX 30, RTX 40
    (9, 0): {"float32": 60e12, "float64": 60e12, "fp16x3": 220e12, "bf16x3": 160e12, "tf32": 400e12},  # H100, H200
    (10, 0): {"float32": 75e12, "float64": 37e12, "fp16x3": 500e12, "bf16x3": 360e12, "tf32": 880e12},  # B200
    (10, 3): {"float32": 75e12, "float64": 1.2e12, "fp16x3": 500e12, "bf16x3": 360e12, "tf32": 880e12},  # B300
    (12, 0): {"float32": 105e12, "float64": 1.6e12, "fp16x3": 60e12, "bf16x3": 34e12, "tf32": 80e12},  # RTX 50
}
# Seconds of what every pair of points costs beside products of matrices (distance, profile), from the same runs; and
# KeOps' operations per second, from bench/results/keops_cpu.json. CUDA's are estimates from memory bandwidth.
_PAIR = {"cpu float32": 3.5e-9, "cpu float64": 6.5e-9, "cuda float32": 3e-11, "cuda float64": 6e-11}
_KEOPS = {"cpu": 6e9, "cuda": 1e12}


def rate(form: str, products: str, device: torch.device) -> float:
    """Floating-point operations per second of "gradient" or "gram" with products such as "float32" or "fp16x3"."""
    key = f"{form} {products}"
    if key in (found := measured(device).rates):
        return found[key]
    if device.type != "cuda":
        return _CPU.get(key, _CPU["gradient float32"])
    capability = torch.cuda.get_device_capability(device)
    return _CUDA[max((least for least in _CUDA if least <= capability), default=min(_CUDA))][products]


def seconds(flops: float, pairs: float, device: torch.device, form: str, products: str) -> float:
    """Estimated time of so many operations with products of a kind, on so many pairs of points."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    if products == "keops":
        return flops / _KEOPS[kind]
    dtype = "float64" if products == "float64" else "float32"
    return flops / rate(form, products, device) + pairs * _PAIR[f"{kind} {dtype}"]


def source(device: torch.device) -> str:
    """Where the rates come from, in words."""
    found = measured(device)
    if found.rates:
        return f"rates measured on this device, {found.about.get('date', 'undated')}"
    return "default rates; `python -m bench calibrate` measures this device's"
