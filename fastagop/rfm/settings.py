"""Settings of recursive feature machines that a search tries: names, spaces they are drawn from, what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np

from fastagop.kernels import checks
from fastagop.kernels.profile import median_factor
from fastagop.kernels.radial import Radial

# What a setting that leaves a name out has; the exponent is then the kernel's own.
DEFAULTS = {"bandwidth": 1.0, "ridge": 1e-3, "diagonal": False, "center": False, "agop_scale": "max"}
NAMES = (*DEFAULTS, "exponent")
# Fractions of two square roots: of the pairs that were tried, the first 7, 11 and 23 multiples of this one leave the
# smallest holes in a square and on its sides.
_STEPS = (math.sqrt(8.0) - 2.0, math.sqrt(6.0) - 2.0)
_TRIES = 100  # draws after which a space of lists is taken to hold no further setting
Setting = dict[str, Any]


class LogUniform:
    """Numbers between two positive ones whose logarithms are spread evenly; ``rvs`` is that of a SciPy distribution."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __repr__(self) -> str:
        return f"LogUniform({self.low:g}, {self.high:g})"

    def at(self, share: float) -> float:
        """The number that a share of them, between 0 and 1, lies below."""
        return float(self.low * (self.high / self.low) ** share)

    def rvs(self, random_state: np.random.RandomState) -> float:
        """One number, drawn without regard to others."""
        return self.at(random_state.uniform())


def default_space(kernel: Radial) -> dict[str, Any]:
    """Where settings are drawn from unless a space is given; exponents only for kernels that have one."""
    space = {
        "bandwidth": LogUniform(0.2, 8.0),
        "ridge": LogUniform(1e-4, 3.0),
        "diagonal": [True, False],
        "center": [False, True],
    }
    return space | ({"exponent": [0.7, 1.0, 1.4]} if kernel.family_exponent is not None else {})


def settings_of(space, count: int, kernel: Radial, random: np.random.RandomState) -> list[Setting]:
    """The settings to try: those given, or the default one and ``count`` - 1 that are drawn and differ from each other.

    Args:
        space: names to lists or distributions; a list of settings, which are taken as they are; None for the default.
        count: how many.
        kernel: whose own exponent is the default one.
        random: what settings are drawn by, so that the first ones do not depend on ``count``.

    Raises:
        ValueError, TypeError: a name that is not known, or a space that is none.
    """
    space = default_space(kernel) if space is None else space
    if isinstance(space, Mapping):
        _check_names(space)
        return _drawn(space, count, kernel, random)
    if isinstance(space, str) or not isinstance(space, Iterable):
        raise TypeError(f"space must be a dict of lists and distributions, or a list of settings, got {space!r}")
    given = list(space)
    for setting in given:
        if not isinstance(setting, Mapping):
            raise TypeError(f"space must be a list of settings (dicts of names and values), got {setting!r} in it")
        _check_names(setting)
    if not given:
        raise ValueError("space must hold at least one setting, got an empty list; pass None for the default space")
    names = [name for name in NAMES if any(name in setting for setting in given)]
    return [{name: setting.get(name, _default(name, kernel)) for name in names} for setting in given]


def kernel_of(kernel: Radial, setting: Setting) -> Radial:
    """The kernel of a setting: its bandwidth multiplied, and its exponent replaced where there is one.

    Raises:
        ValueError: an exponent for a kernel that has none.
    """
    if "exponent" in setting and setting["exponent"] is not None:
        if kernel.family_exponent is None:
            raise ValueError(f"exponent is a setting of Laplace and GeneralisedLaplace, got kernel={kernel!r}")
        kernel = kernel.with_exponent(setting["exponent"])
    if not kernel.norm:
        raise ValueError(
            f"a search multiplies the kernel's bandwidth, and {kernel!r} has none; fit RFMClassifier or RFMRegressor, "
            "for example in scikit-learn's GridSearchCV with kernel__... as names"
        )
    times, median = setting.get("bandwidth", 1.0), median_factor(kernel)
    if isinstance(times, bool) or not isinstance(times, (int, float, np.number)):
        raise TypeError(f"bandwidth must be a number, the factor of the kernel's own, got {times!r}")
    return replace(kernel, bandwidth=kernel.bandwidth * times if median is None else ("median", median * times))


def parameters_of(kernel: Radial, setting: Setting) -> dict[str, Any]:
    """Parameters of an estimator with a setting."""
    setting = {**DEFAULTS, **setting}
    return {"kernel": kernel_of(kernel, setting)} | {
        name: setting[name] for name in ("ridge", "diagonal", "center", "agop_scale")
    }


def _default(name: str, kernel: Radial):
    return DEFAULTS.get(name, kernel.family_exponent)


def _check_names(names: Iterable[str]) -> None:
    """Refuse a name that no setting has."""
    for name in names:
        checks.choice("a name in space", name, NAMES)


def _drawn(space: Mapping, count: int, kernel: Radial, random: np.random.RandomState) -> list[Setting]:
    """The default setting and at most ``count`` - 1 that are drawn from a space, all different."""
    streams = {name: _stream(name, values, index, random) for index, (name, values) in enumerate(space.items())}
    found = [{name: _default(name, kernel) for name in space}]
    for _ in range(count - 1):
        for _ in range(_TRIES):
            setting = {name: next(stream) for name, stream in streams.items()}
            if setting not in found:
                found.append(setting)
                break
    return found


def _stream(name: str, values, index: int, random: np.random.RandomState) -> Iterator:
    """Values of a list, each of them once in a random order before any comes again, or of a distribution.

    Those of ``LogUniform`` go through the range in steps of an irrational share of it, one for each place in the
    space: a dozen numbers leave no part of a plane of two names empty, as independent draws would.
    """
    if isinstance(values, LogUniform):
        share, step = random.uniform(), _STEPS[index % len(_STEPS)]
        while True:
            share = (share + step) % 1.0
            yield values.at(share)
    if hasattr(values, "rvs"):
        while True:
            yield _plain(values.rvs(random_state=random))
    if isinstance(values, (str, Mapping, Set)) or not hasattr(values, "__len__") or len(values) == 0:
        raise TypeError(f"space[{name!r}] must be a list of values or a distribution with rvs, got {values!r}")
    while True:
        for place in random.permutation(len(values)):
            yield _plain(values[place])


def _plain(value):
    """A NumPy number as Python's own."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0 else value
