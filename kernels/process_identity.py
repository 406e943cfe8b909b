"""Who a process is, so that what it left behind can be told from what it still uses."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

RUNNING, STOPPED, ENDED, ELSEWHERE = "running", "stopped", "ended", "elsewhere"


def token() -> str:
    """This process as "place-pid-start": the numbers of a pid come back after a restart, its start does not."""
    pid = os.getpid()
    return f"{_place()}-{pid}-{_start(pid) or 0}"


def state(text: str) -> str:
    """What became of the process of a token: RUNNING, STOPPED, ENDED, or ELSEWHERE where this host cannot tell."""
    try:
        place, pid, start = text.split("-")
        number, begun = int(pid), int(start)
    except ValueError:
        return ELSEWHERE
    if place != _place() or number < 1:
        return ELSEWHERE
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return ENDED
    except OSError:  # another user's process, so there is one
        pass
    except OverflowError:  # no pid of this system
        return ENDED
    if begun and (_start(number) or begun) != begun:
        return ENDED
    return {"Z": ENDED, "X": ENDED, "T": STOPPED, "t": STOPPED}.get(_status(number, 0), RUNNING)


def _place() -> str:
    """A short hash of host, boot and pid namespace: where a pid means the same process."""
    said = [platform.node()]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            said.append(read())
        except OSError:
            said.append("")
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:8]


def _start(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None where the system does not say."""
    found = _status(pid, 19)
    return int(found) if found.isdigit() else None


def _status(pid: int, index: int) -> str:
    """A field of /proc/PID/stat, counted from the state, which follows the name in brackets; empty where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[index]
    except (OSError, IndexError):
        return ""
