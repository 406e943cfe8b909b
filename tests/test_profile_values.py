"""Profiles whose factors leave float32, though their product with what they scale does not."""

from __future__ import annotations

import math

import pytest
import torch

from fastagop import Gaussian, Laplace


def float32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(("bandwidth", "r"), [(1e25, 1e-5), (1e25, 1e3), (1e-20, 3e-19), (1e-20, 2.5e-19)])
def test_the_laplace_weight_where_the_square_of_its_bandwidth_leaves_float32(bandwidth, r):
    """exp(-r / L) / (L r), in Python's floats."""
    expected = math.exp(-r / bandwidth) / (bandwidth * r)
    assert 1e-38 < expected < 3e38
    assert float(Laplace(bandwidth).weight_(float32(r * r))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bandwidth", [1e-20, 1e-21])
def test_the_laplace_weight_from_its_value_where_one_over_the_square_overflows(bandwidth):
    """-k / (L^2 ln k) of a value near float32's least."""
    value = float(float32(1e-30))
    expected = -value / math.log(value) / bandwidth**2
    assert float(Laplace(bandwidth).weight_from_value_(float32(value))) == pytest.approx(expected, rel=1e-4)


def test_the_gaussian_weight_vanishes_where_its_bandwidth_has_no_square():
    """L = 1e-30: every distance that float32 squares is beyond all bandwidths, also the least one."""
    assert Gaussian(1e-30).weight_(float32(1e-45, 1e-40, 1.0)).tolist() == [0.0, 0.0, 0.0]
    assert Gaussian(1e-30).weight_from_value_(float32(1.0, 0.0)).tolist() == [0.0, 0.0]
