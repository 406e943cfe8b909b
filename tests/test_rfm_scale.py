"""scale="standard": features in their own units, and what is reported in those of the data."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastagop import (
    ArcCosine,
    DeepRFMRegressor,
    Laplace,
    Polynomial,
    RFMClassifier,
    RFMRegressor,
    RFMTreeRegressor,
    load,
)
from fastagop.rfm import coarse
from fastagop.rfm.learning import Rules
from fastagop.solvers import bandwidth


def data(n=60, d=5, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, X[:, 0] * X[:, 1] + 0.3 * X[:, 2]


def model(make=RFMRegressor, **more):
    return make(**{"kernel": Laplace(3.0), "iterations": 2, "dtype": "float64", "scale": "standard", **more})


@pytest.mark.parametrize("diagonal", [False, True])
def test_is_a_standard_scaler_before(diagonal):
    X, y = data()
    X, Z = X * [1, 10, 0.1, 3, 7] + 5, data(9, seed=1)[0] * [1, 10, 0.1, 3, 7]
    ours = model(diagonal=diagonal).fit(X, y)
    theirs = make_pipeline(StandardScaler(), model(diagonal=diagonal, scale=None)).fit(X, y)
    assert np.allclose(ours.predict(Z), theirs.predict(Z), rtol=1e-9, atol=1e-10)
    assert np.allclose(ours.feature_importances_, theirs[-1].feature_importances_, rtol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", [(60, 5), (12, 30)])
def test_the_metric_is_in_the_units_of_the_data(diagonal, shape):
    """(x - z)^T M (x - z) is the squared distance that the kernel sees."""
    X, y = data(*shape)
    X = X * 10.0 ** np.random.default_rng(1).uniform(-3, 3, shape[1])
    fit = model(diagonal=diagonal).fit(X, y)
    M = np.diag(fit.M_) if diagonal else fit.M_
    points, difference = fit.transform(X), X[0] - X[1:]
    expected = ((points[0] - points[1:]) ** 2).sum(1)
    assert np.allclose(np.einsum("ij,jk,ik->i", difference, M, difference), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_units_and_offsets_do_not_matter(dtype):
    X, y = data()
    Z = data(9, seed=1)[0]
    units = 10.0 ** np.random.default_rng(1).uniform(-6, 6, 5)
    near = model(dtype=dtype).fit(X, y).predict(Z)
    bound = 1e-9 if dtype == "float64" else 1e-4
    assert np.allclose(model(dtype=dtype).fit(X * units, y).predict(Z * units), near, atol=bound)
    assert np.allclose(
        model(dtype=dtype).fit(X * units + 1e3 * units, y).predict(Z * units + 1e3 * units), near, atol=bound
    )


def test_numbers_of_any_size():
    X, y = data()
    Z, units = data(9, seed=1)[0], np.array([1e300, 1e-300, 1.0, 1e20, 1e-20])
    near = model().fit(X, y)
    for dtype in ("float32", "float64"):
        far = model(dtype=dtype).fit(X * units, y)
        assert np.allclose(far.predict(Z * units), near.predict(Z), atol=1e-4)
    X[:, 0], X[:, 1] = X[:, 0] * 1e20, X[:, 1] * 1e-20  # their squares leave float32
    assert np.isfinite(model(dtype="float32").fit(X, y).M_).all()


@pytest.mark.parametrize("make", [RFMRegressor, RFMTreeRegressor])
def test_differences_that_leave_float64_are_refused(make):
    X, y = data()
    X[:2, 0] = 1.7e308, -1.7e308
    for scale, message in (
        ("standard", "^X is so large that differences of its rows leave float64; divide X by a constant$"),
        (None, r"^X\[0\] .* torch.float64 cannot hold the distances of both; remove such rows \(fill values\?\)$"),
    ):
        with pytest.raises(ValueError, match=message):
            model(make, scale=scale).fit(X, y)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    ("kernel", "size", "value"),  # value: that of the kernel, which ridge and coefficients follow
    [
        (Polynomial(3, offset=0.0), 1e-5, 1e-30),
        (Polynomial(3, offset=0.0), 1e6, 1e36),
        (1e-24 * Laplace(10.0), 1.0, 1e-24),
        (1e24 * Laplace(10.0), 1.0, 1e24),
        (ArcCosine(0), 1e-20, 1.0),
    ],
    ids=str,
)
def test_kernels_with_values_of_any_size(kernel, size, value, diagonal):
    """Squares of kernel values and of gradients that leave float32."""
    X, y = data()
    narrow, wide = (
        model(kernel=kernel, scale=None, diagonal=diagonal, ridge=1e-3 * value, dtype=dtype).fit(X * size, y)
        for dtype in ("float32", "float64")
    )
    assert np.allclose(narrow.M_, wide.M_, atol=1e-4)
    assert np.allclose(narrow.predict(X * size), wide.predict(X * size), atol=1e-3)


@pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")  # points are far apart in such units
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", [(60, 5), (12, 30)])
@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_a_metric_that_leaves_float32_is_refused(scale, shape, diagonal):
    """Only "max" is without the units of y and X."""
    X, y = data(*shape)
    how = {"kernel": Laplace("median"), "scale": None, "diagonal": diagonal, "dtype": "float32"}
    for features, targets in ((1.0, 1e21), (1.0, 1e-22), (1e-21, 1.0), (1e21, 1.0)):
        with pytest.raises(ValueError, match=f"agop_scale='{scale}' makes entries of M up to .*multiply y or X by a"):
            model(agop_scale=scale, **how).fit(X * features, y * targets)
        assert model(**how).fit(X * features, y * targets).M_.max() == 1.0
    wide = model(agop_scale=scale, **{**how, "dtype": "float64"}).fit(X, y * 1e21)
    assert 1e38 < wide.M_.max() < np.inf


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_layers_hold_an_agop_of_any_size(scale, tmp_path):
    """Their features do not care; roots that leave float32 are refused."""
    X, y = data()
    settings = {"depth": 2, "width": 16, "agop_scale": scale, "random_state": 0, "ridge": 0.1}
    plain = DeepRFMRegressor(**settings).fit(X, y)
    for size in (1e30, 1e-30):
        fit = DeepRFMRegressor(**settings).fit(X, y * size)
        assert plain.agops_[0].dtype == np.float32
        assert np.allclose(fit.agops_[0] / size / size, plain.agops_[0], rtol=1e-4, atol=1e-4 * plain.agops_[0].max())
        assert np.allclose(fit.predict(X) / size, plain.predict(X), atol=1e-4)
        fit.save(tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert np.array_equal(loaded.agops_[0], fit.agops_[0])
        assert np.array_equal(loaded.predict(X), fit.predict(X))
    with pytest.raises(ValueError, match=rf"agop_scale='{scale}' makes entries of M\^\(1/2\) up to "):
        DeepRFMRegressor(**{**settings, "ridge": 1e6}).fit(X, y * 1e-36)


@pytest.mark.parametrize("how", [{}, {"diagonal": True}, {"center": True}], ids=str)
@pytest.mark.parametrize("n", [60, 600])
def test_a_huge_ridge(n, how):
    """Squares of such coefficients leave float32."""
    X, y = data(n)
    narrow, wide = (model(ridge=1e25, iterations=1, dtype=dtype, **how).fit(X, y) for dtype in ("float32", "float64"))
    assert np.allclose(narrow.M_, wide.M_, atol=1e-4)


def test_small_coefficients_of_coarse_fits():
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sq, alpha = torch.cdist(x, x).square().float(), x[:, :2].float()
    fit = coarse._CoarseRegression(Laplace(3.0), 1.0, alpha, None)
    K = Laplace(3.0).value_(sq.clone())
    M, small = (fit.agop(sq, K, x, size * alpha, Rules(1)) for size in (1.0, 2.0**-90))
    assert torch.allclose(small * 2.0**180, M, rtol=1e-6)


def test_constant_features_stay_out():
    """Also those that differ by rounding only, whatever their size."""
    X, y = data()
    Z, noise = data(9, seed=1)[0], np.random.default_rng(2).integers(0, 2, 60)
    for column in (np.zeros(60), np.full(60, -7.0), 1e20 + 16384.0 * noise):
        more = model().fit(np.c_[X, column], y)
        assert np.allclose(more.predict(np.c_[Z, np.full(9, column[0])]), model().fit(X, y).predict(Z), atol=1e-9)
        assert more.feature_importances_[-1] <= 1e-12


def test_one_row_weights_and_kinds():
    X, y = data()
    assert model().fit(X[:1], y[:1]).predict(X[:1]) == pytest.approx(y[:1])
    weights = np.where(np.arange(60) % 3 == 0, 2.0, 1.0)
    twice = np.repeat(np.arange(60), weights.astype(int))
    Z = data(9, seed=1)[0]
    assert np.allclose(model().fit(X, y, weights).predict(Z), model().fit(X[twice], y[twice]).predict(Z), atol=1e-9)
    whole = np.round(X * 3).astype(int)
    assert np.array_equal(model().fit(whole, y).predict(whole), model().fit(whole.astype(float), y).predict(whole))
    flags = X > 0
    assert np.array_equal(model().fit(flags, y).predict(flags), model().fit(flags * 1.0, y).predict(flags))


def test_large_offsets_in_float32():
    X, y = data()
    X = np.round(X * 64)  # numbers that float32 holds beside the offset
    far = (X + 2.0**20).astype(np.float32)
    near = model(RFMClassifier, dtype="float32").fit(X, y > 0).decision_function(X)
    assert np.allclose(model(RFMClassifier, dtype="float32").fit(far, y > 0).decision_function(far), near, atol=1e-5)


@pytest.mark.parametrize("scale", [None, "standard"])
@pytest.mark.parametrize("shape", [(40, 4), (9, 14)])
@pytest.mark.parametrize("parameters", [{}, {"diagonal": True}, {"iterations": 0}], ids=str)
@pytest.mark.parametrize("make", [RFMRegressor, RFMClassifier])
def test_gradients_are_differences(make, parameters, shape, scale):
    """In the units of the data, against central differences."""
    X, y = data(*shape)
    units = np.linspace(0.5, 4.0, shape[1])
    X, y = X * units, y if make is RFMRegressor else y > 0
    fit = model(make, scale=scale, **parameters).fit(X, y)
    Z, step = X[:3] + 0.3 * units, 1e-5

    def f(Z):
        return fit.predict(Z) if make is RFMRegressor else fit.decision_function(Z)

    steps = step * np.diag(units)
    expected = np.stack([(f(Z + e) - f(Z - e)) / (2 * e.max()) for e in steps], 1)
    found = fit.gradients(Z)[:, -1]  # of the second class
    assert np.abs(found - expected).max() <= 1e-7 * max(1.0, np.abs(expected).max())


# ---- units in which the default bandwidth says nothing


def told(fit) -> list[str]:
    """What a fit warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("n", [300, 600])
def test_a_bandwidth_that_leaves_constants_is_told(n, iterations):
    """Kernel values need not be 0 or 1 to rounding for predictions to be worth nothing."""
    random = np.random.default_rng(0)
    X = random.normal(size=(n + 100, 6))
    y = X[:, 0] * X[:, 1] + X[:, 2]
    train, test = slice(0, n), slice(n, None)
    for unit, words in ((200.0, "sum to .*next to nothing about others"), (1e-8, "look alike"), (3e-7, "look alike")):
        model = RFMRegressor(iterations=iterations)
        (text,) = told(lambda model=model, unit=unit: model.fit(unit * X[train], y[train]))
        assert re.search(f"at bandwidth 10 .*{words}", text)
        assert abs(model.score(unit * X[test], y[test])) < 0.1
        if "all but constant" in text:
            assert "such as kernel=Laplace('median') has, or scale='standard'" in text
    for how in ({"scale": "standard"}, {"kernel": Laplace("median")}, {"ridge": 1e9, "scale": "standard"}):
        weights = {} if iterations else {"sample_weight": np.full(n, 1e-9)}
        assert (
            told(lambda how=how, w=weights: RFMRegressor(iterations=0, **how).fit(200.0 * X[train], y[train], **w))
            == []
        )


def test_what_tells_that_a_kernel_is_faint():
    X = torch.arange(5000, dtype=torch.float64)[:, None]
    for L, ridge, words in (
        (0.1, 0.0, "sum to 9.1e-05"),
        (0.3, 0.0, ""),
        (1e9, 0.0, ""),
        (1e9, 1e4, "but for 1.7e-06, which the ridge 1e+04 outweighs"),
        (1e3, 1e9, ""),  # a ridge that outweighs everything is no matter of the bandwidth
    ):
        for unit in (1.0, 2.0**60):
            text = bandwidth.faint(Laplace(L * unit), X * unit, ridge)
            assert (words in text) if words else text == ""
    assert bandwidth.faint(Laplace(1e-3), X[:1]) == ""
