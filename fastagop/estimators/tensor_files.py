"""Reads safetensors files by one descriptor: what is read is one file, even where others replace it meanwhile.

Every size is checked against the file's before memory is taken; a damaged or forged header is a ValueError.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastagop.kernels.memory import host_bytes

LONGEST_TEXT = 2**25  # bytes of a description: labels and feature names are the longest things in one
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def regular_size(path: Path) -> int:
    """Bytes of a file; ValueError where the path is a folder, device or pipe."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # looked at before it is opened: a pipe would block
        what = "a folder" if stat.S_ISDIR(about.st_mode) else "no regular file"
        raise ValueError(f"{path} is {what}; give the path of a file")
    return about.st_size


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
    places = {name: _place(name, about) for name, about in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(places.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        end = last
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end} bytes, where it has {size - 8 - length}")
    return {name: _tensor(file, 8 + length, *place) for name, place in places.items()}, metadata


def _place(name: str, about: Any) -> tuple[torch.dtype, list[int], int, int]:
    """(dtype, shape, first byte, last byte) of a tensor, if they agree."""
    try:
        dtype, shape, (first, last) = _DTYPES[about["dtype"]], about["shape"], about["data_offsets"]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r} is described as {str(about)[:80]!r}") from error
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, (*shape, first, last))):
        raise ValueError(f"tensor {name!r} has no shape or place: {str(about)[:80]!r}")
    if last - first != math.prod(shape) * dtype.itemsize or (0 in shape and max(shape) > 2**40):
        raise ValueError(f"tensor {name!r} of shape {shape} cannot have {last - first} bytes")
    return dtype, shape, first, last


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(file: BinaryIO, start: int, dtype: torch.dtype, shape: list[int], first: int, last: int) -> torch.Tensor:
    found = torch.empty(shape, dtype=dtype)
    if last > first:
        file.seek(start + first)
        room = memoryview(found.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        while room:
            count = file.readinto(room)  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise ValueError("it ends too early")
            room = room[count:]
    return found
