"""Files that are there whole or not at all, whoever else writes them at the same moment.

A file is written under a temporary name of its own in the same folder, settled on the disk, and renamed. Readers see
the old file or the new one; of two writers the later one wins. What a killed writer left is removed by the next, which
knows by the process's identity that it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

RUNNING, STOPPED, ENDED, ELSEWHERE = "running", "stopped", "ended", "elsewhere"
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.(?P<token>[0-9a-f]{8}-\d+-\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_DAY = 86400.0  # after which a temporary of a process that this host cannot ask about counts as left behind
_LONGEST = 150  # bytes of the target's name inside a temporary's; file systems allow 255 in all
_NOT_STORED = (errno.ENOSPC, errno.EIO, errno.EDQUOT)  # what fsync says when data are lost; else it is only lacking


def write(path: str | os.PathLike, data: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    A symbolic link at the path is replaced, not followed; a device or pipe is written to as it is. Permissions are
    those of any new file (the umask's).

    Raises:
        OSError: naming the path; the old file is then untouched, and nothing is left beside it.
    """
    path = Path(path)
    with _naming(path):
        if _is_stream(path):
            path.write_bytes(data)
            return
        remove_left_behind(path.parent, path.name)
        temporary = path.with_name(f".{_short(path.name)}.{process_token()}.{secrets.token_hex(4)}.tmp")
        try:
            _write_new(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _settle_folder(path.parent)


def remove_left_behind(folder: Path, name: str | None = None) -> None:
    """Remove temporaries of writers that ended without renaming them: those for one file, or all in a folder."""
    try:
        names = os.listdir(folder)
    except OSError:  # a folder that may be entered but not listed
        return
    for found in names:
        parts = _TEMPORARY.fullmatch(found)
        if parts and (name is None or parts["target"] == _short(name)):
            with contextlib.suppress(OSError):  # another writer may have been faster
                if _is_left_behind(folder / found, parts["token"]):
                    os.unlink(folder / found)


def _is_left_behind(temporary: Path, token: str) -> bool:
    state = process_state(token)
    if state == ELSEWHERE:
        return time.time() - os.lstat(temporary).st_mtime > _DAY
    return state == ENDED


def _write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a file that must not be there yet, not even as a link, and settle it on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        _settle(file.fileno())


def _settle(descriptor: int) -> None:
    """fsync, where the file system has it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _NOT_STORED:
            raise


def _settle_folder(folder: Path) -> None:
    """Settle a folder's names; systems that cannot open or settle folders do so by themselves."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        _settle(descriptor)
    finally:
        os.close(descriptor)


def _is_stream(path: Path) -> bool:
    """Whether the path leads to a device, pipe or socket, which cannot be replaced by renaming."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _short(name: str) -> str:
    """The name, or a hash of it where a temporary's name would be too long."""
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system name the file that was asked for, not its temporary."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# Who a process is, so that what it left behind can be told from what it still uses.
def process_token() -> str:
    """This process as "place-pid-start": the numbers of a pid come back after a restart, its start does not."""
    pid = os.getpid()
    return f"{_host_and_boot()}-{pid}-{_start_of(pid) or 0}"


def process_state(text: str) -> str:
    """What became of the process of a token: RUNNING, STOPPED, ENDED, or ELSEWHERE where this host cannot tell."""
    try:
        place, pid, start = text.split("-")
        number, begun = int(pid), int(start)
    except ValueError:
        return ELSEWHERE
    if place != _host_and_boot() or number < 1:
        return ELSEWHERE
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return ENDED
    except OSError:  # another user's process, so there is one
        pass
    except OverflowError:  # no pid of this system
        return ENDED
    if begun and (_start_of(number) or begun) != begun:
        return ENDED
    return {"Z": ENDED, "X": ENDED, "T": STOPPED, "t": STOPPED}.get(_process_status(number, 0), RUNNING)


def _host_and_boot() -> str:
    """A short hash of host, boot and pid namespace: where a pid means the same process."""
    parts = [platform.node()]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _start_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None where the system does not say."""
    found = _process_status(pid, 19)
    return int(found) if found.isdigit() else None


def _process_status(pid: int, index: int) -> str:
    """A field of /proc/PID/stat, counted from the state, which follows the name in brackets; empty where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[index]
    except (OSError, IndexError):
        return ""
