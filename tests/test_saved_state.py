"""What a saved or interrupted fit remembers: its targets, its column names, its layers' seeds, its format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, RFMClassifier
from fastagop.solvers import cg, half

X = np.random.default_rng(0).normal(size=(60, 6))
y = np.arange(60) % 3


def small(kind=DeepRFMClassifier, **changes):
    return kind(**{"depth": 3, "width": 6, "ridge": 1e-2, "random_state": 0, **changes})


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(DeepRFMClassifier, y), (DeepRFMRegressor, X[:, 0]), (DeepRFMRegressor, X[:, :2])],
    ids=["labels", "floats", "two outputs"],
)
def test_a_checkpoint_belongs_to_its_targets(tmp_path, kind, targets):
    """The same points with the targets in another order are other data."""
    small(kind, checkpoint_dir=tmp_path).fit(X, targets)
    with pytest.raises(ValueError, match="data differ"):
        small(kind, checkpoint_dir=tmp_path).fit(X, np.roll(targets, 1, axis=0))
    small(kind, checkpoint_dir=tmp_path).fit(X, targets)  # its own it still takes


@pytest.mark.parametrize("random_state", [0, None])
def test_every_layer_has_a_random_map_of_its_own(tmp_path, random_state):
    """Width 6 on six features: all maps have one shape, and one seed would make them equal."""
    small(checkpoint_dir=tmp_path, random_state=random_state).fit(X, y)
    seeds = json.loads((tmp_path / "manifest.json").read_text())["seeds"]
    assert len(set(seeds)) == len(seeds) == 3
    maps = []
    for path in sorted(tmp_path.glob("layer-*.safetensors")):
        with safe_open(path, "np") as file:
            maps.append(file.get_tensor("weight"))
    assert [weight.shape for weight in maps] == 3 * [(6, 6)]
    for i in range(3):
        for j in range(i):
            assert np.abs(maps[i] - maps[j]).max() > 0.5


@pytest.mark.parametrize("kind", [DeepRFMClassifier, RFMClassifier])
def test_names_of_columns_come_back(tmp_path, kind):
    pandas = pytest.importorskip("pandas")
    names = ["width", "height", "bée", "d", "e", "f"]
    table = pandas.DataFrame(X, columns=names)
    model = (small() if kind is DeepRFMClassifier else RFMClassifier(iterations=1)).fit(table, y)
    model.save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert list(again.feature_names_in_) == names
    assert np.array_equal(again.predict(table), model.predict(table))
    with pytest.raises(ValueError, match="feature names"):  # scikit-learn's check of the names
        again.predict(table[names[::-1]])


def test_a_file_of_another_format_is_refused(tmp_path):
    """Whole, with a true checksum, but written by a version whose layout this one does not know."""
    small().fit(X, y).save(tmp_path / "model")
    with safe_open(tmp_path / "model", "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "same", metadata)
    fastagop.load(tmp_path / "same")  # rewriting alone does not harm
    for other in ("1", "999"):
        save_file(tensors, tmp_path / "other", {**metadata, "fastagop": other})
        with pytest.raises(ValueError, match=f"has format {other}"):
            fastagop.load(tmp_path / "other")


# Files of version 0.1.0 as it was first written to disk, and what the estimators that wrote them answered.
STORED = Path(__file__).parent / "stored"
COUNT = np.arange(10)
POINTS = np.stack([COUNT % 3 - 1.0, COUNT % 4 - 1.5, COUNT**2 % 5 - 2.0], 1)
COSINES = {"depth": 2, "width": 4, "features": "cos", "feature_scale": 0.25, "solver": "cholesky", "ridge": 0.125}


@pytest.mark.parametrize(
    ("name", "method", "answer"),
    [
        ("classifier", "decision_function", [-0.15556861403289446, 0.1459880898146153, 0.08318292929991511]),
        ("rfm", "predict", [-0.9967886811332172, -0.002794581496256887, 0.9983960196521807]),
    ],
)
def test_files_of_earlier_versions_load(name, method, answer):
    model = fastagop.load(STORED / f"{name}.safetensors")
    np.testing.assert_allclose(getattr(model, method)(POINTS[:3]), answer, rtol=0, atol=1e-12)


def test_options_are_found_where_earlier_pickles_look_for_them():
    assert cg.ConjugateGradients is fastagop.ConjugateGradients
    assert half.CholeskyCG is fastagop.CholeskyCG


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """It was interrupted after the first of two layers; the second one and the readout are those of that version."""
    shutil.copytree(STORED / "checkpoint", tmp_path / "checkpoint")
    trained = []
    model = DeepRFMClassifier(
        **COSINES,
        dtype="float64",
        random_state=0,
        checkpoint_dir=tmp_path / "checkpoint",
        callbacks=[trained.append],
        device="cpu",
    ).fit(POINTS, COUNT % 2)
    assert [event.layer for event in trained] == [1]
    whole = fastagop.load(STORED / "classifier.safetensors")
    np.testing.assert_allclose(model.decision_function(POINTS), whole.decision_function(POINTS), rtol=0, atol=1e-9)
    for found, expected in zip(model.layers_, whole.layers_, strict=True):
        np.testing.assert_allclose(found.solution.alpha, expected.solution.alpha, rtol=1e-9, atol=1e-9)
