"""Random feature maps: the same draw everywhere, and the kernel that cosines approximate."""

import math
import threading

import numpy as np
import pytest
import torch

import fastagop
from fastagop.deep_rfm import random_features
from fastagop.deep_rfm.random_features import RandomFeatures

LIKE = torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("name", ["relu", "cos"])
def test_seed_and_dtype(name):
    wide = RandomFeatures(name, 11).draw(7, 3, LIKE)
    again = RandomFeatures(name, 11).draw(7, 3, LIKE)
    narrow = RandomFeatures(name, 11).draw(7, 3, LIKE.float())
    other = RandomFeatures(name, 11).draw(7, 4, LIKE)
    assert torch.equal(wide.weight, again.weight)
    assert torch.equal(wide.weight.float(), narrow.weight)
    assert not torch.equal(wide.weight, other.weight)


def test_relu_is_relu_of_gaussian_projections():
    X = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi = RandomFeatures("relu", 20_000).draw(7, 0, LIKE)
    assert torch.equal(phi(X), (X @ phi.weight.T).clamp(min=0))
    # Standard Gaussian: mean 0 and variance 1, within five standard errors of 140,000 draws.
    assert abs(float(phi.weight.mean())) < 5 / math.sqrt(140_000)
    assert abs(float(phi.weight.var()) - 1) < 5 * math.sqrt(2 / 140_000)


def test_cosines_approximate_the_l1_laplacian():
    """E phi(x).phi(z) = exp(-scale ||x - z||_1); the mean of width products bounded by 2 has error 1/sqrt(width)."""
    rng = np.random.default_rng(1)
    X = torch.from_numpy(rng.normal(size=(6, 4)))
    scale, width = 0.3, 40_000
    phi = RandomFeatures("cos", width, scale).draw(4, 0, LIKE)(X)
    expected = torch.exp(-scale * torch.cdist(X, X, p=1.0))
    assert (phi @ phi.T - expected).abs().max() < 5 / math.sqrt(width)


def test_phases_fill_the_whole_circle():
    """b is uniform on [0, 2 pi): mean pi, variance pi^2 / 3, within four standard errors of 20,000 draws."""
    bias = RandomFeatures("cos", 20_000).draw(3, 0, LIKE).bias
    assert 0 <= float(bias.min()) < 0.01
    assert 2 * math.pi - 0.01 < float(bias.max()) < 2 * math.pi
    assert float(bias.mean()) == pytest.approx(math.pi, abs=4 * math.pi / math.sqrt(3 * 20_000))
    assert float(bias.var()) == pytest.approx(math.pi**2 / 3, rel=0.03)


@pytest.mark.parametrize("name", ["relu", "cos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beside", [False, True])
def test_drawn_beside_a_gpu(name, dtype, beside, monkeypatch):
    """The same bits, from a thread that starts before they are asked for; elsewhere nothing is drawn until then."""
    drawn, started, by = RandomFeatures._drawn, threading.Event(), []

    def noted(self, *args):
        by.append(threading.get_ident())
        started.set()
        return drawn(self, *args)

    monkeypatch.setattr(RandomFeatures, "_drawn", noted)
    monkeypatch.setattr(random_features, "on_gpu", lambda device: beside)
    features, like = RandomFeatures(name, 11), LIKE.to(dtype)
    ahead = features.drawing(7, 3, like)
    assert started.wait(10.0 if beside else 0.0) == beside
    found, wanted = ahead(), features.draw(7, 3, like)
    assert (by[0] != threading.get_ident()) == beside
    for one, other in ((found.weight, wanted.weight), (found.bias, wanted.bias)):
        assert one is other is None or (one.dtype == dtype and torch.equal(one, other))
    rng = np.random.default_rng(3)
    if name == "relu":
        assert torch.equal(found.weight, torch.from_numpy(rng.standard_normal((11, 7))).to(dtype))


def test_an_error_of_the_thread_is_the_callers(monkeypatch):
    def refuse(self, *args):
        raise MemoryError("no room")

    monkeypatch.setattr(RandomFeatures, "_drawn", refuse)
    monkeypatch.setattr(random_features, "on_gpu", lambda device: True)
    with pytest.raises(MemoryError, match="no room"):
        RandomFeatures("relu", 11).drawing(7, 3, LIKE)()


def test_layers_are_the_same_to_the_bit(normal, monkeypatch):
    X, y = normal(60, 6), torch.arange(60) % 3
    made = []
    for beside in (False, True):
        monkeypatch.setattr(random_features, "on_gpu", lambda device, beside=beside: beside)
        made.append(fastagop.DeepRFMClassifier(depth=2, width=16, random_state=0).fit(X, y).decision_function(X))
    assert torch.equal(*made)
