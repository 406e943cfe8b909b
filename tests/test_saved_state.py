"""What a saved or interrupted fit remembers: its targets, its column names, its layers' seeds, its format."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, RFMClassifier

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
