"""MNIST, CIFAR-10 and SVHN files: sizes, ranges, published checksums; damage named, unknown contents warned of."""

import gzip
import hashlib
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastagop import datasets
from fastagop.datasets import UnknownDataWarning, raw_images

RNG = np.random.default_rng(0)


def mnist_files(root: Path, images: int = 50, labels: int | None = None, largest: int = 9) -> Path:
    """A small data set in MNIST's form; the test split is its first half."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    count = images if labels is None else labels
    for start in ("train", "t10k"):
        pixels = RNG.integers(0, 256, (images, 28, 28), dtype=np.uint8).tobytes()
        (raw / f"{start}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, images, 28, 28) + pixels)
        names = bytes(min(k % 10, largest) for k in range(count - 1)) + bytes([largest])
        (raw / f"{start}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + names)
    return raw


def load_mnist(root, **options):
    pytest.importorskip("torchvision")
    return datasets.load("mnist", root, **options)


def test_unknown_mnist_files_warn(tmp_path):
    mnist_files(tmp_path)
    with pytest.warns(
        UnknownDataWarning, match=r"train-images-idx3-ubyte is not the file that was published"
    ) as caught:
        X, y = load_mnist(tmp_path)
    assert X.shape == (50, 784)
    assert y.tolist() == [k % 10 for k in range(50)]
    assert len(caught) == 2
    assert caught[0].filename == __file__


def test_published_mnist_is_silent(recwarn):
    root = Path(os.environ.get("FASTAGOP_DATA_ROOT", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("no MNIST at hand")
    for split, count in (("train", 60_000), ("test", 10_000)):
        assert len(load_mnist(root, split=split)[1]) == count
    assert not [w for w in recwarn if issubclass(w.category, UnknownDataWarning)]


@pytest.mark.filterwarnings("ignore::fastagop.datasets.UnknownDataWarning")
def test_one_image_is_a_data_set_and_none_is_not(tmp_path):
    raw = mnist_files(tmp_path, images=1)
    assert load_mnist(tmp_path)[0].shape == (1, 784)
    (raw / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 0, 28, 28))
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 0))
    with pytest.raises(FileNotFoundError, match="holds 0 images"):
        load_mnist(tmp_path)


@pytest.mark.filterwarnings("ignore::fastagop.datasets.UnknownDataWarning")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"labels": 30}, "holds 50 images, train-labels-idx1-ubyte 30 labels"),
        ({"largest": 200}, "must hold labels from 0 to 9, got 200"),
        ({"images": 0, "labels": 1}, "holds 0 images"),
    ],
)
def test_images_and_labels_that_do_not_fit(tmp_path, files, message):
    mnist_files(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        load_mnist(tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:10],
        lambda data: b"",
        lambda data: data[:4] + struct.pack(">I", 2**31) + data[8:],
        lambda data: b"\0\0\x0d" + data[3:],
    ],
)
@pytest.mark.filterwarnings("ignore::fastagop.datasets.UnknownDataWarning")
def test_wrong_sizes_are_named(tmp_path, name, change):
    path = mnist_files(tmp_path) / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=name):
        load_mnist(tmp_path)


def test_flipped_raw_files_are_refused_or_warned_of(tmp_path, monkeypatch, damaged, outcome):
    raw = mnist_files(tmp_path, images=12)
    published = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in raw.iterdir()}
    monkeypatch.setattr(raw_images, "_PUBLISHED", published)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw_images.mnist(raw, "train")
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        data = (raw / name).read_bytes()
        for broken in damaged(data, 60):
            (raw / name).write_bytes(broken)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = outcome(lambda: raw_images.mnist(raw, "train"), raw / name)
            assert found is None or [w.category for w in caught] == [UnknownDataWarning]
        (raw / name).write_bytes(data)


@pytest.mark.filterwarnings("ignore::fastagop.datasets.UnknownDataWarning")
def test_packed_raw_files(tmp_path):
    raw = mnist_files(tmp_path)
    X, y = load_mnist(tmp_path)
    for path in list(raw.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    found = load_mnist(tmp_path)
    assert torch.equal(found[0], X)
    assert torch.equal(found[1], y)
    path = raw / "train-labels-idx1-ubyte.gz"
    for broken in (path.read_bytes()[:-9], path.read_bytes()[:20], b"hello", path.read_bytes()[:-1] + b"\x01"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte"):
            load_mnist(tmp_path)
    path.write_bytes(gzip.compress(bytes(300_000_000), 1))
    with pytest.raises(ValueError, match="far more bytes than MNIST has"):
        load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 12], "labels from 0 to 9"), ([0], "10 images and 5 labels"), ([0, -1], "labels from 0")],
)
def test_cifar10_whose_parts_do_not_fit(tmp_path, monkeypatch, labels, message):
    module = pytest.importorskip("torchvision.datasets.cifar")
    monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    stored = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": stored, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(ValueError, match=message):
        datasets.load("cifar10", tmp_path)


def test_a_damaged_batch_is_not_unpickled(tmp_path):
    """The checksum is looked at first."""
    pytest.importorskip("torchvision")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(f"cos\nsystem\n(S'touch {tmp_path / 'read'}'\ntR.".encode())
    with pytest.raises(ValueError, match=r"cifar10 needs intact files data_batch_1"):
        datasets.load("cifar10", tmp_path)
    assert not (tmp_path / "read").exists()
