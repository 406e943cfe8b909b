"""An interrupted fit resumes to the same bits; other settings, other data and damaged files are refused."""

import json

import numpy as np
import pytest

from fastagop import DeepRFMClassifier, Laplace
from tests.test_estimators import blobs

X, y = blobs()


def model(folder=None, **changes):
    settings = {"depth": 4, "width": 48, "random_state": 0, "checkpoint_dir": folder, **changes}
    return DeepRFMClassifier(**settings)


def stop_after(layer):
    def callback(event):
        if event.layer == layer:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("seed", [0, None])
def test_resumes_to_the_same_bits(tmp_path, layer, seed):
    with pytest.raises(KeyboardInterrupt):
        model(tmp_path, random_state=seed, callbacks=[stop_after(layer)]).fit(X, y)
    seen = []
    resumed = model(tmp_path, random_state=seed, callbacks=[seen.append]).fit(X, y)
    assert [event.layer for event in seen] == list(range(layer + 1, 4))
    again = model(tmp_path, random_state=seed).fit(X, y)  # everything is there: nothing runs
    assert np.array_equal(resumed.transform(X), again.transform(X))
    if seed is not None:
        whole = model().fit(X, y)
        assert np.array_equal(resumed.transform(X), whole.transform(X))
        assert np.array_equal(resumed.decision_function(X), whole.decision_function(X))
        for a, b in zip(resumed.layers_, whole.layers_, strict=True):
            assert a.nc1 == b.nc1
            assert a.solution.dtype == b.solution.dtype
            assert np.array_equal(a.solution.alpha, b.solution.alpha)


def test_keeps_the_newest_features_only(tmp_path):
    model(tmp_path).fit(X, y)
    assert sorted(p.name for p in tmp_path.glob("features-*")) == ["features-003.safetensors"]
    assert len(list(tmp_path.glob("layer-*"))) == 4
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": Laplace(3.0)}, r"kernel was 'Laplace\(bandwidth=2.0\)', now 'Laplace\(bandwidth=3.0\)'"),
        ({"width": 32}, "width was 48, now 32"),
        ({"dtype": "float64"}, "differ|dtype"),
        ({"random_state": 1}, "seeds"),
    ],
)
def test_refuses_other_settings(tmp_path, changes, message):
    model(tmp_path).fit(X, y)
    with pytest.raises(ValueError, match=message):
        model(tmp_path, **changes).fit(X, y)


def test_refuses_other_data(tmp_path):
    model(tmp_path).fit(X, y)
    moved = X.copy()
    moved[0, 0] += 1e-3
    with pytest.raises(ValueError, match="data differ"):
        model(tmp_path).fit(moved, y)


@pytest.mark.parametrize("name", ["layer-001.safetensors", "features-003.safetensors", "manifest.json"])
def test_detects_damage(tmp_path, name):
    model(tmp_path).fit(X, y)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"corrupt|cannot be read"):
        model(tmp_path).fit(X, y)


def test_a_half_written_layer_is_done_again(tmp_path):
    """A kill between writing a layer's files and renaming the manifest leaves files that nobody names."""
    model(tmp_path).fit(X, y)
    whole = model().fit(X, y)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    with pytest.raises(KeyboardInterrupt):
        model(tmp_path / "b", callbacks=[stop_after(1)]).fit(X, y)
    (tmp_path / "b" / "layer-002.safetensors").write_bytes(b"rubbish")
    resumed = model(tmp_path / "b").fit(X, y)
    assert np.array_equal(resumed.transform(X), whole.transform(X))
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["data"] == manifest["data"]
