"""MNIST's raw files, checked: size, ranges and the published contents' checksums."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from fastagop.kernels import errors

# MD5 of the files as published, unpacked.
_PUBLISHED = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# A file begins with these four bytes, which say that bytes follow and in how many dimensions.
_IMAGES, _LABELS = 0x803, 0x801
_SIDE = 28
_LARGEST = 2**28  # A file has at most so many bytes, five times those of the published one.


class UnknownDataWarning(UserWarning):
    """A data set's files are sound, but not the published ones."""


class DamagedData(ValueError, FileNotFoundError):
    """A data set's file is there and not what it should be; a FileNotFoundError too, since no intact file was found."""


def mnist(raw: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) uint8 and labels (N,) uint8 of a split, from raw files or, where those are missing, .gz ones.

    Raises:
        FileNotFoundError: a file is missing. DamagedData: naming the file and what is wrong with it.

    Warns:
        UnknownDataWarning: sound files that are not the published ones.
    """
    start = "train" if split == "train" else "t10k"
    names = [f"{start}-images-idx3-ubyte", f"{start}-labels-idx1-ubyte"]
    (images, shape), (labels, count) = (
        _read(raw / name, magic) for name, magic in zip(names, (_IMAGES, _LABELS), strict=True)
    )
    if shape[1:] != (_SIDE, _SIDE):
        raise DamagedData(f"{raw / names[0]} must hold images of 28 x 28, got {shape[1]} x {shape[2]}")
    if shape[0] != count[0] or shape[0] == 0:
        raise DamagedData(f"{raw / names[0]} holds {shape[0]} images, {names[1]} {count[0]} labels")
    if labels.max() > 9:
        raise DamagedData(f"{raw / names[1]} must hold labels from 0 to 9, got {labels.max()}")
    return images.reshape(shape), labels


def _read(path: Path, magic: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The bytes after an idx file's header, and the dimensions that the header gives."""
    data = _unpacked(path)
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    if len(data) < header or struct.unpack(">I", data[:4])[0] != magic:
        raise DamagedData(f"{path} does not begin as an idx file of {dimensions} dimensions does")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = header + int(np.prod([int(length) for length in shape], dtype=object))
    if len(data) != expected:
        raise DamagedData(f"{path} must have {expected} bytes for the {shape[0]} items it announces, got {len(data)}")
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != _PUBLISHED[path.name]:
        errors.warn(f"{path} is not the file that was published as MNIST: its checksum differs", UnknownDataWarning)
    return np.frombuffer(data, np.uint8, offset=header).copy(), shape


def _unpacked(path: Path) -> bytes:
    """A file's bytes; those of its .gz where it is missing."""
    if path.exists():
        if not path.is_file():
            raise DamagedData(f"{path} is no file")
        if path.stat().st_size > _LARGEST:
            raise DamagedData(f"{path} has {path.stat().st_size} bytes, far more than MNIST")
        return path.read_bytes()
    packed = path.with_name(f"{path.name}.gz")
    if not packed.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with gzip.open(packed) as file:
            data = file.read(_LARGEST + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedData(f"{packed} is damaged ({error})") from error
    if len(data) > _LARGEST:
        raise DamagedData(f"{packed} unpacks to far more bytes than MNIST has")
    return data
