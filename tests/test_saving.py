"""A fitted estimator in a file: the same answers to the bit, labels of every kind, and no damage unnoticed."""

import json
import struct

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, Gaussian, GeneralisedLaplace, Laplace
from fastagop.estimators import files as storage
from tests.test_estimators import SMALL, blobs

X, y = blobs()
Z = blobs(seed=1)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(fitted classifier, its file)"""
    model, path = DeepRFMClassifier(**SMALL).fit(X, y), tmp_path_factory.mktemp("saved") / "model.safetensors"
    model.save(path)
    return model, path


def same(a, b):
    return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"dtype": "float64", "kernel": Gaussian(1.5), "agop_scale": "sum", "ridge": np.float32(1e-3)},
        {"kernel": GeneralisedLaplace(2.0, 0.7)},
        {"features": "cos", "feature_scale": 0.3, "device": torch.device("cpu"), "depth": np.int64(3)},
    ],
)
def test_classifier_comes_back(tmp_path, parameters):
    model = DeepRFMClassifier(**{**SMALL, **parameters}).fit(X, y)
    model.save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert type(again) is DeepRFMClassifier
    for method in ("predict", "decision_function", "transform"):
        for data in (Z, Z[:1], Z.astype(np.float32), torch.from_numpy(Z)):
            assert same(getattr(model, method)(data), getattr(again, method)(data))
    assert again.get_params() == {**model.get_params(), "device": str(model.device)}
    assert again.n_features_in_ == 6
    assert same(again.classes_, model.classes_)
    for name in ("agops_", "alphas_"):
        assert all(same(a, b) for a, b in zip(getattr(again, name), getattr(model, name), strict=True))
    for a, b in zip(again.layers_, model.layers_, strict=True):
        assert (a.nc1, a.nc2, a.stages, a.agop_scale) == (b.nc1, b.nc2, b.stages, b.agop_scale)
        assert (a.solution.dtype, a.solution.residual) == (b.solution.dtype, b.solution.residual)
    assert torch.equal(again.to_module()(torch.from_numpy(Z)), model.to_module()(torch.from_numpy(Z)))
    again.fit(X, y)  # it is an estimator like any other
    assert np.array_equal(again.decision_function(Z), model.decision_function(Z))


@pytest.mark.parametrize("columns", [slice(0, 1), slice(0, 2), 0])
def test_regressor_comes_back(tmp_path, columns):
    """One target as a column, two, and a flat one: the shape of the answer is part of what was fitted."""
    model = DeepRFMRegressor(**SMALL).fit(X, X[:, columns])
    model.save(tmp_path / "model")
    assert same(fastagop.load(tmp_path / "model").predict(Z), model.predict(Z))


@pytest.mark.parametrize(
    "names",
    [
        np.array(["ant", "bée", "猫"]),
        np.array(["ant", "bee", "a rather longer name"], dtype=object),
        np.array([-3, 0, 7], dtype=np.int8),
        np.array([1, 2, 2**63 + 5], dtype=np.uint64),
        np.array([1, 2, 3], dtype=">i4"),
        np.array([0.0, 1.0, 2.0]),
        np.array([False, True, True]),
        np.array(["2024-02-29", "2024-03-01", "1969-12-31"], dtype="M8[D]"),
    ],
    ids=lambda names: str(names.dtype),
)
def test_labels_of_any_dtype(tmp_path, names):
    model = DeepRFMClassifier(**SMALL).fit(X, names[y])
    model.save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert same(again.classes_, model.classes_)
    assert same(again.predict(Z), model.predict(Z))
    assert type(again.predict(Z)[0]) is type(model.predict(Z)[0])


def test_torch_stays_torch(tmp_path):
    model = DeepRFMClassifier(**SMALL).fit(torch.from_numpy(X), torch.from_numpy(y))
    model.save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert isinstance(again.agops_[0], torch.Tensor)
    assert torch.equal(again.alphas_[1], model.alphas_[1])


def test_what_belongs_to_the_process_stays_behind(tmp_path):
    model = DeepRFMClassifier(
        **{**SMALL, "random_state": np.random.RandomState(3)},
        checkpoint_dir=tmp_path / "c",
        callbacks=[print],
    )
    model.fit(X, y).save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert (again.checkpoint_dir, again.callbacks, again.random_state) == (None, (), None)
    assert same(again.decision_function(Z), model.decision_function(Z))


def test_unusual_numbers_survive(tmp_path):
    """Infinite collapse measures (all class means equal) and bandwidths that no short decimal gives."""
    model = DeepRFMClassifier(Laplace(1 / 3), **SMALL).fit(X, y)
    model.layers_[0].nc1["input"] = float("inf")
    model.save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert again.kernel == Laplace(1 / 3)
    assert again.layers_[0].nc1["input"] == float("inf")


def test_what_it_is_written_with_is_recorded(saved):
    metadata = header(saved[1].read_bytes())["__metadata__"]
    assert json.loads(metadata["words"])["versions"]["torch"] == torch.__version__


def test_others_may_read_it(saved, tmp_path):
    """The file obeys the umask like any other."""
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert saved[1].stat().st_mode == plain.stat().st_mode


def header(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def test_every_kind_of_damage_is_found(saved, tmp_path):
    data = saved[1].read_bytes()
    path = tmp_path / "model"
    (length,) = struct.unpack("<Q", data[:8])
    rng = np.random.default_rng(0)
    spots = [*rng.integers(0, 8 + length, 40), *rng.integers(8 + length, len(data), 40)]
    changed = [data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :] for k in map(int, spots)]
    mark = b'"fastagop":"'  # the format follows it; a bit of it is flipped on every run, wherever the header has it
    other = data.replace(mark + storage.FORMAT.encode(), mark + bytes([ord(storage.FORMAT) ^ 2]))
    assert other != data
    for broken in [other, *changed, data[:-1], data[: length + 8], data[:5], b"", data + b"\0"]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"corrupt|not written by fastagop"):
            fastagop.load(path)


def test_foreign_files_are_refused(saved, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastagop.load(tmp_path / "nowhere")
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign was not written by fastagop"):
        fastagop.load(tmp_path / "foreign")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickled")
    with pytest.raises(ValueError, match="no safetensors file"):
        fastagop.load(tmp_path / "pickled")
    DeepRFMClassifier(**{**SMALL, "checkpoint_dir": tmp_path / "c"}).fit(X, y)
    with pytest.raises(ValueError, match="holds a Deep RFM layer, not a fitted estimator"):
        fastagop.load(tmp_path / "c" / "layer-000.safetensors")


def test_devices(saved):
    assert fastagop.load(saved[1], device="cpu").device == "cpu"
    with pytest.raises(ValueError, match=r"device 'cuda:99' is not there.*; use 'auto' or 'cpu'"):
        fastagop.load(saved[1], device="cuda:99")


def test_own_kernels_by_name(tmp_path):
    from fastagop.kernels import radial
    from fastagop.kernels.profile import without_duplicates_

    class Cubed(radial.Radial):
        """exp(-r / L)^3"""

        def value_(self, sq):
            return sq.sqrt_().mul_(-3.0 / self.bandwidth).exp_()

        def weight_(self, sq):
            r = without_duplicates_(sq).sqrt()
            return self.value_(sq).mul_(3.0 / self.bandwidth).div_(r)

    model = DeepRFMClassifier(Cubed(6.0), **SMALL).fit(X, y)
    model.save(tmp_path / "model")
    assert same(fastagop.load(tmp_path / "model").decision_function(Z), model.decision_function(Z))
    assert type(fastagop.load(tmp_path / "model").kernel) is Cubed
    Cubed.__name__ = "Elsewhere"
    advice = "kernel 'Cubed' is not known: import the module that defines it first; known are "
    with pytest.raises(ValueError, match=advice) as info:
        fastagop.load(tmp_path / "model")
    known = str(info.value).partition(advice)[2].split(", ")
    kernels = "ArcCosine Elsewhere Gaussian GeneralisedLaplace Laplace LpLaplace Matern52 NTK Polynomial ProductLaplace"
    assert set(kernels.split()) <= set(known)
    assert not {"Radial", "Profile", "PairKernel", "AngleProfile", "DotProduct", "Sum", "_Combined"} & set(known)
    assert radial.named("Gaussian") is Gaussian


def test_only_what_load_knows_is_saved(tmp_path):
    with pytest.raises(NotFittedError):
        DeepRFMClassifier(**SMALL).save(tmp_path / "model")

    class Mine(DeepRFMClassifier):
        pass

    with pytest.raises(TypeError, match=r"DeepRFMClassifier, .*RFMRegressor.*, not Mine"):
        Mine(**SMALL).fit(X, y).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    model, _ = saved
    path = tmp_path / "model"
    model.save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
