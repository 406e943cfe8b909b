"""Loading and standardising: what ``fastagop.datasets`` offers."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastagop.datasets import npz, raw_images
from fastagop.kernels import checks

__all__ = ["load", "standardize"]


def load(
    name_or_path: str | Path,
    root: str | Path | None = None,
    n: int | None = None,
    split: str = "train",
    download: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n points of a data set in file order (paper, appendix C: the first 50,000).

    Formula: X = pixels / 255 (digits: / 16), every image flattened row-major as stored: MNIST 28 x 28, digits
    8 x 8, CIFAR-10 32 x 32 x 3 (channel last), SVHN 3 x 32 x 32 (channel first).

    Args:
        name_or_path: "digits" (scikit-learn's, offline), "mnist", "cifar10", "svhn", or the path of an .npz
            with x_train, y_train, x_test, y_test: uint8 is divided by 255, floats are taken as they are.
        root: folder with torchvision's files, for the three data sets that need them; default "data".
        n: number of points; default all of the split.
        split: "train" or "test". For digits the first 1437 points (80%) and the last 360.
        download: let torchvision fetch missing files.

    Returns:
        X (n, d) float32, in [0, 1] for images, and y (n,) int64, on the CPU.

    Raises:
        FileNotFoundError: naming the files and where they belong. TypeError, ValueError: naming the argument, or the
            file and what is damaged in it.

    Warns:
        UnknownDataWarning: MNIST's files are sound, but not the published ones (another data set in its form).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if not isinstance(name_or_path, (str, Path)):
        kind = type(name_or_path).__name__
        raise TypeError(f"name_or_path must be a name or the path of an .npz, got {kind}; pass a str or a pathlib.Path")
    images, labels = _read(name_or_path, Path("data" if root is None else root), split, download, n)
    count = _count(n, len(labels), f"the {split} split of {name_or_path}")
    X = images[:count].reshape(count, -1)
    with np.errstate(over="ignore"):  # Such entries are refused below.
        scale = np.float32(255 if X.dtype == np.uint8 else 1)
        X = X.astype(np.float32)  # The division below works in place on this copy.
        X /= scale
    if not np.isfinite(X).all():
        raise ValueError(f"{name_or_path} holds entries that are NaN or beyond float32; clean it first")
    return torch.from_numpy(X), torch.from_numpy(labels[:count].astype(np.int64))


def standardize(X_train: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Features with mean 0 and variance 1 over the training set; constant ones become 0 everywhere.

    Formula: (x - mean) / std per column, mean and std (1/n) of X_train. The authors' code does this to pixels,
    the paper's text does not say so.

    Args:
        X_train: (n, d) floating.
        others: any number of (m, d), shifted and scaled like X_train.

    Returns:
        The new tensors, X_train's first, each of its own dtype and device.

    Raises:
        TypeError, ValueError: naming the argument that is no finite floating matrix with X_train's columns.
    """
    for i, X in enumerate((X_train, *others)):
        _check_columns("X_train" if i == 0 else f"others[{i - 1}]", X, X_train)
    # Differences from the first row keep what offsets, such as those of time stamps, would cost a mean.
    origin = X_train[0].double()
    from_origin = X_train.double() - origin
    widest = from_origin.detach().abs().amax(0)
    unit = torch.ldexp(torch.ones_like(widest), -torch.frexp(widest).exponent.clamp(min=-1000))  # squares stay normal
    variance, mean = torch.var_mean(from_origin.mul_(unit), dim=0, correction=0)
    scale = torch.where(widest == 0, 0.0, variance.rsqrt())
    return tuple(_affine(X, *(part.to(X.device) for part in (origin, unit, mean, scale))) for X in (X_train, *others))


def _affine(X: torch.Tensor, origin, unit, mean, scale) -> torch.Tensor:
    """(x - origin - mean) times scale, the latter two in a unit of each column."""
    return (X.double() - origin).mul_(unit).sub_(mean).mul_(scale).to(X.dtype)


def _read(name: str | Path, root: Path, split: str, download: bool, n) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, ...) and all integer labels (N,) of a split; of an .npz the images that are asked for."""
    name = str(name)
    if name in NAMED:
        return _named(name, root, split, download)
    if name.endswith(".npz"):
        return _npz(Path(name), split, n)
    known = ", ".join(map(repr, NAMED))
    raise ValueError(f"name_or_path must be one of {known} or the path of an .npz, got {name!r}")


def _named(name: str, root: Path, split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """A data set by its name; whatever its reader raises says which files it needs, and where."""
    known = NAMED[name]
    if not known.files:
        return known.read(root, split, download)
    try:
        return _sound(name, known.classes, *known.read(root, split, download))
    except (PermissionError, ImportError):
        raise
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, EOFError) as error:
        raise _not_intact(name, root, split, download, error) from error


def _digits(root: Path, split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    cut = len(labels) * 4 // 5
    return (images[:cut] / 16, labels[:cut]) if split == "train" else (images[cut:] / 16, labels[cut:])


def _torchvision() -> Any:
    """torchvision's data sets, which fetch their files, and read all but MNIST's."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("this data set is read by torchvision: pip install 'fastagop[reproduce]'") from error
    return datasets


def _mnist(root: Path, split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    found = _torchvision()
    if download:
        found.MNIST(root, train=split == "train", download=True)
    return raw_images.mnist(root / NAMED["mnist"].folder, split)


def _cifar10(root: Path, split: str, download: bool) -> tuple[Any, Any]:
    found = _torchvision().CIFAR10(root, train=split == "train", download=download)
    return found.data, found.targets


def _svhn(root: Path, split: str, download: bool) -> tuple[Any, Any]:
    found = _torchvision().SVHN(root, split=split, download=download)
    return found.data, found.labels


@dataclass(frozen=True)
class Named:
    """A data set that ``load`` knows by name: an entry of ``NAMED``.

    Attributes:
        title: what figures call it.
        read: (root, split, download) -> images (N, ...) of bytes, which are divided by 255, or of floats, which are not
            (bytes alone where there are ``files``), and integer labels (N,).
        points: of its training split.
        classes: the labels are below it.
        files: those that it needs, whichever split is asked for, with ", " between them; "" for one that is always
            there. Errors of the reader are said with them.
        folder: where they lie, below root.
        channels_first: images are (channels, height, width), and not (height, width, channels).
    """

    title: str
    read: Callable[[Path, str, bool], tuple[Any, Any]]
    points: int
    classes: int = 10
    files: str = ""
    folder: str = ""
    channels_first: bool = False


NAMED = {
    "digits": Named("digits", _digits, points=1437),
    "mnist": Named(
        "MNIST",
        _mnist,
        points=60_000,
        files="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte",
        folder="MNIST/raw",
    ),
    "cifar10": Named(
        "CIFAR-10",
        _cifar10,
        points=50_000,
        files="data_batch_1, data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch, batches.meta",
        folder="cifar-10-batches-py",
    ),
    "svhn": Named("SVHN", _svhn, points=73_257, files="{split}_32x32.mat", channels_first=True),
}


def _sound(name: str, classes: int, images, labels) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that a reader found intact, if there are as many and all labels are those of classes."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or len(images) == 0:
        raise raw_images.DamagedData(f"{name} must hold images of bytes, got {images.dtype} of shape {images.shape}")
    if labels.shape != images.shape[:1]:
        raise raw_images.DamagedData(f"{name} holds {len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        span = f"{labels.min()} to {labels.max()}"
        raise raw_images.DamagedData(f"{name} must hold labels from 0 to {classes - 1}, got {span}")
    return images, labels


def _not_intact(name: str, root: Path, split: str, download: bool, error: Exception) -> Exception:
    """The error of a data set that is not there, not fetched, or damaged: which files it needs, and where."""
    place = (root / NAMED[name].folder).resolve()
    needed = NAMED[name].files.format(split=split).split(", ")
    there = [file for file in needed if (place / file).exists()]
    remedy = "the download failed, put them there" if download else "put them there or pass download=True"
    message = f"{name} needs intact files {', '.join(needed)} in {place}: {remedy}"
    if isinstance(error, raw_images.DamagedData) or len(there) == len(needed):
        return raw_images.DamagedData(f"{message} ({' '.join(str(error).split())})")
    return FileNotFoundError(message)


def _npz(path: Path, split: str, n: int | None) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}: put an .npz with x_train, y_train, x_test and y_test there")
    x, y = f"x_{split}", f"y_{split}"
    with npz.Archive(path) as archive:
        if not {x, y} <= set(archive.names):
            raise ValueError(f"{path} must hold {x} and {y}, got {', '.join(archive.names)}")
        images, labels = archive.header(x), archive.header(y)
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise TypeError(f"{x} in {path} must be uint8 or floating, got {images.dtype}; convert it")
        if labels.dtype.kind not in "iu":
            raise TypeError(f"{y} in {path} must hold integers, got {labels.dtype}; number the classes")
        if len(images.shape) < 2 or 0 in images.shape or labels.shape != images.shape[:1]:
            shapes = f"{images.shape} and {labels.shape}"
            raise ValueError(f"{x} and {y} in {path} must have shapes (n, ...) and (n,), n > 0, got {shapes}")
        found = archive.array(y)
        if found.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{y} in {path} holds {found.max()}, which is beyond int64; number the classes")
        return archive.array(x, _count(n, len(found), f"the {split} split of {path}")), found


def _count(n: int | None, available: int, where: str) -> int:
    if n is None:
        return available
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or not 1 <= n <= available:
        raise ValueError(f"n must be None or an integer from 1 to {available} ({where}), got {n!r}")
    return int(n)


def _check_columns(name: str, X: torch.Tensor, like: torch.Tensor) -> None:
    if not isinstance(X, torch.Tensor) or not X.is_floating_point():
        kind = getattr(X, "dtype", type(X).__name__)
        raise TypeError(f"{name} must be a floating torch.Tensor, got {kind}; convert it first")
    checks.plain(name, X)
    if X.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on device meta; make it on 'cpu'")
    if X.ndim != 2 or 0 in X.shape or X.shape[1] != like.shape[1]:
        raise ValueError(f"{name} must be a non-empty matrix with X_train's columns, got {tuple(X.shape)}")
    if not X.abs().max().item() <= 1e150:  # The comparison is false for NaN.
        raise ValueError(f"{name} holds entries that are NaN, infinite or too large to square; clean it first")
