"""Memory of the host that a process may still take: what is free, and what its control groups allow."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

_GROUPS, _MOUNT, _FREE = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/meminfo")
_UNKNOWN = 4 * 2**30  # bytes to go by where the system does not say


_FRESH = 0.05  # seconds that a reading is good for: it takes longer than a small call, and so does filling memory
_LATELY, _MANY_TIMES = 1.0, 32  # seconds; of free memory so small a part may be taken without another look
_last: tuple[float, tuple, int] = (-math.inf, (), 0)


def host_bytes() -> int:
    """The smaller of free memory and of what containers and job schedulers leave to this process."""
    global _last  # noqa: PLW0603 (one reading for the whole process)
    now, places = time.monotonic(), (_GROUPS, _MOUNT, _FREE)
    known = _last  # another thread may replace it meanwhile
    if now - known[0] > _FRESH or places != known[1]:
        _last = known = now, places, int(min(_free_bytes(), group_bytes()))
    return known[2]


def plenty(needed: int) -> bool:
    """Whether so many bytes are a small part of what was free at the last reading, which was made lately."""
    taken, places, free = _last
    lately = places == (_GROUPS, _MOUNT, _FREE) and time.monotonic() - taken < _LATELY
    return lately and _MANY_TIMES * needed <= free


def forget() -> None:
    """Let the next reading be a new one, since memory has just been given back."""
    global _last  # noqa: PLW0603 (see ``host_bytes``)
    _last = (-math.inf, (), 0)


def _free_bytes() -> int:
    try:
        for line in _FREE.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        found = 0
    return found if found > 0 else _UNKNOWN


def group_bytes() -> float:
    """What the process's control groups leave, those above it included; infinite where none has a limit."""
    try:
        lines = [line.split(":", 2) for line in _GROUPS.read_text().splitlines()]
    except (OSError, ValueError):  # no Linux
        return math.inf
    left = math.inf
    for parts in lines:
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if not controllers:
            base, names = _MOUNT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = _MOUNT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.strip("/")  # in a container often the host's path, which is not mounted
        for group in (folder, *folder.parents):
            if group == base or base in group.parents:
                left = min(left, _left_in(group, *names))
    return left


def _left_in(group: Path, limit: str, used: str, cache: str) -> float:
    """One group's limit less what it holds; file pages that the system drops on demand do not count."""
    try:
        allowed, held = int((group / limit).read_text()), int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not visible here, or "max"
        return math.inf
    return max(0, allowed - held + int(stat.get(cache, 0)))
