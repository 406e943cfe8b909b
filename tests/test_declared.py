"""What kernels say of themselves, against their definitions; and that every kernel of the library is in the suites."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass

import numpy as np
import pytest
import torch
from fastagop.kernels import radial
from fastagop.kernels.families import angles, coordinates, dot_product
from fastagop.kernels.profile import Kernel
from kernel_cases import CASES, MODULE, PROFILE, cases
from pair_cases import KERNELS, defined

import fastagop

DECLARED = {**{repr(case.kernel): case.kernel for case in CASES}, **KERNELS}


def library_kernels() -> list[type[Kernel]]:
    """The kernel classes that users make, of the modules in which kernels are defined."""
    found = []
    for module in (radial, angles, coordinates, dot_product):
        own = [one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__]
        found += [one for one in own if issubclass(one, Kernel) and is_dataclass(one) and one is not radial.Radial]
    return found


@pytest.mark.parametrize("kernel", library_kernels(), ids=lambda kernel: kernel.__name__)
def test_a_kernel_of_the_library_is_public_and_in_the_suites(kernel):
    in_suites = {type(kernel) for kernel in DECLARED.values()}
    assert kernel in in_suites, "add an entry to CASES of tests/kernel_cases.py, or of tests/pair_cases.py"
    assert kernel.__name__ in fastagop.__all__, "export it in fastagop/__init__.py, and name it in __all__"


@pytest.mark.parametrize("kernel", DECLARED.values(), ids=list(DECLARED))
@pytest.mark.parametrize("length", [0.5, 3.0])
def test_what_a_kernel_declares_is_true_of_its_definition(kernel, length):
    """Where it declares nothing, it may hold or not."""
    generator = torch.Generator().manual_seed(0)
    x, z = (length * torch.randn(60, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x[:5] = 0.1 * x[:5] - z[:5]  # nearly opposite points, of which dot products are most negative
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    k = defined(kernel, x, z)
    close = 1e-9 * (1.0 + k.abs())
    if kernel.shift_invariant:
        moved = defined(kernel, x + 2.0, z + 2.0)
        assert bool(((moved - k).abs() <= close).all()), "shift_invariant is declared, and k(x + a, z + a) != k(x, z)"
    if kernel.rotation_invariant:
        turned = defined(kernel, x @ turn, z @ turn)
        assert bool(((turned - k).abs() <= close).all()), "rotation_invariant is declared, and k(Qx, Qz) != k(x, z)"
    if kernel.unit_diagonal:
        same = defined(kernel, x, x.clone())
        assert bool(((same - 1.0).abs() <= 1e-9).all()), "unit_diagonal is declared, and k(x, x) != 1"
    if kernel.nonnegative:
        assert float(k.min()) >= 0.0, "nonnegative is declared, and there are negative values"


@pytest.mark.parametrize("case", cases(MODULE), ids=str)
def test_a_case_says_whether_its_kernel_is_smooth_at_zero(case):
    """Phi is twice differentiable there where the weight has a limit; its class then gives that limit."""
    near, nearer = case.weight(case.kernel, np.float64(1e-6)), case.weight(case.kernel, np.float64(1e-8))
    smooth = bool(abs(near / nearer - 1.0) <= 1e-4)
    assert case.smooth_at_zero == smooth, f"smooth_at_zero of the case must be {smooth}, by its weight near zero"
    limit = case.kernel._weight_at_zero
    assert limit == pytest.approx(float(nearer) if smooth else 0.0, rel=1e-5), "_weight_at_zero of the class"


@pytest.mark.parametrize("case", cases(PROFILE), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_value_exceeds_1(case, dtype):
    """Also not by a rounding, as a polynomial times an exponential does near zero."""
    sq = torch.logspace(-20, 2, 200_001, dtype=torch.float64).to(dtype)
    assert float(case.kernel.value_(sq).max()) <= 1.0
