"""Reads safetensors files by one descriptor: all of it is one file, even where others replace it meanwhile.

Every size is checked against the file's before memory is taken; a damaged or forged header is a ValueError.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from fastagop.kernels.memory.free import host_bytes

LONGEST_TEXT = 2**25  # A description has at most this many bytes; labels and feature names are its longest parts.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def regular_size(path: Path) -> int:
    """Bytes of a file; ValueError where the path is a folder, device or pipe."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # The kind is checked before the file is opened, since a pipe would block.
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise ValueError(f"{path} is {kind}; give the path of a file")
    return status.st_size


def parse_object(text: str | bytes) -> dict:
    """A JSON object; ValueError where it is none, too long or too deep."""
    if len(text) > 2 * LONGEST_TEXT:
        raise ValueError(f"a description of {len(text)} bytes is too long")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("its description is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"its description is a {type(found).__name__}, not an object")
    return found


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; the tensors are aligned as torch's own.

    Raises:
        ValueError: naming the file, which is damaged, or larger than the free memory. OSError: it cannot be read.
    """
    regular_size(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > host_bytes():
            raise ValueError(f"{path} holds {size / 1e9:.3g} GB, more than this machine's free memory")
        try:
            return _read(file, size)
        except ValueError as error:
            raise ValueError(f"{path} is truncated, corrupt or no safetensors file: {error}") from error


def _read(file: BinaryIO, size: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{size} bytes cannot hold a header of {length}")
    if length > 2 * LONGEST_TEXT:
        raise ValueError(f"a header of {length} bytes is too long")
    header = parse_object(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    places = {name: _place(name, entry) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].first, item[1].last)):
        if place.first != end:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        end = place.last
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end} bytes, where it has {size - 8 - length}")
    return {name: _tensor(file, 8 + length, place) for name, place in places.items()}, metadata


class _Place(NamedTuple):
    """A tensor's dtype and shape, and its first and last byte after the header."""

    dtype: torch.dtype
    shape: list[int]
    first: int
    last: int


def _place(name: str, entry: Any) -> _Place:
    """The place that a header's entry gives a tensor, if its numbers agree."""
    try:
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r} is described as {str(entry)[:80]!r}") from error
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, (*shape, first, last))):
        raise ValueError(f"tensor {name!r} has no shape or place: {str(entry)[:80]!r}")
    if last - first != math.prod(shape) * dtype.itemsize or (0 in shape and max(shape) > 2**40):
        raise ValueError(f"tensor {name!r} of shape {shape} cannot have {last - first} bytes")
    return _Place(dtype, shape, first, last)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(file: BinaryIO, start: int, place: _Place) -> torch.Tensor:
    found = torch.empty(place.shape, dtype=place.dtype, device="cpu")
    if place.last > place.first:
        file.seek(start + place.first)
        room = memoryview(found.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        while room:
            count = file.readinto(room)  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise ValueError("it ends too early")
            room = room[count:]
    return found
