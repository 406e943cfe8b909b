"""Files and checkpoints: limits of sizes on both sides, what differs between two fits, and headers that lie."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, Laplace, RFMClassifier
from fastagop.estimators import files, tensor_files


def headed(header, body=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.fixture
def reading(tmp_path):
    def read(data: bytes):
        (tmp_path / "file").write_bytes(data)
        return tensor_files.read_tensors(tmp_path / "file")

    return read


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"1234567", "7 bytes cannot hold a header"),
        (struct.pack("<Q", 3) + b"{}", "10 bytes cannot hold a header of 3"),
        (headed({"__metadata__": {"a": 1}}), "its metadata are no texts"),
        (headed({"__metadata__": ["a"]}), "its metadata are no texts"),
        (headed({"__metadata__": {"a": "b", "c": None}}), "its metadata are no texts"),
        (headed(b"[]"), "its description is a list, not an object"),
        (headed({"t": entry([1], 4, 8)}, bytes(8)), "'t' does not begin where the one before it ends"),
        (headed({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "'b' does not begin where"),
        (headed({"t": entry([1], 0, 4)}, bytes(5)), "its tensors take 4 bytes, where it has 5"),
        (headed({"t": entry([2], 0, 4)}, bytes(4)), r"'t' of shape \[2\] cannot have 4 bytes"),
        (headed({"t": entry([True], 0, 4)}, bytes(4)), "'t' has no shape or place"),
        (headed({"t": entry([-1, -1], 0, 4)}, bytes(4)), "'t' has no shape or place"),
        (headed({"t": entry([1] * 17, 0, 4)}, bytes(4)), "'t' has no shape or place"),
        (headed({"t": entry("1", 0, 4)}, bytes(4)), "'t' has no shape or place"),
        (headed({"t": entry([0, 2**40 + 1], 0, 0)}), "'t' of shape .* cannot have 0 bytes"),
        (headed({"t": entry([1], 0, 4, "F99")}, bytes(4)), "'t' is described as"),
        (headed({"t": 3}), "'t' is described as"),
    ],
)
def test_headers_that_lie(data, words, reading):
    with pytest.raises(ValueError, match=rf"file is truncated, corrupt or no safetensors file: .*{words}"):
        reading(data)


def test_headers_that_say_what_is_there(reading):
    numbers = np.array([1.0, 2.0, 3.0], np.float32)
    header = {"__metadata__": {"a": "b"}, "t": entry([1] * 15 + [3], 0, 12), "none": entry([0, 2**40], 0, 0)}
    tensors, metadata = reading(headed(header, numbers.tobytes()))
    assert metadata == {"a": "b"}
    assert tensors["t"].shape == (*[1] * 15, 3)
    assert tensors["t"].flatten().tolist() == [1.0, 2.0, 3.0]
    assert tensors["none"].shape == (0, 2**40)
    assert reading(headed({})) == ({}, {})


def test_the_longest_description(reading, monkeypatch, tmp_path):
    """A header may have twice the length of a description, which may have LONGEST_TEXT bytes itself."""
    assert tensor_files.LONGEST_TEXT == 2**25
    monkeypatch.setattr(tensor_files, "LONGEST_TEXT", 20)
    fits = b"{}" + b" " * 38
    assert reading(headed(fits)) == ({}, {})
    assert tensor_files.parse_object(fits) == {}
    with pytest.raises(ValueError, match="a header of 41 bytes is too long"):
        reading(headed(fits + b" "))
    with pytest.raises(ValueError, match="a description of 41 bytes is too long"):
        tensor_files.parse_object(fits + b" ")
    length = len(json.dumps({"kind": "k", "a": "b"}))
    monkeypatch.setattr(files, "LONGEST_TEXT", length)
    digest = files.write(tmp_path / "whole", "k", {"t": torch.ones(2)}, {"a": "b"})
    assert files.fingerprint({"t": torch.ones(2)}, json.dumps({"kind": "k", "a": "b"})) == digest
    with pytest.raises(ValueError, match=rf"a description of {length + 1} bytes, {length} at most"):
        files.write(tmp_path / "longer", "k", {}, {"a": "bc"})
    assert not (tmp_path / "longer").exists()


def test_more_than_memory(reading, monkeypatch):
    data = headed({"t": entry([1], 0, 4)}, bytes(4))
    monkeypatch.setattr(tensor_files, "host_bytes", lambda: len(data))
    assert reading(data)[0]["t"].tolist() == [0.0]
    monkeypatch.setattr(tensor_files, "host_bytes", lambda: len(data) - 1)
    with pytest.raises(ValueError, match="more than this machine's free memory"):
        reading(data)


@pytest.mark.parametrize(("length", "fits"), [(2**18 + 320, True), (2**18 + 321, False)])
def test_an_array_takes_no_more_than_its_entries(length, fits):
    """Four bytes a letter: 2^20 are free, and 256 for each of the five letters of ["a"]."""
    packed = {"array": ["a"], "dtype": f"<U{length}"}
    if fits:
        assert files.unpack_value(packed).tolist() == ["a"]
    else:
        with pytest.raises(ValueError, match=f"would take {4 * length} bytes"):
            files.unpack_value(packed)


@pytest.mark.parametrize(
    "value",
    [None, 3, 2.5, "word", Laplace(3.0), fastagop.ConjugateGradients(rank=3), {1: "a", "b": 2.0}, {"array": 1}],
)
def test_parameters_come_back(value):
    assert files.unpack_value(json.loads(json.dumps(files.pack_value(value)))) == value


@pytest.mark.parametrize("dtype", ["<i8", "<f4", "<U3", "M8[D]", "m8[s]", "O", "?"])
def test_labels_come_back(dtype):
    value = np.array([1, 0]).astype(dtype)
    found = files.unpack_value(json.loads(json.dumps(files.pack_value(value))))
    assert found.dtype == value.dtype
    assert found.tolist() == value.tolist()


def test_values_that_json_does_not_know():
    assert files.pack_value(np.random.RandomState(0)) is None
    assert files.pack_value(np.float32(0.5)) == 0.5
    assert [files.pack_value(d) for d in (torch.float64, np.dtype("f4"), np.float64)] == [
        "float64",
        "float32",
        "float64",
    ]
    assert files.pack_value(torch.device("cpu")) == "cpu"


# ---- checkpoints

X = np.random.default_rng(0).normal(size=(24, 4))
Y = np.arange(24) % 3


def fit(folder, make=DeepRFMClassifier, X=X, y=Y, **changes):
    how = {"depth": 2, "width": 16, "ridge": 0.01, "random_state": 0, "checkpoint_dir": folder}
    return make(**{**how, **changes}).fit(X, y)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 3}, "depth was 2, now 3"),
        ({"depth": 3, "ridge": 0.5}, "depth was 2, now 3; ridge was 0.01, now 0.5"),
        ({"kernel": Laplace(3.0)}, r"kernel was 'Laplace\(bandwidth=2.0\)', now 'Laplace\(bandwidth=3.0\)'"),
        ({"make": DeepRFMRegressor}, "task was 'classification', now 'regression'"),
        ({"X": X + 1}, "the data differ"),
        ({"y": (Y + 1) % 3}, "the data differ"),
        ({"random_state": 1}, "the seeds differ"),
        ({"dtype": "float64"}, "the data differ"),
    ],
)
def test_another_fit_is_told_apart(changes, words, tmp_path):
    fit(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^checkpoint_dir .* belongs to another fit: {words}\. Use another folder, or"
    ):
        fit(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"memory_limit": 1e8}, {"verbose": 1}, {"random_state": None}])
def test_the_same_fit_is_resumed(changes, tmp_path):
    """The memory that it may take, and its bar, are no part of a fit; without a seed any will do."""
    seen = []
    first = fit(tmp_path)
    again = fit(tmp_path, callbacks=(seen.append,), **changes)
    assert seen == []
    assert np.array_equal(first.decision_function(X), again.decision_function(X))


def test_seeds_of_an_earlier_run_are_kept(tmp_path):
    first, again = (fit(tmp_path, random_state=None) for _ in range(2))
    assert np.array_equal(first.decision_function(X), again.decision_function(X))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [1]}, "its layers are no list of checksums"),
        ({"layers": "ab"}, "its layers are no list of checksums"),
        ({"layers": ["a", None]}, "its layers are no list of checksums"),
        ({"seeds": 3}, "its seeds, settings or features are none"),
        ({"settings": []}, "its seeds, settings or features are none"),
    ],
)
def test_a_manifest_of_other_types(changes, words, tmp_path):
    fit(tmp_path, depth=1)
    path = tmp_path / "manifest.json"
    files.write_json(path, {**files.read_json(path), **changes})
    with pytest.raises(ValueError, match=rf"^checkpoint_dir: .* is corrupt: {words}\. Remove the folder"):
        fit(tmp_path, depth=1)


def test_a_manifest_without_features(tmp_path):
    fit(tmp_path, depth=1)
    path = tmp_path / "manifest.json"
    files.write_json(path, {key: value for key, value in files.read_json(path).items() if key != "features"})
    with pytest.raises(ValueError, match="its seeds, settings or features are none"):
        fit(tmp_path, depth=1)


# ---- saved estimators


def test_parts_that_do_not_belong_together(tmp_path):
    path = tmp_path / "model"
    RFMClassifier(iterations=1).fit(X, Y).save(path)
    tensors, metadata = files.read(path, "fitted estimator")
    for changed, words in (
        ({"centers": tensors["centers"][:-1]}, r"centers \(23, 4\) and alpha \(24, 3\) do not belong together"),
        ({"centers": tensors["centers"][0]}, r"centers \(4,\) and alpha"),
        ({"alpha": tensors["alpha"][:, :2]}, "3 classes and 2 outputs do not belong together"),
    ):
        files.write(path, "fitted estimator", {**tensors, **changed}, {**metadata})
        with pytest.raises(ValueError, match=words):
            fastagop.load(path)


def test_a_kernel_inside_parameters_is_saved_once(tmp_path):
    """Parameters are those of the constructor: nested ones are part of the kernel."""
    path = tmp_path / "model"
    model = RFMClassifier(Laplace(3.0), iterations=1).fit(X, Y)
    model.save(path)
    parameters = files.read(path, "fitted estimator")[1]["parameters"]
    assert set(parameters) == set(model.get_params(deep=False)) - {"checkpoint_dir", "callbacks", "process_group"}
