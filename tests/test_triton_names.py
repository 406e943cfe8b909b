"""What versions of Triton know a device function by, and a result that a CUDA graph's capture may not read."""

import pytest
import torch
from fastagop.kernels.pair_backend import blocks

from fastagop import Gaussian, Laplace, Polynomial

profile = pytest.importorskip("fastagop.kernels.triton_backend.profile")


def name(kernel) -> str:
    return profile.device_profile(kernel).fn.__name__


def test_functions_of_other_texts_have_other_names():
    """Triton 3.3 to 3.5 launch for a function what was compiled for another one of its name."""
    assert name(Polynomial(degree=2)).startswith("Polynomial_")
    assert name(Polynomial(degree=2)) != name(Polynomial(degree=5))
    assert name(Laplace(1.0)) == name(Laplace(2.0))  # its bandwidth is loaded
    assert len({name(kernel) for kernel in (Laplace(1.0), Gaussian(1.0), Polynomial(degree=2))}) == 3


def test_triton_3_2_takes_functions(monkeypatch):
    """It refuses arguments that can be called, by this name of its module."""
    monkeypatch.setattr(profile.jit, "callable", callable, raising=False)
    monkeypatch.setattr(profile, "version", lambda: (3, 2))
    function = profile.jit.JITFunction(test_functions_of_other_texts_have_other_names)
    profile._take_functions()
    assert not profile.jit.callable(function)
    assert profile.jit.callable(len)


def test_results_are_not_read_in_a_capture(monkeypatch):
    result = torch.tensor([torch.inf])
    with pytest.raises(ValueError, match="X is so large that kernel values leave"):
        blocks.checked(result, "kernel values", torch.float32)
    monkeypatch.setattr(blocks, "readable", lambda value: False)
    assert blocks.checked(result, "kernel values", torch.float32) is result
