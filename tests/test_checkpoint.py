"""An interrupted fit resumes to the same bits; other settings, other data and damaged files are refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastagop.kernels import atomic_files

from fastagop import CholeskyCG, DeepRFMClassifier, DeepRFMRegressor, Gaussian, Laplace
from fastagop.deep_rfm.checkpoint import _identity
from fastagop.deep_rfm.layer import Settings
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
        ({"ridge": np.float32(0.5), "depth": 5}, r"depth was 4, now 5; ridge was 0.0, now 0.5"),
        ({"dtype": "float64"}, "the data differ"),
        ({"random_state": 1}, "the seeds differ"),
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


def test_refuses_another_task(tmp_path):
    """The same numbers as targets: the data agree, but a regression has no collapse measures to resume."""
    model(tmp_path).fit(X, y)
    parameters = model(tmp_path).get_params(deep=False)
    del parameters["class_weight"]  # a classifier's
    with pytest.raises(ValueError, match="task was 'classification', now 'regression'"):
        DeepRFMRegressor(**parameters).fit(X, 2 * np.eye(3)[y] - 1)


def test_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint_dir must be a folder"):
        model(tmp_path / "file").fit(X, y)
    with pytest.raises(TypeError, match=r"^checkpoint_dir must be the path of a folder, got 3$"):
        model(3).fit(X, y)


def halves(data):
    return data[: len(data) // 2]


def bit(data):
    k = len(data) // 2
    return data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :]


FILES = ["layer-001.safetensors", "features-003.safetensors", "manifest.json"]
DAMAGE = [halves, bit, lambda data: data[:-7], lambda _: b"", lambda _: b"[1, 2]"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in FILES for damage in DAMAGE),
        *((name, None) for name in FILES[:2]),  # gone; a folder without a manifest is a new checkpoint
    ],
)
def test_detects_damage(tmp_path, name, damage):
    model(tmp_path).fit(X, y)
    path = tmp_path / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"(?s){name}.*(corrupt|missing).*Remove the folder to start again"):
        model(tmp_path).fit(X, y)


def test_detects_an_edited_manifest(tmp_path):
    model(tmp_path).fit(X, y)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"width": 48', '"width": 64'))
    with pytest.raises(ValueError, match="edited"):
        model(tmp_path, width=64).fit(X, y)


def test_detects_a_layer_of_another_run(tmp_path):
    """Whole and self-consistent, but not the file that the manifest means."""
    model(tmp_path / "a").fit(X, y)
    model(tmp_path / "b", random_state=1).fit(X, y)
    (tmp_path / "b" / "layer-001.safetensors").replace(tmp_path / "a" / "layer-001.safetensors")
    with pytest.raises(ValueError, match=r"layer-001.safetensors was replaced"):
        model(tmp_path / "a").fit(X, y)


def test_manifest_says_what_was_run(tmp_path):
    model(tmp_path).fit(X, y)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["kernel"] == "Laplace(bandwidth=2.0)"
    assert {"fastagop", "torch", "numpy", "python"} == set(manifest["versions"])
    assert len(manifest["layers"]) == 4


def test_settings_that_tell_fits_apart():
    """These names and values are in the manifests of checkpoints that were written already: others refuse them all."""
    settings = Settings(kernel=Gaussian(1.5), depth=3, features="relu", width=8, ridge=1e-3, memory_limit=1e9)
    plain = {
        "kernel": "Gaussian(bandwidth=1.5)",
        "depth": 3,
        "features": "relu",
        "width": 8,
        "feature_scale": None,
        "ridge": 1e-3,
        "agop_scale": "max",
        "precision": "highest",
        "backend": "auto",
        "solver": "auto",
    }
    assert list(_identity(settings).items()) == list(plain.items())  # an error names differences in this order
    changed = {"feature_scale": 0.5, "agop_scale": "sum", "precision": "high", "backend": "torch", "features": "cos"}
    changed |= {"ridge": 0.0}
    by_options = {"tolerance": 1e-9, "place": "device"}
    other = replace(settings, **changed, solver=CholeskyCG(**by_options))
    assert _identity(other) == {**plain, **changed, "solver": by_options}


def test_written_in_the_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    """Contents reach the disk before the name, and the name before anything that relies on it."""
    steps = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)

        def spy(*args, name=name, plain=plain):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else os.fspath(args[1])
            steps.append((name, path))
            return plain(*args)

        monkeypatch.setattr(os, name, spy)
    atomic_files.write(tmp_path / "a", b"1")
    folder = str(tmp_path)
    (settled, temporary), *rest = steps
    assert settled == "fsync"
    assert temporary.startswith(f"{folder}/.a.")
    assert rest == [("replace", f"{folder}/a"), ("fsync", folder)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("cases", [("random", "5"), ("every",)], ids=lambda cases: cases[0])
def test_kill_and_resume(python, cases):
    """SIGKILL, resume, and the features, coefficients and records are the same to the bit."""
    folder = str(Path(__file__).parent)
    printed = python(
        f"import sys; sys.path.insert(0, {folder!r}); sys.argv[1:] = {list(cases)}\n"
        "import kill_cases; kill_cases.main()"
    )
    assert "all resumed to the same bits" in printed
    assert int(printed.split()[0]) >= (5 if cases[0] == "random" else 18)  # nine steps on the disk a layer


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
