"""NC1 by the pseudo-inverse, CDNV, NC3, NC4, weighting by classes, and all of them over batches.

The package ``neural-collapse`` could not be installed here (no index has it), so its definitions are written down
below in float64 NumPy as its sources and its papers define them: Sigma_W over all samples, CDNV over pairs of
classes, the structure error of NC3, and the share of agreeing decisions. One constant differs: the version read
divides Sigma_B by d where the paper's definition, and so fastagop, divides by K.
"""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastagop import collapse

EPS = float(np.finfo(np.float64).eps)
# Unbalanced, unsorted, with gaps, and a class of one sample.
LABELS = np.random.default_rng(3).permutation(np.repeat([-3, 7, 8, 100, 104], [12, 20, 9, 15, 1]))
BALANCED = np.arange(60) % 5


def features(y: np.ndarray = LABELS, d: int = 9, spread: float = 1.0, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(len(np.unique(y)), d))
    return centres[np.unique(y, return_inverse=True)[1]] + spread * rng.normal(size=(len(y), d)) + offset


class Definitions:
    """The measures with whole matrices, in the way they are written in the papers."""

    def __init__(self, X, y, weighting="samples"):
        self.X, self.y, self.labels = X, y, np.unique(y)
        self.K = len(self.labels)
        self.means = np.array([X[y == c].mean(0) for c in self.labels])
        self.centre = X.mean(0) if weighting == "samples" else self.means.mean(0)
        self.C = self.means - self.centre
        own = [np.cov(X[y == c].T, bias=True) if (y == c).sum() > 1 else 0 for c in self.labels]
        share = [(y == c).mean() if weighting == "samples" else 1 / self.K for c in self.labels]
        self.sigma_w = sum(w * S for w, S in zip(share, own, strict=True))
        self.sigma_b = self.C.T @ self.C / self.K

    def trace(self):
        return np.trace(self.sigma_w) / np.trace(self.sigma_b)

    def pinv(self):
        return np.trace(self.sigma_w @ np.linalg.pinv(self.sigma_b, rcond=1e-13)) / self.K

    def cdnv(self):
        v = [((self.X[self.y == c] - m) ** 2).sum(1).mean() for c, m in zip(self.labels, self.means, strict=True)]
        pairs = [(i, j) for i in range(self.K) for j in range(i)]
        return np.mean([(v[i] + v[j]) / 2 / ((self.means[i] - self.means[j]) ** 2).sum() for i, j in pairs])

    def nc2(self):
        H = self.C / np.linalg.norm(self.C, axis=1, keepdims=True)
        return np.linalg.norm(H @ H.T - (self.K * np.eye(self.K) - 1) / (self.K - 1))

    def structure(self, W):
        P = W @ self.C.T
        ideal = (np.eye(self.K) - 1 / self.K) / np.sqrt(self.K - 1)
        return np.linalg.norm(P / np.linalg.norm(P) - ideal)

    def distance(self, W):
        return np.linalg.norm(W / np.linalg.norm(W) - self.C / np.linalg.norm(self.C)) ** 2

    def nc4(self, W, b, weighting="samples"):
        nearest = ((self.X[:, None] - self.means) ** 2).sum(2).argmin(1)
        alike = (self.X @ W.T + b).argmax(1) == nearest
        if weighting == "samples":
            return alike.mean()
        return np.mean([alike[self.y == c].mean() for c in self.labels])


def exact_nc1(X: np.ndarray, y: np.ndarray) -> float:
    """Definition 3.1 in rational arithmetic on the stored numbers."""
    rows = np.array([[Fraction(float(v)) for v in x] for x in X])
    means = {c: rows[y == c].sum(0) / int((y == c).sum()) for c in set(y.tolist())}
    within = sum(((x - means[c]) ** 2).sum() for x, c in zip(rows, y.tolist(), strict=True)) / len(rows)
    between = sum(((m - rows.sum(0) / len(rows)) ** 2).sum() for m in means.values()) / len(means)
    return float(within / between)


def classifier(K: int, d: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(K, d)), rng.normal(size=K)


@pytest.mark.parametrize("weighting", ["samples", "classes"])
@pytest.mark.parametrize(("y", "d"), [(LABELS, 9), (LABELS, 3), (BALANCED, 9), (BALANCED, 70)])  # d < K - 1, d > n
def test_definitions(y, d, weighting):
    X = features(y, d)
    truth, (W, b) = Definitions(X, y, weighting), classifier(5, d)
    assert collapse.nc1(X, y, weighting=weighting) == pytest.approx(truth.trace(), rel=1e-12)
    assert collapse.nc1(X, y, metric="pinv", weighting=weighting) == pytest.approx(truth.pinv(), rel=1e-12)
    assert collapse.nc2(X, y, weighting=weighting) == pytest.approx(truth.nc2(), rel=1e-12)
    assert collapse.cdnv(X, y) == pytest.approx(truth.cdnv(), rel=1e-12)
    assert collapse.nc3(W, X, y, weighting=weighting) == pytest.approx(truth.structure(W), rel=1e-12)
    distance = collapse.nc3(W, X, y, metric="distance", weighting=weighting)
    assert distance == pytest.approx(truth.distance(W), rel=1e-12)
    assert collapse.nc4(W, b, X, y, weighting=weighting) == pytest.approx(truth.nc4(W, b, weighting), rel=1e-15)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_collapsed_float32_features(offset):
    """At a spread of 1e-7 sums in float32 are noise; the truth is that of the numbers stored."""
    y = BALANCED
    X = features(y, 6, 1e-7, offset).astype(np.float32)
    exact, groups = exact_nc1(X, y), [np.flatnonzero(y == c) for c in range(5)]
    means = np.array([X[rows].sum(0) / np.float32(12) for rows in groups])
    in_float32 = ((X - means[y]) ** 2).sum(1).mean() / ((means - means.mean(0)) ** 2).sum(1).mean()
    assert abs(in_float32 / exact - 1) > 0.01  # the data is hard
    with_covariance = collapse.Accumulator(covariance=True).update(X, y)
    for found in (collapse.nc1(X, y), with_covariance.nc1()):
        assert found == pytest.approx(exact, rel=X.size * EPS)
    shifted = [X[rows].astype(np.float64) - X[rows[0]] for rows in groups]  # exact
    apart = np.concatenate([rows - rows.mean(0) for rows in shifted])
    inverse = np.linalg.pinv(Definitions(X.astype(np.float64), y).C, rcond=1e-5)
    for found in (collapse.nc1(X, y, metric="pinv"), with_covariance.nc1(metric="pinv")):
        assert found == pytest.approx(((apart @ inverse) ** 2).sum() / len(X), rel=1e-9)


def test_directions_of_rounding_count_as_none():
    """Class means on a line, seen through float32: the other directions between them are rounding."""
    rng = np.random.default_rng(0)
    line, along = rng.normal(size=6), np.array([0.0, 1.0, 3.0, 7.0])
    y = np.arange(80) % 4
    X = along[y, None] * line + 0.1 * rng.normal(size=(80, 1)) * line + 5
    expected = Definitions(X, y).trace() / 4  # in one direction tr(Sigma_W Sigma_B^+) is the ratio of the traces
    assert collapse.nc1(X.astype(np.float32), y, metric="pinv") == pytest.approx(expected, rel=1e-4)


def test_exact_geometry():
    """Collapsed on a simplex: NC1, CDNV and NC2 are 0, and its own means are the perfect classifier."""
    X = (np.eye(4) - 0.25)[np.arange(12) % 4] * 3
    y, W = np.arange(12) % 4, np.eye(4) - 0.25
    assert collapse.nc1(X, y, metric="pinv") == collapse.cdnv(X, y) == 0.0
    assert collapse.nc3(W, X, y) <= 16 * EPS
    assert collapse.nc3(7 * W, X, y, metric="distance") <= 16 * EPS
    assert collapse.nc3(-W, X, y, metric="distance") == pytest.approx(4)  # opposite unit vectors
    assert collapse.nc4(W, None, X, y) == 1.0
    assert collapse.nc4(W[[1, 0, 2, 3]], None, X, y) == 0.5
    assert collapse.nc4(np.zeros((4, 4)), [1.0, 0, 0, 0] @ np.eye(4), X, y) == 0.25


def test_nearest_means_close_to_each_other_far_from_the_rest():
    """Means 1e-9 apart, seen from far away: |x|^2 - 2 x.m + |m|^2 in float64 cannot tell which of the two is nearer."""
    means = np.array([[1.0, 0.0], [1.0 + 1e-9, 0.0], [-1.0, 0.0]])
    y = np.repeat([0, 1, 2], 4)
    X = means[y] + np.tile([[0, 1e-10], [0, -1e-10], [1e-10, 0], [-1e-10, 0]], (3, 1))
    b = np.array([0.0, -(1 + 0.5e-9), -4.0])  # decides at the middle between the two
    W = np.array([[0.0, 0.0], [1.0, 0.0], [-5.0, 0.0]])
    assert collapse.nc4(W, b, X, y) == 1.0


# ---- Over batches


def accumulated(X, y, order, size=7, covariance=True):
    found = collapse.Accumulator(covariance)
    for rows in np.split(order, range(size, len(order), size)):
        found.update(X[rows], y[rows])
    return found


def numbers(found: collapse.Accumulator, W) -> list[float]:
    by = [{"weighting": "samples"}, {"weighting": "classes"}]
    pinv = [found.nc1(metric="pinv")] if found.covariance else []
    return [
        *(measure(**how) for measure in (found.nc1, found.nc2) for how in by),
        *(found.nc3(W, **how) for how in by),
        found.cdnv(),
        *pinv,
    ]


@pytest.mark.parametrize(
    ("spread", "offset", "dtype"),
    [(1.0, 0.0, np.float64), (1e-7, 50.0, np.float64), (1e-7, 0.0, np.float32), (1e-4, 1e3, np.float32)],
)
def test_batches_in_any_order_and_merging_agree(spread, offset, dtype):
    X, (W, _) = features(spread=spread, offset=offset).astype(dtype), classifier(5, 9)
    late = np.argsort(LABELS, kind="stable")  # Every label but the first appears late.
    orders = [np.arange(len(X)), late, late[::-1], np.random.default_rng(5).permutation(len(X))]
    first = numbers(accumulated(X, LABELS, orders[0]), W)
    for order in orders[1:]:
        for size in (1, 7):
            np.testing.assert_allclose(numbers(accumulated(X, LABELS, order, size), W), first, rtol=1e-14, atol=0)
        halves = accumulated(X, LABELS, order[:20], 3).merge(accumulated(X, LABELS, order[20:], 5))
        np.testing.assert_allclose(numbers(halves, W), first, rtol=1e-14, atol=0)
    kept = [collapse.nc1(X, LABELS), collapse.nc1(X, LABELS, weighting="classes")]
    np.testing.assert_allclose(first[:2], kept, rtol=1e-13)
    assert first[-1] == pytest.approx(collapse.nc1(X, LABELS, metric="pinv"), rel=1e-12)


@pytest.mark.parametrize("factor", [1e-120, 1e100])
def test_no_square_leaves_float64(factor):
    X, found = features(), accumulated(features() * factor, LABELS, np.arange(len(LABELS)))
    assert found.nc1() == pytest.approx(collapse.nc1(X, LABELS), rel=1e-12)
    assert found.nc1(metric="pinv") == pytest.approx(collapse.nc1(X, LABELS, metric="pinv"), rel=1e-12)


def test_an_outlying_first_sample_costs_no_digits():
    """Sums shifted by a sample 1e9 spreads away would cancel 18 digits."""
    X, y = features(BALANCED, 4, 1e-6), BALANCED
    X[0] += 1e3
    found = accumulated(X, y, np.arange(60), 1)
    assert found.nc1() == pytest.approx(exact_nc1(X, y), rel=1e-13)
    assert found.nc1() == pytest.approx(accumulated(X, y, np.arange(60)[::-1], 9).nc1(), rel=1e-14)


def test_nc4_over_batches():
    X, (W, b) = torch.from_numpy(features()).float(), classifier(5, 9)
    y = torch.from_numpy(LABELS)
    loader = DataLoader(TensorDataset(X * 2, y), batch_size=8)
    found = collapse.Accumulator().extend(loader, features=lambda batch: batch / 2)
    for weighting in ("samples", "classes"):
        by_batch = found.nc4(W, b, loader, lambda batch: batch / 2, weighting=weighting)
        assert by_batch == pytest.approx(collapse.nc4(W, b, X, y, weighting=weighting), rel=1e-15)
    assert found.nc1() == pytest.approx(collapse.nc1(X, y), rel=1e-13)
    assert found.nc4(W, b, [(X[:3], y[:3])]) in (0, 1 / 3, 2 / 3, 1)


def test_what_an_accumulator_tells():
    X = features()
    found = collapse.Accumulator()
    assert repr(found) == "Accumulator(0 samples of 0 classes)"
    found.update(X, LABELS).update(X[:0], LABELS[:0]).update(torch.empty(0, 9), [])
    assert repr(found) == "Accumulator(57 samples of 5 classes, 9 columns)"
    assert found.labels == [-3, 7, 8, 100, 104]
    assert found.counts == [12, 20, 9, 15, 1]
    np.testing.assert_allclose(found.means, Definitions(X, LABELS).means, rtol=1e-14, atol=1e-14)
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert other.nc1() == found.nc1()
    twice = copy.deepcopy(found)
    assert twice.merge(twice).nc1() == pytest.approx(found.nc1(), rel=1e-14)
    assert found.merge(collapse.Accumulator()).nc1() == collapse.Accumulator().merge(found).nc1()


def test_a_refused_batch_changes_nothing():
    X = features()
    found = accumulated(X, LABELS, np.arange(57))
    before = numbers(found, classifier(5, 9)[0])
    for Z, y in [(X[:, :5], LABELS), (X * np.nan, LABELS), (X, LABELS[:3]), (X, LABELS + 0.5)]:
        with pytest.raises((ValueError, TypeError)):
            found.update(Z, y)
    assert numbers(found, classifier(5, 9)[0]) == before


X, W = features(), classifier(5, 9)[0]
REFUSED = {
    "metric": (ValueError, "metric must be one of 'trace', 'pinv'", lambda: collapse.nc1(X, LABELS, metric="svd")),
    "weighting": (ValueError, "weighting must be one of", lambda: collapse.nc2(X, LABELS, weighting="balanced")),
    "metric of nc3": (ValueError, "metric must be one of", lambda: collapse.nc3(W, X, LABELS, metric="trace")),
    "W of fewer classes": (ValueError, "W must have a row for each of the 5", lambda: collapse.nc3(W[:4], X, LABELS)),
    "W of integers": (TypeError, "W must be a floating", lambda: collapse.nc4(W.astype(int), None, X, LABELS)),
    "W of zeros": (ValueError, "W must not be all zero", lambda: collapse.nc3(0 * W, X, LABELS)),
    "b of another length": (ValueError, "b must have shape", lambda: collapse.nc4(W, np.ones(4), X, LABELS)),
    "equal means of two classes": (
        collapse.EqualMeansError,
        "equal means of the classes at places 0 and 1",
        lambda: collapse.cdnv(np.array([[0.1], [0.2], [0.1], [0.2], [5.0]]), np.array([0, 0, 1, 1, 2])),
    ),
    "no sample": (ValueError, "got no sample; call update", lambda: collapse.Accumulator().nc1()),
    "one class": (
        ValueError,
        "y must have at least 2 classes, got only the label 3",
        lambda: collapse.Accumulator().update(X, np.full(57, 3)).nc2(),
    ),
    "width": (
        ValueError,
        r"X must have 9 columns like the batches before, got shape \(57, 4\)",
        lambda: collapse.Accumulator().update(X, LABELS).update(X[:, :4], LABELS),
    ),
    "width of an empty batch": (
        ValueError,
        "X must have 9 columns",
        lambda: collapse.Accumulator().update(X, LABELS).update(X[:0, :4], []),
    ),
    "images": (
        ValueError,
        r"X must be a matrix .*flatten",
        lambda: collapse.Accumulator().update(X[:, :, None], LABELS),
    ),
    "pinv without covariance": (
        ValueError,
        r"Accumulator\(covariance=True\)",
        lambda: collapse.Accumulator().update(X, LABELS).nc1(metric="pinv"),
    ),
    "pinv by classes": (
        ValueError,
        "weighting must be 'samples' with metric='pinv'",
        lambda: collapse.Accumulator(True).update(X, LABELS).nc1(metric="pinv", weighting="classes"),
    ),
    "batches without labels": (TypeError, "batches must give tuples", lambda: collapse.Accumulator().extend([X])),
    "no batches": (TypeError, "batches must be an iterable", lambda: collapse.Accumulator().extend(None)),
    "features": (
        TypeError,
        "features must be a function",
        lambda: collapse.Accumulator().extend([(X, LABELS)], "relu"),
    ),
    "another kind": (TypeError, "other must be", lambda: collapse.Accumulator().merge({})),
    "another covariance": (
        ValueError,
        "other must keep",
        lambda: collapse.Accumulator().merge(collapse.Accumulator(True)),
    ),
    "another width": (
        ValueError,
        "other must have 9 columns",
        lambda: collapse.Accumulator().update(X, LABELS).merge(collapse.Accumulator().update(X[:, :2], LABELS)),
    ),
    "a label never seen": (
        ValueError,
        r"batches hold the labels \[5\]",
        lambda: collapse.Accumulator().update(X, LABELS).nc4(W, None, [(X[:1], [5])]),
    ),
    "batches used up": (
        ValueError,
        "batches hold no sample",
        lambda: collapse.Accumulator().update(X, LABELS).nc4(W, None, iter(())),
    ),
}


@pytest.mark.parametrize(("error", "message", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_model_makes_features_in_evaluation_mode():
    """Batch statistics would be those of each batch, and the model's own would move."""
    X, y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    inner = torch.nn.Dropout(0.5).eval()
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), inner).train()
    inner.eval()
    before = copy.deepcopy(model.state_dict())
    batches = DataLoader(TensorDataset(X, y), batch_size=7)
    found = collapse.Accumulator().extend(batches, features=model)
    assert model.training
    assert not inner.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        features = model.eval()(X)
    assert found.nc1() == pytest.approx(collapse.nc1(features, y), rel=1e-5)


def test_the_mode_comes_back_where_a_model_fails():
    model = torch.nn.Linear(4, 6).train()
    with pytest.raises(RuntimeError):
        collapse.Accumulator().extend([(torch.ones(3, 5), torch.arange(3))], features=model)
    assert model.training


@pytest.mark.parametrize(("first", "then"), [(1e-140, 1e100), (0.0, 1e139), (0.0, 1e-139), (1e100, 1e-140)])
def test_batches_in_other_units(first, then):
    """The scatter of what came first, and of an accumulator that is merged, follows to the unit of what comes later."""
    parts, y = (features(seed=1) * first, features(seed=2) * then), np.tile(LABELS, 2)
    whole = collapse.nc1(np.concatenate(parts), y, metric="pinv")
    made = [collapse.Accumulator(covariance=True).update(part, LABELS) for part in parts]
    assert copy.deepcopy(made[0]).update(parts[1], LABELS).nc1(metric="pinv") == pytest.approx(whole, rel=1e-12)
    assert made[0].merge(made[1]).nc1(metric="pinv") == pytest.approx(whole, rel=1e-12)


def test_what_was_added_in_inference_mode_can_be_added_to():
    with torch.inference_mode():
        seen = collapse.Accumulator(covariance=True).update(torch.from_numpy(features(seed=1)), LABELS)
        merged = collapse.Accumulator(covariance=True).merge(seen)
    for accumulator in (seen, merged):
        accumulator.update(features(seed=2), LABELS)
        X = np.concatenate([features(seed=1), features(seed=2)])
        whole = collapse.nc1(X, np.tile(LABELS, 2), metric="pinv")
        assert accumulator.nc1(metric="pinv") == pytest.approx(whole, rel=1e-12)
