"""Damaged and forged files: one ValueError that names the file, or the right contents; never a huge allocation."""

import contextlib
import io
import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import fastagop
from fastagop import DeepRFMClassifier, datasets
from fastagop.datasets import npz
from fastagop.estimators import files as storage
from fastagop.estimators import tensor_files

RNG = np.random.default_rng(0)


@contextlib.contextmanager
def little_memory(limit: float = 64e6):
    """Python's own and NumPy's allocations stay below a limit."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# ---- Fitted estimators


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(points, their outputs, the bytes of a saved classifier)"""
    X = np.random.default_rng(1).normal(size=(40, 5))
    model = DeepRFMClassifier(depth=2, width=12, random_state=0).fit(X, np.array(["a", "b"])[np.arange(40) % 2])
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save(path)
    return X, model.decision_function(X), path.read_bytes()


def test_flipped_and_cut_models(saved, tmp_path, damaged, outcome):
    X, expected, data = saved
    path = tmp_path / "model"
    for broken in damaged(data, 500):
        path.write_bytes(broken)
        found = outcome(lambda: fastagop.load(path).decision_function(X), path)
        assert found is None or np.array_equal(found, expected)


def forged(data: bytes, change) -> bytes:
    """The file with a changed description and the checksum that goes with it."""
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["words"])
    tensors = _tensors(data)
    text = change if isinstance(change, str) else json.dumps(change(metadata, tensors) or metadata)
    digest = storage.fingerprint(tensors, text)
    return save(tensors, metadata={"fastagop": storage.FORMAT, "sha256": digest, "words": text})


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


def changed(*keys, value=None):
    """A change that sets, or with no value drops, an entry of the description."""

    def change(metadata, _):
        for key in keys[:-1]:
            metadata = metadata[key]
        metadata.pop(keys[-1]) if value is None else metadata.update({keys[-1]: value})

    return change


def drop(name):
    def change(_, tensors):
        del tensors[name]

    return change


FORGERIES = {
    "huge text dtype": changed("attributes", "classes_", value={"array": ["a", "b"], "dtype": "S2000000000"}),
    "huge unicode": changed("attributes", "classes_", value={"array": ["a", "b"], "dtype": "U500000000"}),
    "structured": changed("attributes", "classes_", value={"array": [1, 2], "dtype": "i4,i4"}),
    "subarray": changed("attributes", "classes_", value={"array": [1, 2], "dtype": "(1000000000,)f8"}),
    "no dtype": changed("attributes", "classes_", value={"array": [1, 2], "dtype": "nonsense"}),
    "overflow": changed("attributes", "classes_", value={"array": [10**30, 2], "dtype": "<i8"}),
    "three classes": changed("attributes", "classes_", value={"array": [1, 2, 3], "dtype": "<i8"}),
    "classes no list": changed("attributes", "classes_", value={"array": 7, "dtype": "<i8"}),
    "no attributes": changed("attributes"),
    "no kernel": changed("kernel"),
    "kernel without a parameter": changed("kernel", value={"name": "Laplace"}),
    "negative bandwidth": changed("kernel", value={"name": "Laplace", "bandwidth": -1.0}),
    "kernel of a list": changed("kernel", value={"name": ["Laplace"], "bandwidth": 1.0}),
    "no solution": changed("solution"),
    "solution with more": changed("solution", "nonsense", value=1),
    "solution dtype": changed("solution", "dtype", value="float8"),
    "unknown parameter": changed("parameters", "nonsense", value=1),
    "no parameters": changed("parameters"),
    "estimator of a list": changed("estimator", value=["DeepRFMClassifier"]),
    "estimator unknown": changed("estimator", value="os.system"),
    "layers no list": changed("layers", value=3),
    "layer of a number": changed("layers", value=[1, 2]),
    "no kind": changed("kind"),
    "no centers": drop("centers"),
    "no alpha": drop("alpha"),
    "no weight": drop("0.weight"),
    "a list": "[1, 2]",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "no json": "{",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_models_with_a_right_checksum(saved, tmp_path, name):
    path = tmp_path / "model"
    path.write_bytes(forged(saved[2], FORGERIES[name]))
    with little_memory(), pytest.raises(ValueError, match="model") as caught:
        fastagop.load(path)
    assert str(path) in str(caught.value)


def test_unforged_is_loaded(saved, tmp_path):
    """The forger itself does no harm."""
    (tmp_path / "model").write_bytes(forged(saved[2], lambda metadata, tensors: None))
    assert np.array_equal(fastagop.load(tmp_path / "model").decision_function(saved[0]), saved[1])


def tensor_file(header, body=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "content",
    [
        tensor_file({}, length=2**63),
        tensor_file({}, length=2**40),
        tensor_file(entry(shape=(2**40,), offsets=(0, 2**42))),
        tensor_file(entry(), bytes(4)),
        tensor_file(entry(), bytes(12)),
        tensor_file(entry(offsets=(4, 12)), bytes(12)),
        tensor_file(entry(shape=(3,)), bytes(8)),
        tensor_file(entry(shape=(-2,)), bytes(8)),
        tensor_file(entry(shape=(2.0,)), bytes(8)),
        tensor_file(entry(shape=(2**62, 2**62, 0), offsets=(0, 0))),
        tensor_file(entry(dtype="F4"), bytes(8)),
        tensor_file(entry(dtype=["F32"]), bytes(8)),
        tensor_file(entry(offsets=(0,)), bytes(8)),
        tensor_file({**entry(), "b": entry()["a"]}, bytes(8)),
        tensor_file({"a": 3}),
        tensor_file({"__metadata__": {"a": 1}}),
        tensor_file({"__metadata__": []}),
        tensor_file([]),
        tensor_file(b"[" * 100_000),
        tensor_file(b"\xff\xfe"),
        tensor_file(b'{"a": ' + b"1" * 5000 + b"}"),
    ],
    ids=str,
)
def test_forged_tensor_headers(tmp_path, content):
    path = tmp_path / "tensors"
    path.write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match="tensors is truncated, corrupt or no safetensors file"):
        tensor_files.read_tensors(path)


def test_tensors_of_every_kind_come_back(tmp_path):
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    tensors = {str(kind): torch.randn(3, 2).mul(9).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "one byte": torch.ones(1, dtype=torch.bool)}
    (tmp_path / "a").write_bytes(save(tensors, metadata={"é": "猫"}))
    found, metadata = tensor_files.read_tensors(tmp_path / "a")
    assert metadata == {"é": "猫"}
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        assert found[name].data_ptr() % 16 == 0


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{path.name} is (a folder|no regular file)"):
            fastagop.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastagop.load(tmp_path / "nowhere")


# ---- JSON with a checksum


def test_flipped_and_cut_descriptions(tmp_path, damaged, outcome):
    path, metadata = tmp_path / "manifest.json", {"layers": ["abc", "def"], "n": 3, "x": 0.1, "none": None, "é": [[]]}
    storage.write_json(path, metadata)
    assert storage.read_json(path) == metadata
    for broken in damaged(path.read_bytes(), 500):
        path.write_bytes(broken)
        assert outcome(lambda: storage.read_json(path), path) in (None, metadata)  # a flip in white space is no damage


@pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")
def test_flipped_checkpoints(tmp_path, damaged, outcome):
    """Whatever file of a folder is hit, resuming gives the same bits or names the file."""
    X, y = np.random.default_rng(2).normal(size=(30, 4)), np.arange(30) % 2
    model = DeepRFMClassifier(depth=1, width=6, random_state=0, checkpoint_dir=tmp_path)
    expected = model.fit(X, y).decision_function(X)
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        for broken in damaged(data, 10):
            path.write_bytes(broken)
            found = outcome(lambda: model.fit(X, y).decision_function(X), path)
            assert found is None or np.array_equal(found, expected)
        path.write_bytes(data)
    assert np.array_equal(model.fit(X, y).decision_function(X), expected)


# ---- Archives of arrays


def archive(path: Path, **changes) -> Path:
    arrays = {"x_train": RNG.integers(0, 256, (9, 4, 3), dtype=np.uint8), "y_train": np.arange(9)} | changes
    np.savez_compressed(path, allow_pickle=True, **arrays)
    return path


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("n", [None, 4])
def test_flipped_and_cut_archives(tmp_path, write, n, damaged, outcome):
    path = tmp_path / "made.npz"
    write(path, x_train=RNG.integers(0, 256, (9, 40), dtype=np.uint8), y_train=np.arange(9))
    X, y = datasets.load(path, n=n)
    for broken in damaged(path.read_bytes(), 500):
        path.write_bytes(broken)
        found = outcome(lambda: datasets.load(path, n=n), path)
        assert found is None or (torch.equal(found[0], X) and torch.equal(found[1], y))


def member(array: np.ndarray, header: bytes | None = None) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=True)
    return content.getvalue() if header is None else header


def zipped(path: Path, compression=zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in members.items():
            made.writestr(f"{name}.npy", content)
    return path


def header(shape: str, descr: str = "|u1", size: int = 0) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(size)


LABELS, MILLIONS = member(np.arange(9)), np.zeros(10**8, np.uint8)
ARCHIVES = {
    "shape larger than the member": {"x_train": header("(9, 1000000000)"), "y_train": LABELS},
    "shape beyond 64 bits": {"x_train": header("(9, 99999999999999999999)"), "y_train": LABELS},
    "negative shape": {"x_train": header("(-9, 4)"), "y_train": LABELS},
    "shape of text": {"x_train": header("('9', 4)"), "y_train": LABELS},
    "huge text": {"x_train": header("(9, 1)", "S2000000000"), "y_train": LABELS},
    "nothing huge": {"x_train": header("(1000000000000, 1)", "S0"), "y_train": LABELS},
    "objects": {"x_train": member(np.array([[print]])), "y_train": LABELS},
    "long header": {"x_train": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + bytes(5000), "y_train": LABELS},
    "version 9": {"x_train": b"\x93NUMPY\x09\x00" + bytes(200), "y_train": LABELS},
    "nested header": {"x_train": header("(" * 900 + ")" * 900), "y_train": LABELS},
    "bomb of other labels": {
        "x_train": member(np.zeros((9, 4), np.uint8)),
        "y_train": member(np.zeros(10**8, np.int8)),
    },
    "bomb of other images": {"x_train": member(MILLIONS[:, None]), "y_train": LABELS},
    "no array": {"x_train": b"hello", "y_train": LABELS},
    "empty": {"x_train": b"", "y_train": LABELS},
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_forged_archives(tmp_path, name):
    path = zipped(tmp_path / "made.npz", **ARCHIVES[name])
    with little_memory(), pytest.raises(ValueError, match=r"made\.npz"):
        datasets.load(path)


@pytest.mark.parametrize("dtype", [np.dtype("U300"), np.dtype(complex), np.dtype(np.int32)])
def test_images_of_another_dtype_are_refused_before_they_are_read(tmp_path, dtype):
    path = archive(tmp_path / "made.npz", x_train=np.zeros((9, 2**24 // dtype.itemsize), dtype))
    with little_memory(), pytest.raises(TypeError, match=r"x_train in .*made.npz must be uint8 or floating"):
        datasets.load(path)


def test_more_than_memory_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    path = archive(tmp_path / "made.npz", x_train=np.zeros((9, 2**22), np.uint8))
    monkeypatch.setattr(npz, "host_bytes", lambda: 2**24)
    with little_memory(), pytest.raises(ValueError, match=r"x_train in .*made.npz takes .* free memory"):
        datasets.load(path)
    with little_memory(), pytest.raises(ValueError, match="more than this machine's free memory"):
        npz.read(path)
    assert len(datasets.load(path, n=1)[0]) == 1  # and what is asked for may fit


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path, method):
    path = zipped(tmp_path / "made.npz", method, x_train=member(np.zeros((9, 4), np.uint8)), y_train=LABELS)
    with pytest.raises(ValueError, match=r"made.npz.*compression method"):
        datasets.load(path)


def test_a_promise_that_no_compressed_bytes_can_keep(tmp_path):
    """The directory says a gigabyte where a hundred bytes are stored."""
    path = zipped(tmp_path / "made.npz", x_train=header("(9, 4)", size=36), y_train=LABELS)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(b"PK\x01\x02"))
    data[at + 24 : at + 28] = struct.pack("<I", 10**9)
    path.write_bytes(data)
    with little_memory(), pytest.raises(ValueError, match=r"made.npz.*cannot hold"):
        datasets.load(path)


def test_sound_archives_of_every_kind(tmp_path):
    arrays = {
        "fortran": np.asfortranarray(RNG.normal(size=(5, 3))),
        "big": RNG.normal(size=(2, 2)).astype(">f4"),
        "text": np.array(["a", "béé"]),
        "dates": np.array(["2024-02-29"], "M8[D]"),
        "scalar": np.array(3.5),
        "none": np.empty((0, 4)),
        "half": np.ones((3, 3), np.float16),
        "complex": np.ones(2, complex),
    }
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "a.npz", **arrays)
        found = npz.read(tmp_path / "a.npz")
        assert set(found) == set(arrays)
        for name, value in arrays.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert np.array_equal(found[name], value)
    with npz.Archive(tmp_path / "a.npz") as opened:
        assert np.array_equal(opened.array("fortran", 2), arrays["fortran"][:2])
        assert np.array_equal(opened.array("half", 2), arrays["half"][:2])


def test_a_folder_named_like_an_archive(tmp_path):
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(ValueError, match=r"a\.npz is a folder"):
        datasets.load(tmp_path / "a.npz")


def test_labels_beyond_int64(tmp_path):
    path = archive(tmp_path / "made.npz", y_train=np.full(9, 2**63 + 1, np.uint64))
    with pytest.raises(ValueError, match=r"y_train in .*made.npz holds 9223372036854775809"):
        datasets.load(path)
