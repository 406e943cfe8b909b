"""Probabilities of the classifiers: (f + 1) / 2, cut and normalised, in agreement with the labels told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import cross_val_predict, cross_val_score

import fastagop
from fastagop import DeepRFMClassifier, Laplace, RFMClassifier

MODELS = [
    lambda **more: RFMClassifier(Laplace(4.0), iterations=1, **more),
    lambda **more: DeepRFMClassifier(depth=1, width=32, ridge=1e-2, random_state=0, **more),
]
both = pytest.mark.parametrize("make", MODELS, ids=["RFM", "Deep RFM"])


def blobs(classes=3, n=120, d=5, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = np.random.default_rng(7).normal(size=(classes, d))
    return 1.5 * centres[y] + rng.normal(size=(n, d)), np.array(["ant", "bee", "cat", "dog"])[y]


@both
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_is_the_formula(make, classes):
    X, y = blobs(classes)
    Z, _ = blobs(classes, seed=1)
    model = make().fit(X, y)
    f = model.decision_function(Z)
    f = np.stack([-f, f], 1) if classes == 2 else f
    p = np.clip((f + 1) / 2, 0.005, 1.0)
    expected = p / p.sum(1, keepdims=True)
    found = model.predict_proba(Z)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert found.shape == (120, classes)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-12)
    assert np.array_equal(model.classes_[found.argmax(1)], model.predict(Z))


def test_the_least_probability_of_many_classes(monkeypatch):
    """Together the unlikely ones take at most a twentieth."""
    X, y = np.random.default_rng(0).normal(size=(80, 3)), np.arange(80) % 40
    model = RFMClassifier(iterations=0).fit(X, y)
    f = np.full((80, 40), -1.5)
    f[np.arange(80), y] = 1.5
    monkeypatch.setattr(model, "_outputs", lambda X: torch.from_numpy(f))
    p = model.predict_proba(X)
    np.testing.assert_allclose(p.min(1), 0.05 / 40 / (1 + 39 * 0.05 / 40), rtol=1e-12)
    assert (p.max(1) > 0.95).all()


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3])
def test_ties_go_to_the_class_that_is_told(kind, classes, monkeypatch):
    """Outputs beyond 1 and below -1 are cut to the same probability, and narrow dtypes round more together."""
    X, y = blobs(classes, n=80)
    model = RFMClassifier(iterations=0).fit(X, y)
    f = 2.0 * np.random.default_rng(0).normal(size=(80, classes))
    f[:20] = np.random.default_rng(1).choice([-3.0, -2.0, 0.3, 0.3 + 1e-12, 0.3 + 1e-5, 1.2, 1.5], size=(20, classes))
    monkeypatch.setattr(model, "_outputs", lambda X: torch.from_numpy(f))
    Z = torch.from_numpy(X).to(kind) if isinstance(kind, torch.dtype) else X.astype(kind)
    p = model.predict_proba(Z)
    assert p.dtype == kind
    assert np.array_equal(model.classes_[np.asarray(p.argmax(1))], model.predict(Z))
    sums = torch.as_tensor(p).double().sum(1)
    eps = torch.finfo(p.dtype).eps if isinstance(p, torch.Tensor) else np.finfo(kind).eps
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=4 * eps, atol=0)


@both
def test_in_scikit_learn(make):
    X, y = blobs(2)
    for scoring in ("roc_auc", "neg_log_loss", "neg_brier_score", "average_precision"):
        assert np.isfinite(cross_val_score(make(), X, y == "bee", cv=3, scoring=scoring)).all()
    many, names = blobs(3)
    assert np.isfinite(cross_val_score(make(), many, names, cv=3, scoring="roc_auc_ovr")).all()
    p = cross_val_predict(make().set_params(ridge=1.0), many, names, cv=3, method="predict_proba")
    assert roc_auc_score(names, p, multi_class="ovr") > 0.8
    assert log_loss(names, p) < log_loss(names, np.full_like(p, 1 / 3))
    calibrated = CalibratedClassifierCV(make(), cv=3).fit(many, names)
    assert calibrated.predict_proba(many).shape == (120, 3)


@both
def test_estimates_probabilities(make):
    """Labels drawn with a known probability: the mean error is small, as it is for no constant."""
    rng = np.random.default_rng(0)
    X, Z = rng.normal(size=(1000, 2)), rng.normal(size=(300, 2))
    X, Z = (A / np.linalg.norm(A, axis=1, keepdims=True) for A in (X, Z))
    true = 1 / (1 + np.exp(-3 * Z[:, 0]))
    y = rng.uniform(size=1000) < 1 / (1 + np.exp(-3 * X[:, 0]))
    model = make().set_params(ridge=20.0, agop_scale="max").fit(X, y)
    assert np.abs(model.predict_proba(Z)[:, 1] - true).mean() < 0.4 * np.abs(true - y.mean()).mean()


@both
def test_saved(make, tmp_path):
    X, y = blobs()
    model = make().fit(X, y)
    model.save(tmp_path / "model")
    assert np.array_equal(fastagop.load(tmp_path / "model").predict_proba(X), model.predict_proba(X))
