"""Arrays from .npz files that may be damaged or forged: what a header promises is checked before memory is taken."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastagop.kernels.memory.free import host_bytes

_KINDS = "biufcUSmM"  # Plain numbers, dates and text need no unpickling.
_DEFLATED = 1100  # One compressed byte stands for at most so many; deflate reaches 1032.
_HEADER = 2**16  # An array's description has at most so many bytes.
_PIECE = 2**20
_MALFORMED = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError,
    EOFError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """An array's description, before it is read; ``bytes`` is the memory that it would take."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    bytes: int


class Archive:
    """An open .npz; every damage is a ValueError that names the file.

    Args:
        path: the file.

    Raises:
        OSError: it is not there or cannot be read. ValueError: it is no .npz.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        if self._path.is_dir():
            raise ValueError(f"{path} is a folder; give the path of an .npz file")
        self._file = open(self._path, "rb")  # noqa: SIM115 (closed by close)
        try:
            with self._reading():
                self._zip = zipfile.ZipFile(self._file)
                members = self._zip.infolist()
                self._members = {m.filename.removesuffix(".npy"): m for m in members if m.filename.endswith(".npy")}
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        """The arrays' names."""
        return list(self._members)

    def checksums(self) -> list[int]:
        """CRC-32 of every array, from the archive's directory."""
        return [member.CRC for member in self._members.values()]

    def header(self, name: str) -> Header:
        """An array's description."""
        with self._opened(name) as file:
            return _header(file, self._members[name].file_size)

    def array(self, name: str, rows: int | None = None) -> np.ndarray:
        """An array, or its first rows; the checksum is that of the whole array all the same."""
        header = self.header(name)
        shape = list(header.shape)
        if rows is not None and shape and not header.fortran:
            shape[0] = min(rows, shape[0])
        needed = math.prod(shape) * header.dtype.itemsize
        if needed > host_bytes():
            raise ValueError(
                f"{name} in {self._path} takes {needed / 1e9:.3g} GB, more than this machine's free memory"
            )
        found = np.empty(math.prod(shape), header.dtype)
        with self._opened(name) as file:
            _header(file, self._members[name].file_size)
            if found.nbytes:
                _fill(file, found.view(np.uint8).data)
            while file.read(_PIECE):  # The checksum is compared when the last byte was read.
                pass
        found = found.reshape(shape[::-1]).T if header.fortran else found.reshape(shape)
        return found if rows is None else found[:rows]

    @contextmanager
    def _opened(self, name: str) -> Iterator:
        """A member's contents, once its size is one that its compressed bytes can have."""
        member = self._members[name]
        size, stored = member.file_size, member.compress_size
        possible = {zipfile.ZIP_STORED: stored, zipfile.ZIP_DEFLATED: _DEFLATED * stored}.get(member.compress_type)
        with self._reading(name):
            if possible is None:
                raise ValueError(f"compression method {member.compress_type} is not one that NumPy writes")
            if size > possible:
                raise ValueError(f"{stored} bytes cannot hold the {size} that it promises")
            with self._zip.open(member) as file:
                yield file

    @contextmanager
    def _reading(self, name: str | None = None) -> Iterator[None]:
        """Whatever a damaged file makes Python raise, as one error that names the file."""
        where = f"{self._path} is damaged or no .npz file" if name is None else f"{name} in {self._path} is damaged"
        try:
            yield
        except _MALFORMED as error:
            raise ValueError(f"{where} ({' '.join(str(error).split()) or type(error).__name__})") from error
        except OSError as error:
            if error.errno in (None, 22):  # EINVAL means that the file has no such place.
                raise ValueError(f"{where} ({error})") from error
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def _header(file, size: int) -> Header:
    """The description of an array of so many bytes, if they agree."""
    before = file.read(8)
    if len(before) < 8 or before[:6] != b"\x93NUMPY" or before[6] not in (1, 2):
        raise ValueError("it is no array of format 1 or 2")
    field = file.read(2 if before[6] == 1 else 4)
    length = int.from_bytes(field, "little")
    if length > _HEADER:
        raise ValueError(f"a description of {length} bytes is too long")
    text = io.BytesIO(field + file.read(length))
    read = np.lib.format.read_array_header_1_0 if before[6] == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(text)
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise ValueError(f"dtype {dtype} is none of plain numbers, dates or text")
    if any(not isinstance(length, int) or length < 0 for length in shape) or len(shape) > 32:
        raise ValueError(f"shape {shape} is none")
    needed = math.prod(shape) * dtype.itemsize
    if needed != size - len(before) - len(text.getvalue()) or (dtype.itemsize == 0 and math.prod(shape) > _PIECE):
        raise ValueError(f"shape {shape} and dtype {dtype} do not agree with its {size} bytes")
    return Header(shape, dtype, fortran, needed)


def read(path: str | Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name, all of them by default; errors as of ``Archive``."""
    with Archive(path) as archive:
        total = sum(archive.header(name).bytes for name in (archive.names if names is None else names))
        if total > host_bytes():
            raise ValueError(f"{path} holds {total / 1e9:.3g} GB, more than this machine's free memory")
        return {name: archive.array(name) for name in (archive.names if names is None else names)}


def _fill(file, room: memoryview) -> None:
    """Read until the room is full."""
    while len(room):
        count = file.readinto(room[:_PIECE])
        if not count:
            raise EOFError("it ends too early")
        room = room[count:]
