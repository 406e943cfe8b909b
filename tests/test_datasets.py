"""Loading without a network: made files in the real layouts, and MNIST itself where it is at hand."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from fastagop import datasets
from fastagop.datasets import loading
from reproduce import settings

HERE = Path(__file__).resolve()
DATA_ROOT = Path(os.environ.get("FASTAGOP_DATA_ROOT", HERE.parents[2] / "shared" / "data"))
RNG = np.random.default_rng(0)


def made(**changes) -> dict[str, np.ndarray]:
    images = RNG.integers(0, 256, (7, 4, 3, 2), dtype=np.uint8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255  # both ends of the scale
    whole = {"x_train": images, "y_train": np.arange(7, dtype=np.uint8)[::-1]}
    whole |= {"x_test": images[:2] // 2, "y_test": np.array([3, 1])}
    return whole | changes


@pytest.fixture
def npz(tmp_path):
    def write(**changes) -> Path:
        np.savez(tmp_path / "made.npz", **made(**changes))
        return tmp_path / "made.npz"

    return write


def test_npz_images_are_scaled_and_flattened_row_major(npz):
    path = npz()
    X, y = datasets.load(path)
    images = np.load(path)["x_train"]
    assert (X.dtype, y.dtype, X.shape) == (torch.float32, torch.int64, (7, 24))
    assert X[0, 0] == 0
    assert X[0, 1] == 1  # 255 / 255, exactly
    assert X[3, (2 * 3 + 1) * 2 + 1] == np.float32(images[3, 2, 1, 1]) / np.float32(255)
    assert y.tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_npz_test_split_and_string_path(npz):
    X, y = datasets.load(str(npz()), split="test")
    assert len(X) == 2
    assert y.tolist() == [3, 1]


def test_n_takes_the_first_points_in_file_order(npz):
    path = npz()
    X, y = datasets.load(path, n=np.int64(3))
    whole = datasets.load(path)
    assert torch.equal(X, whole[0][:3])
    assert torch.equal(y, whole[1][:3])


def test_npz_floats_are_taken_as_they_are(npz):
    values = RNG.normal(size=(7, 5)) * 300
    X, _ = datasets.load(npz(x_train=values))
    np.testing.assert_array_equal(X, values.astype(np.float32))


def test_digits_splits_are_the_whole_set_in_order():
    from sklearn.datasets import load_digits

    (X, y), (X_test, y_test) = datasets.load("digits"), datasets.load("digits", split="test")
    images, labels = load_digits(return_X_y=True)
    assert (len(X), len(X_test)) == (1437, 360)
    np.testing.assert_array_equal(torch.cat([X, X_test]), (images / 16).astype(np.float32))  # exact: 16 = 2^4
    assert torch.cat([y, y_test]).tolist() == labels.tolist()


@pytest.mark.skipif(not (DATA_ROOT / "MNIST" / "raw").is_dir(), reason=f"no MNIST/raw under {DATA_ROOT}")
def test_mnist():
    X, y = datasets.load("mnist", DATA_ROOT, n=1000)
    assert X.shape == (1000, 784)
    assert (X.min(), X.max()) == (0, 1)
    assert y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # the well-known first digits
    assert len(datasets.load("mnist", DATA_ROOT, split="test")[0]) == 10_000


def test_svhn_is_channel_first_and_labels_ten_as_zero(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    module = pytest.importorskip("torchvision.datasets.svhn")
    monkeypatch.setattr(module, "check_integrity", lambda *_: True)  # a made file has no known checksum
    stored = RNG.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)  # the file's own layout
    io.savemat(tmp_path / "train_32x32.mat", {"X": stored, "y": np.array([[10], [1], [9], [10]], np.uint8)})
    X, y = datasets.load("svhn", tmp_path)
    np.testing.assert_array_equal(X[2].reshape(3, 32, 32), stored[..., 2].transpose(2, 0, 1) / np.float32(255))
    assert y.tolist() == [0, 1, 9, 0]


def test_cifar10_is_channel_last(tmp_path, monkeypatch):
    module = pytest.importorskip("torchvision.datasets.cifar")
    monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    stored = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)  # red plane, green plane, blue plane
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": stored, "labels": [int(name == "test_batch"), 8]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    X, y = datasets.load("cifar10", tmp_path)
    assert (len(X), y[:2].tolist()) == (10, [0, 8])
    planes = stored[1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(X[1].reshape(32, 32, 3), planes / np.float32(255))
    assert datasets.load("cifar10", tmp_path, split="test")[1].tolist() == [1, 8]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", r"MNIST/raw|train-images-idx3-ubyte.*MNIST/raw"),
        ("cifar10", r"data_batch_5.*cifar-10-batches-py"),
        ("svhn", "test_32x32.mat"),  # the split's own file
    ],
)
def test_missing_files_are_named_with_the_remedy(name, file, tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=file) as caught:
        datasets.load(name, tmp_path, split="test")
    assert "download=True" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())  # looking for files makes none


def test_a_failed_download_says_the_same(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    def offline(self):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", offline)
    with pytest.raises(FileNotFoundError, match=r"batches\.meta.*download failed"):
        datasets.load("cifar10", tmp_path, download=True)


def test_a_damaged_file_is_not_a_riddle(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="intact files train-images-idx3-ubyte"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "x_train .* must be uint8 or floating, got int64", {"x_train": np.ones((7, 2), int)}),
        (TypeError, "y_train .* must hold integers, got float64", {"y_train": np.ones(7)}),
        (
            ValueError,
            r"must have shapes .* got \(7, 2\) and \(6,\)",
            {"x_train": np.ones((7, 2)), "y_train": np.arange(6)},
        ),
        (ValueError, "must have shapes", {"x_train": np.ones((0, 2)), "y_train": np.arange(0)}),
        (ValueError, "NaN", {"x_train": np.full((7, 2), np.nan)}),
        # finite in the file, infinite once float32
        pytest.param(ValueError, "beyond float32", {"x_train": np.full((7, 2), 1e60)}, id="overflow"),
    ],
)
def test_refuses_an_npz(npz, error, message, changes):
    with np.errstate(all="raise"), pytest.raises(error, match=message):
        datasets.load(npz(**changes))


def test_refuses_an_npz_without_the_split(tmp_path):
    np.savez(tmp_path / "half.npz", x_train=np.ones((2, 2)), y_train=np.arange(2))
    with pytest.raises(ValueError, match="must hold x_test and y_test, got x_train, y_train"):
        datasets.load(tmp_path / "half.npz", split="test")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "name_or_path must be one of 'digits', 'mnist'", {"name_or_path": "MNIST"}),
        (TypeError, "name_or_path must be a name or the path of an .npz, got list", {"name_or_path": ["digits"]}),
        (FileNotFoundError, "no file nowhere.npz", {"name_or_path": "nowhere.npz"}),
        (ValueError, "split must be 'train' or 'test', got 'valid'", {"split": "valid"}),
        (ValueError, "n must be None or an integer from 1 to 1437 .*, got 1438", {"n": 1438}),
        (ValueError, "n must be", {"n": 0}),
        (ValueError, "n must be", {"n": 2.0}),
        (ValueError, "n must be", {"n": True}),
    ],
)
def test_refuses_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        datasets.load(**{"name_or_path": "digits", **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardize_uses_the_training_set_alone(dtype):
    train, test = (torch.from_numpy(RNG.normal(5, 3, (n, 4))).to(dtype) for n in (50, 9))
    scaled, other = datasets.standardize(train, test)
    mean, std = train.double().numpy().mean(0), train.double().numpy().std(0)
    eps = torch.finfo(dtype).eps
    # one rounding to dtype of values up to 4, after float64 arithmetic
    np.testing.assert_allclose(scaled, (train.double().numpy() - mean) / std, rtol=eps, atol=64 * 2.3e-16)
    np.testing.assert_allclose(other, (test.double().numpy() - mean) / std, rtol=eps, atol=64 * 2.3e-16)
    assert (scaled.dtype, other.dtype) == (dtype, dtype)
    assert datasets.standardize(train)[0].shape == train.shape  # a tuple of one


@pytest.mark.parametrize("n", [3, 7, 1000, 4099])  # sums of 0.1 round differently; blocks and a remainder
def test_constant_features_become_zero_everywhere(n):
    # The naive variance of copies of 0.1 is rounding noise, which must not be scaled up to 1.
    train = torch.full((n, 9), 0.1, dtype=torch.float64)
    train[:, 1] = torch.arange(n)
    test = torch.full((1, 9), 0.3, dtype=torch.float64)
    scaled, other = datasets.standardize(train, test)
    constant = [0, *range(2, 9)]
    assert not scaled[:, constant].any()
    assert not other[:, constant].any()
    assert scaled[:, 1].square().mean().item() == pytest.approx(1, rel=n * 2.3e-16)


@pytest.mark.parametrize(("offset", "size"), [(0, 1e-170), (0, 1e-160), (1.7e9, 1.0), (1e15, 8.0)])
def test_standardize_keeps_digits_in_any_unit_and_at_any_offset(offset, size):
    """Such as time stamps; what is left is the rounding of the features themselves, which differences do not add to."""
    train = offset + size * RNG.normal(size=(1000, 2))
    exact = (train - train[0]).astype(np.longdouble) / size
    exact = (exact - exact.mean(0)) / exact.std(0)
    scaled, again = datasets.standardize(torch.from_numpy(train), torch.from_numpy(train[:9]))
    np.testing.assert_allclose(scaled, exact.astype(float), rtol=1e-13, atol=1e-13)
    assert torch.equal(scaled[:9], again)


def test_a_path_may_be_a_name():
    assert torch.equal(datasets.load(Path("digits"), n=5)[0], datasets.load("digits", n=5)[0])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "X_train must be a floating torch.Tensor, got ndarray|got float64", (np.ones((2, 2)),)),
        (TypeError, "X_train must be a floating torch.Tensor, got torch.uint8", (torch.ones(2, 2, dtype=torch.uint8),)),
        (ValueError, "X_train must be a non-empty matrix", (torch.ones(0, 2),)),
        (
            ValueError,
            r"others\[1\] must be .* X_train's columns",
            (torch.ones(2, 2), torch.ones(1, 2), torch.ones(2, 3)),
        ),
        (ValueError, r"others\[0\] holds entries that are NaN", (torch.ones(2, 2), torch.full((1, 2), torch.nan))),
        (ValueError, "too large to square", (torch.full((2, 2), 1e200, dtype=torch.float64),)),
        (ValueError, "X_train must hold numbers, got .* meta", (torch.ones(2, 2, device="meta"),)),
        (TypeError, "X_train must be a dense torch.Tensor", (torch.eye(2).to_sparse(),)),
    ],
)
def test_standardize_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        datasets.standardize(*arguments)


def test_a_data_set_is_one_entry(tmp_path, monkeypatch):
    """Its files are asked for, its labels checked and its name known, also to the commands of reproduce."""
    images, labels = RNG.integers(0, 256, (6, 3, 2, 2), dtype=np.uint8), np.array([0, 11, 3, 4, 5, 2])

    def read(root, split, download):
        (root / "made" / f"{split}.bin").read_bytes()
        return images, labels

    entry = loading.Named("Made", read, points=6, classes=12, files="{split}.bin", folder="made", channels_first=True)
    monkeypatch.setitem(loading.NAMED, "made", entry)
    with pytest.raises(FileNotFoundError, match=r"made needs intact files train.bin in .*made: put them there or"):
        datasets.load("made", tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "train.bin").touch()
    X, y = datasets.load("made", tmp_path, n=2)
    np.testing.assert_array_equal(X, images[:2].reshape(2, 12) / np.float32(255))
    assert y.tolist() == [0, 11]
    assert settings.Experiment("made").channels_first
    assert settings.points("made", None) == 6
    with pytest.raises(ValueError, match=r"'svhn', 'made' or the path of an \.npz"):
        datasets.load("none", tmp_path)
    monkeypatch.setitem(loading.NAMED, "made", dataclasses.replace(entry, classes=10))
    with pytest.raises(ValueError, match="made must hold labels from 0 to 9, got 0 to 11"):
        datasets.load("made", tmp_path)


def test_data_sets_have_the_points_that_are_said():
    assert len(datasets.load("digits")[0]) == loading.NAMED["digits"].points
