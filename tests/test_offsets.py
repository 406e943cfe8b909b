"""Data far from zero: offsets are subtracted before anything is rounded, and targets are learned from their mean on."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import fastagop
from fastagop import DeepRFMRegressor, Laplace, RFMClassifier, RFMRegressor
from fastagop.rfm import preparation


def smooth(n=150, d=4, seed=0):
    X = np.random.default_rng(seed).normal(size=(n, d))
    return X, np.sin(X[:, 0]) + 0.5 * X[:, 1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("offset", "kind"),
    [(1e7, "numpy"), (1.7e9, "torch"), (-3e8, "list"), ([0.0, 1e7, 1.7e9, -1e5], "pandas")],
    ids=["1e7", "1.7e9", "-3e8", "mixed"],
)
def test_offsets_of_features(dtype, offset, kind):
    """Time stamps and coordinates: the kernel sees differences only, so M and predictions stay."""
    X, y = smooth()
    Z, z = smooth(100, seed=1)
    far, beyond = (2.0**-20 * np.round((A + offset) * 2.0**20) for A in (X, Z))
    near, at = far - offset, beyond - offset  # exact
    if kind == "pandas":
        pandas = pytest.importorskip("pandas")
        far, beyond = pandas.DataFrame(far), pandas.DataFrame(beyond)
    elif kind != "numpy":
        make = {"torch": torch.from_numpy, "list": np.ndarray.tolist}[kind]
        far, beyond = make(far), make(beyond)
    plain = RFMRegressor(Laplace(5.0), iterations=2, dtype=dtype).fit(near, y)
    model = RFMRegressor(Laplace(5.0), iterations=2, dtype=dtype).fit(far, y)
    tolerance = 1e-4 if dtype == "float32" else 1e-7
    np.testing.assert_allclose(model.M_, plain.M_, atol=tolerance)
    np.testing.assert_allclose(model.predict(beyond), plain.predict(at), atol=tolerance)
    assert model.score(beyond, z) > 0.9


@pytest.mark.parametrize("X", [np.int64, np.int32, np.uint64, "torch.int64"], ids=str)
def test_integer_features_beyond_float32(X):
    """Integers from 2^24 on, which float32 rounds."""
    steps = np.random.default_rng(0).integers(0, 40, size=(300, 2))
    y = np.sin(steps[:, 0] / 8.0) + 0.02 * steps[:, 1]
    far = steps + 2**30 + 1
    far = torch.from_numpy(far) if X == "torch.int64" else far.astype(X)
    model = RFMRegressor(Laplace(20.0), iterations=1).fit(far[:200], y[:200])
    plain = RFMRegressor(Laplace(20.0), iterations=1).fit(steps[:200].astype(float), y[:200])
    np.testing.assert_allclose(np.asarray(model.predict(far[200:])), plain.predict(steps[200:]), atol=1e-5)


def test_a_few_fill_values_do_not_spoil_an_offset():
    X, y = smooth()
    X[:, 2] += 1.7e9
    X[::50, 2] = 0.0
    kept = np.arange(len(X)) % 50 != 0
    model = RFMClassifier(Laplace(5.0), iterations=0, ridge=1e-6).fit(X, y > 0)
    other = RFMClassifier(Laplace(5.0), iterations=0, ridge=1e-6, dtype="float64").fit(X, y > 0)
    np.testing.assert_allclose(model.decision_function(X)[kept], other.decision_function(X)[kept], atol=1e-4)


def test_what_lies_around_zero_is_left_alone():
    """Subtracting there would take digits of small entries: bits stay."""
    rng = np.random.default_rng(0)
    for X in (
        rng.normal(size=(50, 3)),
        rng.uniform(size=(50, 3)),
        10.0 ** rng.uniform(-6, 3, size=(50, 3)),
        rng.integers(0, 2, size=(50, 3)).astype(float),
        np.zeros((5, 3)),
    ):
        assert not preparation.offsets(torch.from_numpy(X)).any()
    assert preparation.offsets(torch.full((1, 2), 5.0)).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("outliers", [4, 20])
def test_outliers_leave_an_offset(outliers):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 4))
    near = X[:, 0].copy()
    X[:, 0] = 1e6 + near
    X[:outliers, 0] = 10.0 * np.arange(outliers)
    X = X.astype(np.float32)
    y = np.where(np.arange(300) < outliers, 0.0, np.sin(2 * near) + 0.3 * X[:, 1] ** 2)
    options = {"kernel": Laplace(3.0), "iterations": 3}
    found, exact = (RFMRegressor(dtype=dtype, **options).fit(X, y).predict(X) for dtype in ("float32", "float64"))
    assert np.abs(found - exact)[outliers:].max() < 1e-3


def test_offsets_know_values_not_rows():
    """Copies, the order of rows and the blocks that columns are sorted in do not matter."""
    X = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 7)) + 1e4)
    once = preparation.offsets(X)
    assert (once - 1e4).abs().max() < 1
    assert torch.equal(preparation.offsets(X.repeat(3, 1)[torch.randperm(180)]), once)
    assert torch.equal(preparation.offsets(torch.cat([X, X[:5], X[:1].repeat(300, 1)])), once)
    sorted_at_once = preparation._SORTED
    try:
        preparation._SORTED = 130
        assert torch.equal(preparation.offsets(X), once)
    finally:
        preparation._SORTED = sorted_at_once


@pytest.mark.parametrize("make", [RFMRegressor, DeepRFMRegressor])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [1e7, 1e9, -3e8])
def test_offsets_of_targets(make, dtype, offset):
    X, y = smooth()
    settings = {"iterations": 1} if make is RFMRegressor else {"depth": 1, "width": 64, "random_state": 0}
    y = 2.0**-20 * np.round((y - y.mean()) * 2.0**20)  # the mean is what is subtracted
    settings |= {"kernel": Laplace(5.0), "ridge": 1e-3, "dtype": dtype}
    plain, model = make(**settings).fit(X, y), make(**settings).fit(X, y + offset)
    Z, _ = smooth(100, seed=1)
    np.testing.assert_allclose(model.predict(Z) - offset, plain.predict(Z), atol=1e-5)
    # rows in float32, targets in float64: predictions hold what the targets held
    narrow = Z.astype(np.float32)
    assert model.predict(narrow).dtype == np.float64
    np.testing.assert_allclose(model.predict(narrow) - offset, plain.predict(narrow), atol=1e-5)
    assert model.score(X.astype(np.float32), y + offset) > 0.9
    assert model.predict(torch.from_numpy(narrow)).dtype == torch.float64


@pytest.mark.parametrize(
    ("y", "dtype"),
    [
        (np.float32, np.float32),
        (np.float16, np.float32),
        (np.int8, np.float32),
        (np.float64, np.float64),
        (np.int64, np.float64),
        (">f4", np.float32),
        (">f8", np.float64),
    ],
    ids=str,
)
def test_predictions_hold_what_targets_held(y, dtype):
    X, target = smooth(40)
    target = (8 * target).astype(y)
    model = RFMRegressor(iterations=1).fit(X.astype(np.float32), target)
    assert model.predict(X.astype(np.float32)).dtype == dtype
    assert model.predict(X).dtype == np.float64


def test_integer_targets_beyond_float32():
    X, y = smooth()
    steps = np.round(1000 * y).astype(np.int64)
    for target in (steps + 2**40, torch.from_numpy(steps + 2**40)):
        model = RFMRegressor(Laplace(5.0), iterations=1).fit(X, target)
        plain = RFMRegressor(Laplace(5.0), iterations=1).fit(X, steps)
        np.testing.assert_allclose(model.predict(X) - 2.0**40, plain.predict(X), atol=1e-2)


@pytest.mark.parametrize("value", [0.1, 1e7 + 0.3, -1e-30, 0.0])
@pytest.mark.parametrize("make", [RFMRegressor, DeepRFMRegressor])
def test_constant_targets(make, value):
    X, _ = smooth(30)
    settings = {} if make is RFMRegressor else {"depth": 1, "width": 16, "random_state": 0}
    for y in (np.full(30, value), np.full((30, 2), value)):
        model = make(**settings).fit(X, y)
        assert np.array_equal(model.predict(X), y)
        assert np.array_equal(np.ravel(model.intercept_), np.ravel(y[0]))


def test_the_mean_is_the_intercept():
    X, y = smooth(50)
    Y = np.stack([y + 50, 1e8 - y], 1)
    w = np.random.default_rng(0).uniform(size=50)
    exact = [
        float(sum(Fraction(a) * Fraction(b) for a, b in zip(w, c, strict=True)) / sum(map(Fraction, w))) for c in Y.T
    ]
    model = RFMRegressor(iterations=1).fit(X, Y, sample_weight=w)
    np.testing.assert_allclose(model.intercept_, exact, rtol=4e-16)
    assert RFMRegressor(iterations=1).fit(X, y).intercept_ == pytest.approx(y.mean(), rel=1e-6)
    plain = RFMRegressor(iterations=1, fit_intercept=False)
    assert plain.fit(X, y).intercept_ == 0.0  # targets that lose nothing enter as they are
    np.testing.assert_allclose(plain.fit(X, Y, sample_weight=w).intercept_, exact, rtol=4e-16)
    tensors = RFMRegressor(iterations=1).fit(torch.from_numpy(X), torch.from_numpy(Y))
    assert isinstance(tensors.intercept_, torch.Tensor)


def test_far_from_all_points_a_prediction_is_the_mean():
    X, y = smooth(50)
    model = RFMRegressor(iterations=0).fit(X, y + 30)
    assert model.predict(X + 1e6) == pytest.approx(np.mean(y + 30), rel=1e-12)


def test_saved_with_the_file(tmp_path):
    X, y = smooth(60)
    y = np.stack([y + 1e9, y], 1)
    for model in (RFMRegressor(iterations=1), DeepRFMRegressor(depth=1, width=16, random_state=0)):
        X = X + 1e8 if isinstance(model, RFMRegressor) else X - 1e8
        model.fit(X, y).save(tmp_path / "model")
        again = fastagop.load(tmp_path / "model")
        assert np.array_equal(again.predict(X), model.predict(X))
        assert np.array_equal(again.intercept_, model.intercept_)
        assert again.predict(X.astype(np.float32)).dtype == np.float64


def test_the_network_adds_the_mean():
    X, y = smooth(60)
    for target in (y + 1e6, np.stack([y + 1e6, y], 1)):
        model = DeepRFMRegressor(depth=2, width=32, random_state=0).fit(X, target)
        module = model.to_module()
        np.testing.assert_allclose(module(torch.from_numpy(X)).numpy(), model.predict(X), rtol=1e-12)
        other = DeepRFMRegressor(depth=2, width=32, random_state=1).fit(X, target - 5).to_module()
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other(torch.from_numpy(X)), module(torch.from_numpy(X)))


def test_rows_of_deep_rfm_are_normalised_before_they_are_rounded():
    """Rows whose entries float32 rounds, and rows that it does not hold."""
    X, y = smooth(60)
    model = DeepRFMRegressor(depth=1, width=32, random_state=0).fit(X, y)
    for size in (1e300, 1e-300):
        scaled = DeepRFMRegressor(depth=1, width=32, random_state=0).fit(X * size, y)
        np.testing.assert_allclose(scaled.predict(X * size), model.predict(X), atol=1e-4)


@pytest.mark.parametrize(("size", "word"), [(1e200, "large"), (1e-200, "small")])
def test_what_a_dtype_does_not_hold_is_named(size, word):
    X, y = smooth(30)
    with pytest.raises(ValueError, match=f"^X is too {word} for torch.float32.*use dtype='float64'"):
        RFMRegressor().fit(X * size, y)
    for make in (RFMRegressor(), DeepRFMRegressor(depth=1, width=8)):
        with pytest.raises(ValueError, match=f"^y is too {word} for torch.float32.*use dtype='float64'"):
            make.fit(X, y * size)
    with pytest.raises(ValueError, match=r"^[yY] is so large that"):
        RFMRegressor(dtype="float64").fit(X, np.where(y > 0, 1.7e308, -1.7e308))
