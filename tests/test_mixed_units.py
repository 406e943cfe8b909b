"""Collapse measures of features in mixed units, far from zero, tiny or coarse: against long double, by the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastagop import collapse

LONG = np.longdouble
# Rounding of the truth itself: about 1e-19 where long double has 64 bits or more, else it is no better than ours.
pytestmark = pytest.mark.skipif(np.finfo(LONG).eps > 1e-18, reason="long double is float64 here")
SIZES = (31, 4, 12, 20)
LABELS = np.random.default_rng(5).permutation(np.repeat([3, -1, 8, 40], SIZES))


def centred_means(X, y, of_all):
    """Class means minus the mean of all samples (or of the class means), (K, d), long double."""
    X = np.asarray(X).astype(LONG) - np.asarray(X)[0].astype(LONG)  # exact: subtracted before anything is summed
    means = np.stack([X[y == c].mean(0) for c in np.unique(y)])
    centre = X.mean(0) if of_all else means.mean(0)
    return X, means, centre


def true_nc1(X, y):
    X, means, centre = centred_means(X, y, of_all=True)
    places = np.searchsorted(np.unique(y), y)
    return float(((X - means[places]) ** 2).sum() / len(X) / (((means - centre) ** 2).sum() / len(means)))


def unit(rows):
    rows = rows / np.abs(rows).max(1, keepdims=True)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def true_nc2(X, y):
    _, means, centre = centred_means(X, y, of_all=True)
    H, K = unit(means - centre), len(means)
    return float(np.sqrt(((H @ H.T - (K * np.eye(K) - 1) / (K - 1)) ** 2).sum()))


def true_gram(X, y):
    X, _, centre = centred_means(X, y, of_all=False)
    R = unit(X[np.argsort(y, kind="stable")] - centre)
    return (R @ R.T).astype(np.float64)


def plain(seed=0, d=6, within=1.0):
    rng = np.random.default_rng(seed)
    classes = {c: 2 * rng.normal(size=d) for c in np.unique(LABELS)}
    return np.stack([classes[c] for c in LABELS]) + within * rng.normal(size=(len(LABELS), d))


def column(X, values):
    return np.concatenate([X, np.reshape(values, (len(X), 1))], 1)


def seconds(seed=1):
    """Time stamps over a day, no class in them."""
    return 1.7e9 + 86400 * np.random.default_rng(seed).random(len(LABELS))


UNITS = np.array([1e-9, 1e-3, 1.0, 1.0, 1e4, 1e12])
KINDS = {
    "mixed units": plain() * UNITS,
    "mixed units, collapsed": plain(within=1e-9) * UNITS,
    "offsets of 1e9": plain() + 1e9 * np.arange(6),
    "offsets of 1e12": plain() - 1e12,
    "offsets in float32": (plain() + 1e4).astype(np.float32),
    "an offset and collapse in float32": (plain(within=1e-7) + 1.0).astype(np.float32),
    "collapse to one unit in the last place": (plain(within=6e-8) + 4.0).astype(np.float32),
    "time stamps": column(plain(), seconds()),
    "time stamps in nanoseconds": column(plain(), 1e9 * seconds()),
    "constant columns": np.concatenate([np.full((len(LABELS), 2), 1.7e18), plain(), np.full((len(LABELS), 1), 0.1)], 1),
    "tiny": 1e-30 * plain(),
    "tiny in float32": (1e-30 * plain()).astype(np.float32),
    "tiny beside large": column(1e-130 * plain(), 1e12 + 3.7 * np.arange(len(LABELS))),
    "squares below float64": 1e-200 * plain(),
    "subnormal": 1e-310 * plain(),
    "subnormal in float32": (1e-41 * plain()).astype(np.float32),
    "large": 1e139 * plain() / 10,
    "whole numbers": np.round(10 * plain()),
    "whole numbers far out": np.round(10 * plain()) + 2.0**52,
    "half precision": plain().astype(np.float16),
    "half precision, offset": (plain() + 100).astype(np.float16),
    "two columns, one class each": column(plain(d=1), (LABELS == 8) * 1e15),
}


@pytest.mark.parametrize("X", KINDS.values(), ids=KINDS.keys())
def test_against_long_double(X):
    bound = 1e-12  # a few hundred roundings of float64, relative to what is measured
    assert collapse.nc1(X, LABELS) == pytest.approx(true_nc1(X, LABELS), rel=bound)
    assert collapse.nc2(X, LABELS) == pytest.approx(true_nc2(X, LABELS), rel=bound, abs=bound)
    G = collapse.gram(X, LABELS)
    assert G.dtype == X.dtype
    np.testing.assert_allclose(G, true_gram(X, LABELS), rtol=0, atol=max(bound, np.finfo(X.dtype).eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_coarse_tensors_are_measured_as_they_are_stored(dtype):
    X = torch.from_numpy(plain() + 3.0).to(dtype)
    stored = X.double().numpy()
    assert collapse.nc1(X, LABELS) == pytest.approx(true_nc1(stored, LABELS), rel=1e-12)
    assert collapse.nc2(X, LABELS) == pytest.approx(true_nc2(stored, LABELS), rel=1e-12)
    G = collapse.gram(X, LABELS).double().numpy()
    np.testing.assert_allclose(G, true_gram(stored, LABELS), rtol=0, atol=torch.finfo(dtype).eps)


def test_constant_columns_change_nothing():
    X = plain()
    for value in (0.1, 1.7e9, -1e18, 1e100):
        wide = column(X, np.full(len(X), value))
        assert collapse.nc1(wide, LABELS) == collapse.nc1(X, LABELS)
        assert collapse.nc2(wide, LABELS) == collapse.nc2(X, LABELS)
        np.testing.assert_allclose(collapse.gram(wide, LABELS), collapse.gram(X, LABELS), rtol=0, atol=1e-15)


@pytest.mark.parametrize("T", [1.0, 1e6, 1e9, 1e15, 1e30])
def test_a_class_in_the_middle_of_a_large_column(T):
    """Means (-T, -1), (0, 2), (T, -1): the middle class is seen along the small column, at right angles to both."""
    X, y = np.array([[1.7e9 - T, -1.0], [1.7e9, 2.0], [1.7e9 + T, -1.0]]), np.arange(3)
    if T > 1e15:
        X[:, 0] = [-T, 0.0, T]
    cosines = np.array([[1.0, -2.0 / math.hypot(T, 1) * 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    cosines[0, 1] = cosines[1, 2] = -1.0 / math.hypot(T, 1.0)
    cosines[0, 2] = (1.0 - T * T) / (1.0 + T * T)
    cosines = np.triu(cosines) + np.triu(cosines, 1).T
    expected = np.sqrt(((cosines - (3 * np.eye(3) - 1) / 2) ** 2).sum())  # 1.2247 for large T
    for each in (X, np.repeat(X, 5, axis=0)):
        assert collapse.nc2(each, np.repeat(y, len(each) // 3)) == pytest.approx(expected, rel=1e-12)


def test_rounding_of_a_large_column_does_not_outweigh_the_others():
    """A column whose middle class would be at the global mean but for the rounding of the features."""
    rng = np.random.default_rng(3)
    X, y = np.array([[1e16, -1.0], [2e16 + 4, 2.0], [3e16, -1.0]]), np.arange(3)  # neighbours of 2e16 are 4 apart
    assert collapse.nc2(X, y) == pytest.approx(math.sqrt(1.5), rel=1e-12)
    X = np.repeat(X, 4, axis=0) + 0.1 * np.outer(rng.normal(size=12), [0.0, 1.0])
    assert collapse.nc2(X, np.repeat(y, 4)) == pytest.approx(math.sqrt(1.5), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("copies", [1, 100])  # rounding errors of copies do not average out
def test_a_class_mean_at_the_global_mean_counts_as_zero_in_every_dtype(dtype, copies):
    X = torch.tensor([[0.1, 0.7], [0.2, 0.7], [0.3, 0.7]], dtype=torch.float64).to(dtype).repeat(copies, 1)
    y = torch.arange(3).repeat(copies)
    assert collapse.nc2(X, y) == pytest.approx(math.sqrt(1 + 6 * 0.25), rel=1e-12)
    G = collapse.gram(X, y).double()
    assert bool((G[copies : 2 * copies] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_means_up_to_rounding_in_every_dtype(dtype):
    base = torch.tensor([[0.1, 1e3], [0.2, 3e3], [0.3, 5e3], [0.4, 7e3]], dtype=torch.float64)
    X = torch.cat([base, base.mean(0) + base - base.mean(0), 2 * base.mean(0) - base]).to(dtype)
    with pytest.raises(collapse.EqualMeansError):
        collapse.nc1(X, torch.arange(3).repeat_interleave(4))


def test_means_that_differ_by_less_than_a_rounding_of_samples_are_told_apart():
    """Rounding errors of many spread samples average out, so their means hold more digits than they do."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 20000)
    X = torch.from_numpy(rng.normal(size=(40000, 3)) + 3 + 0.01 * y[:, None]).bfloat16()  # spacing .0156
    assert collapse.nc1(X, y) == pytest.approx(true_nc1(X.double().numpy(), y), rel=1e-12)


def test_integer_labels_and_single_samples_per_class():
    X = plain()[:5] * UNITS + 1e9
    y = np.arange(5)
    assert collapse.nc1(X, y) == 0.0
    assert collapse.nc2(X, y) == pytest.approx(true_nc2(X, y), rel=1e-12)


def test_stages_agree_with_single_measures():
    found_nc1, found_nc2 = collapse.of_stages({"a": torch.from_numpy(plain()), "b": torch.ones(67, 2)}, LABELS)
    assert found_nc1 == {"a": collapse.nc1(plain(), LABELS), "b": math.inf}
    assert found_nc2 == {"a": collapse.nc2(plain(), LABELS), "b": math.inf}


def test_random_features_never_give_nan():
    """Any mixture of units, offsets and dtypes: a number, or the documented error."""
    rng = np.random.default_rng(11)
    for _ in range(300):
        n, d = rng.integers(2, 12), rng.integers(1, 5)
        units, offsets = 10.0 ** rng.integers(-300, 130, d), 10.0 ** rng.integers(-300, 130, d)
        X = rng.integers(-2, 3, (n, d)) * units + offsets * rng.integers(-1, 2, d)
        y = np.append([0, 1], rng.integers(0, 3, n - 2))
        try:
            values = [collapse.nc1(X, y), collapse.nc2(X, y)]
        except collapse.EqualMeansError:
            continue
        assert np.isfinite(values).all()
        assert min(values) >= 0
        assert np.isfinite(collapse.gram(X, y)).all()
