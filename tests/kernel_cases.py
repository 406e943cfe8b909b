"""The radial kernels that the suites run over, and what is true of each by its definition. A new kernel is one entry.

``CASES`` is the list. The contract suite (grid.py), test_radial.py, test_module.py, triton_cases.py,
test_machine_code.py, test_keops.py and others take their kernels and formulas from it. The formulas are written from
the definitions and share no code with the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastagop.kernels.radial import Radial

from fastagop import Gaussian, GeneralisedLaplace, Laplace, Matern52

CONTRACT = "contract"  # test_contract.py, test_gradients.py, test_kernel_matrix.py: every operation, data that hurts
PROFILE = "profile"  # test_radial.py: value, weight, zero distance, extreme bandwidths
MODULE = "module"  # test_module.py, test_autograd.py: derivatives of first and second order
DEVICES = "devices"  # triton_cases.py, test_machine_code.py, test_keops.py: what the devices' texts compute

Formula = Callable[[Any, Any], Any]  # of a kernel of the class, and of distances r > 0


def _distance_over_bandwidth(kernel, r):
    return r / kernel.bandwidth


@dataclass(frozen=True)
class KernelCase:
    """A kernel and its definition; the formulas hold for every kernel of its class.

    They keep the type of r: a torch tensor that autograd follows, or NumPy's float64 or long double.
    """

    kernel: Radial  # its bandwidth is what the contract suite runs; the others set their own
    profile: Formula  # phi(r)
    weight: Formula  # w(r) = -phi'(r) / r
    # t(r), or a bound of it, where phi holds exp(-t): a rounding of t costs t times as much of phi and w.
    # It says how far values and gradients may be off. A kernel without an exponential keeps r / L.
    exponent: Formula = _distance_over_bandwidth
    smooth_at_zero: bool = False  # phi is twice differentiable at r = 0 as a function of x
    heavy_tailed: bool = False  # phi decays like a power of r: far values are small, not zero
    suites: tuple[str, ...] = (CONTRACT, PROFILE, MODULE, DEVICES)
    without: tuple[str, ...] = ()  # "triton", "keops": backends whose language the class does not give

    def __str__(self) -> str:
        return repr(self.kernel)

    @property
    def further(self) -> tuple[float, ...]:
        """The kernel's parameters after the bandwidth."""
        return dataclasses.astuple(self.kernel)[1:]

    def at(self, bandwidth: float) -> KernelCase:
        """The same case with another bandwidth."""
        return dataclasses.replace(self, kernel=dataclasses.replace(self.kernel, bandwidth=bandwidth))

    def of(self, kernel: Radial, **changes: Any) -> KernelCase:
        """The same definition for another kernel of the class."""
        return dataclasses.replace(self, kernel=kernel, **changes)


def exp(t: Any) -> Any:
    return torch.exp(t) if isinstance(t, torch.Tensor) else np.exp(t)


def _generalised_laplace_weight(kernel, r):
    p, u = kernel.exponent, r / kernel.bandwidth
    return p * u ** (p - 2) * exp(-(u**p)) / kernel.bandwidth**2


def _matern52_exponent(kernel, r):
    return (5 * (r / kernel.bandwidth) ** 2) ** 0.5  # sqrt(5) r / L with all digits of r's type


def _matern52_profile(kernel, r):
    s = _matern52_exponent(kernel, r)
    return (1 + s + s**2 / 3) * exp(-s)


def _matern52_weight(kernel, r):
    s = _matern52_exponent(kernel, r)
    return 5 * (1 + s) * exp(-s) / (3 * kernel.bandwidth**2)


LAPLACE = KernelCase(
    Laplace(2.0),  # the paper's kernel, singular at distance zero
    profile=lambda kernel, r: exp(-r / kernel.bandwidth),
    weight=lambda kernel, r: exp(-r / kernel.bandwidth) / (kernel.bandwidth * r),
)
GAUSSIAN = KernelCase(
    Gaussian(1.0),  # the paper's other kernel, smooth at distance zero
    profile=lambda kernel, r: exp(-((r / kernel.bandwidth) ** 2) / 2),
    weight=lambda kernel, r: exp(-((r / kernel.bandwidth) ** 2) / 2) / kernel.bandwidth**2,
    exponent=lambda kernel, r: (r / kernel.bandwidth) ** 2,
    smooth_at_zero=True,
)
GENERALISED_LAPLACE = KernelCase(
    GeneralisedLaplace(2.0, 0.5),  # a stronger singularity: a gradient that grows without bound at distance zero
    profile=lambda kernel, r: exp(-((r / kernel.bandwidth) ** kernel.exponent)),
    weight=_generalised_laplace_weight,
    exponent=lambda kernel, r: (r / kernel.bandwidth) ** kernel.exponent,
)
MATERN52 = KernelCase(
    Matern52(2.0),  # a polynomial times an exponential
    profile=_matern52_profile,
    weight=_matern52_weight,
    exponent=_matern52_exponent,
    smooth_at_zero=True,
)
CASES = [
    LAPLACE,
    GAUSSIAN,
    LAPLACE.of(Laplace(0.05), suites=(CONTRACT,)),  # narrow: far pairs underflow, within-class distances decide
    GENERALISED_LAPLACE,
    GENERALISED_LAPLACE.of(GeneralisedLaplace(1.0, 1.5)),  # between Laplace and Gaussian
    GENERALISED_LAPLACE.of(  # the largest exponent; the contract suite has it as a Gaussian
        GeneralisedLaplace(1.0, 2.0), smooth_at_zero=True, suites=(PROFILE, MODULE, DEVICES)
    ),
    MATERN52,
]


def cases(suite: str, backend: str = "torch") -> list[KernelCase]:
    """The cases of a suite that a backend serves."""
    return [case for case in CASES if suite in case.suites and backend not in case.without]


def one_of_each_class(given: list[KernelCase]) -> list[KernelCase]:
    """The first case of every class."""
    return list({type(case.kernel): case for case in reversed(given)}.values())[::-1]


def case_of(kernel: Any) -> KernelCase:
    """The first case of the kernel's class: its formulas hold for the kernel."""
    return next(case for case in CASES if type(case.kernel) is type(kernel))
