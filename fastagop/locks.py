"""A folder for one process at a time: who holds it is written in it, and the system drops the lock with its holder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from fastagop.kernels import atomic_files

try:
    import fcntl
except ImportError:  # Without POSIX, the holder that the lock file names decides alone.
    fcntl = None

_NAME = ".lock"
_PATIENCE = 0.5  # A new holder has so many seconds to write who it is.
_BETWEEN = 0.2  # A lock that is waited for is looked at after so many seconds.
_LONGEST = 4096  # A lock file has at most so many bytes.


class FolderInUse(ValueError):
    """Another process, or another fit of this one, works in the folder; the message says which."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says."""

    pid: int
    host: str
    since: str
    token: str

    @property
    def state(self) -> str:
        """RUNNING, STOPPED, ENDED or ELSEWHERE (another host, which cannot be asked)."""
        return atomic_files.process_state(self.token)

    def __str__(self) -> str:
        states = {
            atomic_files.STOPPED: f", which is stopped: `kill -CONT {self.pid}` continues it",
            atomic_files.ENDED: ", which has ended, but left a process behind that holds the lock",
            atomic_files.ELSEWHERE: ", which cannot be asked from here",
        }
        return f"process {self.pid} on {self.host} (since {self.since}{states.get(self.state, '')})"


class Lock:
    """The lock of a folder, held from here to ``close``.

    A lock whose holder was killed is taken over. A folder that cannot be written to is not locked: whoever has it can
    only read. Forked children do not inherit the lock.

    Args:
        folder: an existing folder.
        name: the folder's name in messages.

    Raises:
        FolderInUse: naming the holder's process, host and start. OSError: the lock file cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, name: str = "folder"):
        self._path = Path(folder) / _NAME
        self._file: int | None = None
        deadline = time.monotonic() + _PATIENCE
        while self._file is None and os.access(self._path.parent, os.W_OK):
            self._file = _take(self._path)
            if self._file is not None:
                break
            holder = _read(self._path)
            named = holder is not None and holder.state != atomic_files.ENDED
            if named or time.monotonic() > deadline:
                process = holder or "another process, which did not write down who it is"
                gone = f", or remove {self._path} if that process is gone" if _is_elsewhere(holder) else ""
                raise FolderInUse(
                    f"{name} {folder} is in use by {process}; let it finish or end it, or use another folder{gone}"
                )
            time.sleep(0.01)  # The lock has just been taken, or given back.
        if self._file is not None:
            _held.add(self)
            _sign(self._file)

    def close(self) -> None:
        """Give the folder back."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # The folder may be gone.
                os.unlink(self._path)
            os.close(file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            self.close()

    def _leave_to_parent(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_held):
        lock._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def waiting(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Hold a folder, made where it is not there; wait for another holder while it runs, and say so once.

    Raises:
        FolderInUse: the holder is stopped, so that waiting might never end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    announced = False
    while True:
        try:
            lock = Lock(folder)
            break
        except FolderInUse as refusal:
            holder = _read(folder / _NAME)
            if holder is not None and holder.state == atomic_files.STOPPED:
                raise
            if not announced:
                say(f"waiting: {refusal}")
            announced = True
            time.sleep(_BETWEEN)
    with lock:
        yield


def _take(path: Path) -> int | None:
    """The descriptor of a lock file that is now this process's, or None where another one has it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        file = os.open(path, flags, 0o666)
    except PermissionError:  # Another user's lock file in a shared folder can be locked, though not signed.
        file = os.open(path, flags & ~(os.O_RDWR | os.O_CREAT))
    try:
        # A holder removes its file when it is done: a lock on the removed file is worth nothing.
        if _lock(file, path) and os.fstat(file).st_ino == os.stat(path).st_ino:
            taken, file = file, None
            return taken
    except FileNotFoundError:
        pass
    finally:
        if file is not None:
            os.close(file)
    return None


def _lock(file: int, path: Path) -> bool:
    """Whether the system gives the lock; where its file system has none, whether the written holder is gone."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return False
        else:
            return True
    holder = _read(path)
    return holder is None or holder.state == atomic_files.ENDED


def _is_elsewhere(holder: Holder | None) -> bool:
    return holder is not None and holder.state == atomic_files.ELSEWHERE


def _sign(file: int) -> None:
    """Write down who holds the lock."""
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    metadata = {"pid": os.getpid(), "host": platform.node(), "since": since, "token": atomic_files.process_token()}
    with contextlib.suppress(OSError):  # The lock holds on a full disk, too.
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps(metadata).encode())


def _read(path: Path) -> Holder | None:
    """Who a lock file names; None where it names nobody yet."""
    try:
        with open(path, "rb") as file:
            metadata = json.loads(file.read(_LONGEST))
        return Holder(int(metadata["pid"]), *(str(metadata[name]) for name in ("host", "since", "token")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
