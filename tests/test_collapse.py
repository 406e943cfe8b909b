"""NC1, NC2 and the Gram matrix against naive formulas, exact fractions and the laws they obey."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastagop import collapse

EPS = float(np.finfo(np.float64).eps)
SEEDS = st.integers(0, 2**32 - 1)
# Unbalanced, unsorted, negative and with gaps: nothing may take labels for positions or classes for equal.
LABELS = np.array([7, -3, 100, 7, 7, -3, 7, 100, 7, 7, -3, 100])


def features(seed: int = 0, d: int = 5, y: np.ndarray = LABELS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(len(y), d)) + 2 * rng.normal(size=(101 + 4, d))[y + 4]


def naive_nc1(X: np.ndarray, y: np.ndarray) -> float:
    """Definition 3.1 with whole covariance matrices."""
    classes, mu_G = np.unique(y), X.mean(0)
    means = {c: X[y == c].mean(0) for c in classes}
    sigma_w = sum(np.outer(x - means[c], x - means[c]) for x, c in zip(X, y, strict=True)) / len(X)
    sigma_b = sum(np.outer(means[c] - mu_G, means[c] - mu_G) for c in classes) / len(classes)
    return float(np.trace(sigma_w) / np.trace(sigma_b))


def naive_nc2(X: np.ndarray, y: np.ndarray) -> float:
    classes, mu_G = np.unique(y), X.mean(0)
    H = [X[y == c].mean(0) - mu_G for c in classes]
    K = len(H)
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in H] for b in H])
    etf = (1 + 1 / (K - 1)) * np.eye(K) - np.ones((K, K)) / (K - 1)
    return float(np.sqrt(((cosines - etf) ** 2).sum()))


def naive_gram(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    centre = np.mean([X[y == c].mean(0) for c in np.unique(y)], axis=0)
    rows = [x - centre for c in np.unique(y) for x in X[y == c]]
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in rows] for b in rows])


def exact_nc1(X: np.ndarray, y: np.ndarray) -> float:
    """Definition 3.1 in rational arithmetic on the stored numbers."""
    rows = [[Fraction(float(v)) for v in x] for x in X]

    def mean(members):
        return [sum(column) / len(members) for column in zip(*members, strict=True)]

    def square(a, b):
        return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))

    means = {c: mean([x for x, label in zip(rows, y, strict=True) if label == c]) for c in set(y.tolist())}
    within = sum(square(x, means[c]) for x, c in zip(rows, y.tolist(), strict=True)) / len(rows)
    between = sum(square(m, mean(rows)) for m in means.values()) / len(means)
    return float(within / between)


def simplex(K: int, d: int, seed: int) -> np.ndarray:
    """K unit vectors in d >= K dimensions with inner products -1/(K-1), randomly turned."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return (np.sqrt(K / (K - 1)) * (np.eye(K) - 1 / K)) @ Q[:K]


def rotation(seed: int, d: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def slack(X: np.ndarray) -> float:
    """Relative rounding of sums over all entries of well-spread features."""
    return X.size * EPS


@pytest.mark.parametrize(
    "y",
    [
        LABELS,
        np.arange(12) % 3,  # balanced, 0..K-1: the paper's own setting
        np.array([0] * 11 + [1]),  # a class of one sample, whose within-class part is zero
    ],
)
def test_matches_the_naive_formulas(y):
    X = features(y=y)
    assert collapse.nc1(X, y) == pytest.approx(naive_nc1(X, y), rel=slack(X))
    assert collapse.nc2(X, y) == pytest.approx(naive_nc2(X, y), rel=slack(X), abs=slack(X))
    np.testing.assert_allclose(collapse.gram(X, y), naive_gram(X, y), rtol=0, atol=slack(X))


def test_float32_features_are_measured_in_float64():
    X = features().astype(np.float32)
    truth = naive_nc1(X.astype(np.float64), LABELS)  # of the rounded numbers: only the sums may differ
    assert collapse.nc1(X, LABELS) == pytest.approx(truth, rel=slack(X))
    assert collapse.nc1(torch.from_numpy(X), torch.from_numpy(LABELS)) == collapse.nc1(X, LABELS)


@pytest.mark.parametrize("spread", [1e-3, 1e-8, 3e-13])  # NC1 near 1e-6, 1e-16 and 1e-25
@pytest.mark.parametrize("offset", [0.0, 50.0])  # a common offset is where E[x^2] - mean^2 loses everything
def test_nc1_keeps_its_digits_near_collapse(spread, offset):
    X = simplex(3, 4, seed=1)[np.searchsorted(np.unique(LABELS), LABELS)] + offset
    X = X + spread * np.random.default_rng(2).normal(size=X.shape)
    assert collapse.nc1(X, LABELS) == pytest.approx(exact_nc1(X, LABELS), rel=slack(X))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exactly_collapsed_features_have_nc1_zero(dtype):
    # 0.1 and 7 copies: their mean is not 0.1 in floating point, and NC1 must be zero all the same
    X = (0.1 * simplex(3, 4, seed=1)).astype(dtype)[np.arange(21) % 3]
    assert collapse.nc1(X, np.arange(21) % 3) == 0.0


@given(seed=SEEDS, shift=st.floats(-1e3, 1e3), exponent=st.integers(-40, 40))
def test_nc1_ignores_rotation_shift_and_scale(seed, shift, exponent):
    X = features(seed)
    moved = (X @ rotation(seed, X.shape[1]) + shift) * 10.0**exponent
    # adding the shift rounds every entry by EPS * |shift|, against a spread near 1
    assert collapse.nc1(moved, LABELS) == pytest.approx(collapse.nc1(X, LABELS), rel=slack(X) * 4 * (1 + abs(shift)))


@given(K=st.integers(2, 6), copies=st.integers(1, 4), seed=SEEDS, spread=st.floats(0, 0.5))
def test_nc2_is_zero_for_a_simplex_and_sees_class_means_only(K, copies, seed, spread):
    noise = spread * np.random.default_rng(seed).normal(size=(K * copies, 7))
    vertices = np.repeat(simplex(K, 7, seed), copies, axis=0)
    X, y = np.concatenate([vertices + noise, vertices - noise]), np.tile(np.repeat(np.arange(K), copies), 2)
    assert collapse.nc2(X, y) <= slack(X) * 4


@given(seed=SEEDS)
def test_the_order_of_samples_changes_nothing(seed):
    X, p = features(seed), np.random.default_rng(seed).permutation(len(LABELS))
    assert collapse.nc1(X[p], LABELS[p]) == pytest.approx(collapse.nc1(X, LABELS), rel=slack(X))
    assert collapse.nc2(X[p], LABELS[p]) == pytest.approx(collapse.nc2(X, LABELS), rel=4 * slack(X))


@given(seed=SEEDS)
def test_gram_is_a_correlation_matrix(seed):
    G = collapse.gram(features(seed), LABELS)
    np.testing.assert_allclose(np.diag(G), 1, rtol=8 * EPS)
    assert np.linalg.eigvalsh(G)[0] >= -len(G) * EPS * len(G)


def test_gram_sorts_classes_and_keeps_the_order_inside():
    X = features()
    order = [1, 5, 10, 0, 3, 4, 6, 8, 9, 2, 7, 11]  # LABELS -3, then 7, then 100
    np.testing.assert_allclose(collapse.gram(X, LABELS), collapse.gram(X[order], LABELS[order]), atol=slack(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gram_returns_what_it_was_given(dtype):
    X, y = torch.from_numpy(features()).to(dtype).requires_grad_(), torch.from_numpy(LABELS)
    G = collapse.gram(X, y)
    assert (G.dtype, G.device, G.requires_grad) == (dtype, X.device, False)
    if dtype != torch.bfloat16:  # NumPy has no bfloat16
        A = collapse.gram(X.detach().numpy()[:, ::-1], LABELS)  # negative strides, which torch refuses
        assert A.dtype == X.detach().numpy().dtype


def test_a_sample_at_the_centre_is_zero_not_noise():
    # The centre (0.1 + 0.2 + ... ) is not representable, so the centred row is 1e-17 rather than zero.
    X = np.array([[0.1, 0.0], [0.3, 0.0], [0.2, 0.0], [0.2, 0.3], [0.2, -0.3]])
    G = collapse.gram(X, np.array([0, 0, 1, 1, 1]))
    np.testing.assert_array_equal(G[2], 0)
    np.testing.assert_allclose(np.diag(G), [1, 1, 0, 1, 1], rtol=8 * EPS)


def test_a_class_mean_at_the_global_mean_counts_as_zero():
    X = np.array([[0.1, 0.7], [0.2, 0.7], [0.3, 0.7]])
    # cosines [[1, 0, -1], [0, 0, 0], [-1, 0, 1]] against [[1, -1/2, -1/2], ...]
    assert collapse.nc2(X, np.arange(3)) == pytest.approx(np.sqrt(1 + 6 * 0.25), rel=8 * EPS)


BAD = {
    "a list": (TypeError, "X must be a floating", [[1.0]], LABELS),
    "integer features": (TypeError, "X must be a floating", np.ones((12, 2), int), LABELS),
    "sparse features": (TypeError, "X must be a dense torch.Tensor", torch.eye(12).to_sparse(), LABELS),
    "features without numbers": (ValueError, "X must hold numbers", torch.ones(12, 2, device="meta"), LABELS),
    "a vector": (ValueError, "X must be a non-empty matrix", np.ones(12), LABELS),
    "no columns": (ValueError, "X must be a non-empty matrix", np.ones((12, 0)), LABELS),
    "NaN": (ValueError, "X must be finite", np.where(np.eye(12) > 0, np.nan, 1.0), LABELS),
    "infinity": (ValueError, "X must be finite", np.where(np.eye(12) > 0, np.inf, 1.0), LABELS),
    "squares overflow": (ValueError, "X must be finite and within", np.full((12, 2), 1e200), LABELS),
    "masked features": (ValueError, "X holds masked", np.ma.masked_greater(features(), 0.0), LABELS),
    "masked labels": (ValueError, "y holds masked", features(), np.ma.masked_equal(LABELS, LABELS[0])),
    "features of eight bits": (TypeError, "X must be float16", torch.ones(12, 2).to(torch.float8_e4m3fn), LABELS),
    "labels too few": (ValueError, "y must have one label for each of the 12 rows", features(), LABELS[:-1]),
    "labels one-hot": (ValueError, "y must have one label", features(), np.eye(12, dtype=int)),
    "labels floating": (TypeError, "y must hold integer labels", features(), LABELS.astype(float)),
    "one class": (ValueError, "y must have at least 2 classes", features(), np.full(12, 7)),
}


@pytest.mark.parametrize("function", [collapse.nc1, collapse.nc2, collapse.gram])
@pytest.mark.parametrize(("error", "message", "X", "y"), BAD.values(), ids=BAD.keys())
def test_refuses(function, error, message, X, y):
    with pytest.raises(error, match=message):
        function(X, y)


@pytest.mark.parametrize("function", [collapse.nc1, collapse.nc2])
@pytest.mark.parametrize("within", [0.0, 0.1])  # 0.1: the means agree up to rounding only
def test_refuses_equal_class_means(function, within):
    X = np.full((6, 3), 0.7) + within * np.array([1, 2, -3, 3, -2, -1])[:, None]
    with pytest.raises(ValueError, match="equal class means"):
        function(X, np.array([0, 0, 0, 1, 1, 1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees():
    X, y = torch.from_numpy(features()), torch.from_numpy(LABELS)
    assert collapse.nc1(X.cuda(), y.cuda()) == pytest.approx(collapse.nc1(X, y), rel=slack(X.numpy()))
    assert collapse.gram(X.cuda(), y).device.type == "cuda"


@pytest.mark.parametrize(("size", "fits"), [(1e140, True), (1.01e140, False)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_features(size, fits, sign):
    X = torch.tensor([[0.0], [0.1], [1.0], [0.9]], dtype=torch.float64) * size * sign
    y = torch.tensor([0, 0, 1, 1])
    if fits:
        assert collapse.nc1(X, y) == pytest.approx(0.0025 / 0.2025)
    else:
        with pytest.raises(ValueError, match=r"X must be finite and within \+-1e\+140"):
            collapse.nc1(X, y)


def test_the_gram_matrix_is_made_in_blocks(normal, monkeypatch):
    X, y = normal(50, 4), torch.arange(50) % 3
    whole = collapse.gram(X, y)
    monkeypatch.setattr("fastagop.collapse.measures._ROWS", 7)
    torch.testing.assert_close(collapse.gram(X, y), whole, rtol=1e-13, atol=1e-13)
