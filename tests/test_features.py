"""Random feature maps: the same draw everywhere, and the kernel that cosines approximate."""

import math
import pickle
import threading

import numpy as np
import pytest
import torch

import fastagop
from fastagop.deep_rfm import layer as deep
from fastagop.deep_rfm import random_features
from fastagop.deep_rfm.layer_files import pack_layer, unpack_layer
from fastagop.deep_rfm.random_features import FeatureKind, RandomFeatures

LIKE = torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("name", random_features.FEATURES)
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


@pytest.mark.parametrize("name", random_features.FEATURES)
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


@pytest.fixture
def tanh(monkeypatch):
    """A kind that is registered by one entry of the table: tanh(W x + b), W and b Gaussian, W scaled."""

    def draw(rng, width, d):
        return rng.standard_normal((width, d)), rng.standard_normal(width)

    monkeypatch.setitem(random_features.FEATURES, "tanh", FeatureKind(draw, torch.tanh_, 2.0))
    return {"features": "tanh", "depth": 2, "width": 16, "dtype": "float64", "random_state": 0}


def test_a_kind_is_one_entry_of_the_table(tanh, normal, tmp_path):
    """It fits, maps new rows, is saved, loaded and resumed, and becomes a module."""
    X, y = normal(60, 6), torch.arange(60) % 3
    model = fastagop.DeepRFMClassifier(**tanh, checkpoint_dir=tmp_path / "layers").fit(X, y)
    first = model._layers[0]
    projected = deep.normalise_rows(X.double()) @ first.root
    torch.testing.assert_close(
        model.transform(X.double(), layer=1), torch.tanh(projected @ first.weight.T + first.bias)
    )
    rng = np.random.default_rng(deep.seeds(np.random.RandomState(0), 2)[0])
    assert np.array_equal(first.weight.numpy(), 2.0 * rng.standard_normal((16, 6)))
    model.save(tmp_path / "model")
    again, answer = fastagop.load(tmp_path / "model"), model.decision_function(X)
    assert repr(again._layers[1]) == repr(model._layers[1])
    assert "tanh features 16" in repr(again._layers[1])
    resumed = fastagop.DeepRFMClassifier(**tanh, checkpoint_dir=tmp_path / "layers").fit(X, y)
    for other in (again, resumed):
        assert torch.equal(other.decision_function(X), answer)
    module = model.to_module()
    torch.testing.assert_close(module(X), answer)
    torch.testing.assert_close(torch.export.export(module, (X,)).module()(X), answer)


def test_a_kind_that_is_not_there(tanh, normal, tmp_path, monkeypatch):
    X = normal(20, 3)
    fastagop.DeepRFMRegressor(**tanh, feature_scale=0.5).fit(X, X[:, 0]).save(tmp_path / "model")
    scaled = " or ".join(
        repr(name) for name, kind in random_features.FEATURES.items() if kind.default_scale is not None
    )
    assert scaled.endswith("or 'tanh'")
    with pytest.raises(ValueError, match=f"the positive scale of features={scaled} and None otherwise, got 0.5"):
        fastagop.DeepRFMRegressor(feature_scale=0.5).fit(X, X[:, 0])
    monkeypatch.delitem(random_features.FEATURES, "tanh")
    with pytest.raises(ValueError, match="model: its layers have features 'tanh', which this version"):
        fastagop.load(tmp_path / "model")
    with pytest.raises(ValueError, match=r"features must be one of 'relu', 'cos'.*, got 'tanh'"):
        fastagop.DeepRFMRegressor(**tanh).fit(X, X[:, 0])


@pytest.mark.parametrize("name", ["relu", "cos"])
def test_layers_of_files_that_name_no_kind(name, normal):
    X = normal(20, 3)
    model = fastagop.DeepRFMRegressor(depth=1, width=8, features=name, random_state=0).fit(X, X[:, 0])
    tensors, metadata = pack_layer(model._layers[0])
    assert metadata.pop("map") == name
    assert unpack_layer(tensors, metadata, X.device).kind == name


@pytest.mark.parametrize("features", ["relu", "cos"])
def test_pickles_of_earlier_versions_lack_the_kind(features):
    X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    model = fastagop.DeepRFMClassifier(depth=2, width=8, features=features, random_state=0, device="cpu")
    model.fit(X, (X[:, 0] > 0).long())
    expected = model.decision_function(X)
    for layer in model._layers:
        del layer.kind
    again = pickle.loads(pickle.dumps(model))
    assert {layer.kind for layer in again._layers} == {features}
    assert torch.equal(again.decision_function(X), expected)
    assert torch.equal(again.to_module()(X), expected)
