"""What users are told: the package's exception and warning, and where a warning points."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# A warning points at the first caller outside these packages: the library itself, and what calls it on a user's behalf.
_CARRIERS = frozenset({"fastagop", "torch", "sklearn", "joblib", "concurrent", "threading", "tqdm", "contextlib"})


class BackendUnavailable(RuntimeError):
    """A RuntimeError: the requested backend cannot serve a call; the message says why and what to install or change."""


class NumericalWarning(UserWarning):
    """A result is usable, but something had to be altered, or a residual is larger than the dtype promises.

    The message says what happened and what to do, mostly a ridge above 0. It is a UserWarning: the filters of Python's
    ``warnings`` module silence it or make it an error.
    """


def restated(error: Exception, text: str) -> Exception:
    """An error of the same kind with other words; of a plain kind where its class is not made of a text."""
    try:
        return type(error)(text)
    except Exception:
        plain = next(kind for kind in (MemoryError, TypeError, ValueError, Exception) if isinstance(error, kind))
        return plain(text)


def warn(message: str, category: type[Warning] = NumericalWarning) -> None:
    """Warn at the line of the user's own code that led here, however many calls of the library lie between.

    Where there is no such line (a method handed to a thread pool), the nearest caller outside the library is named.
    """
    level, nearest = 1, None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _CARRIERS:
            break
        if nearest is None and package not in ("fastagop", "torch"):
            nearest = level
        frame, level = frame.f_back, level + 1
    else:
        level = nearest or 1
    warnings.warn(message, category, stacklevel=level + 1)
