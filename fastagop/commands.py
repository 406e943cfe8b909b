"""What the command lines of a checkout share: one line on stderr for what the caller can change, and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_CALLERS = (OSError, ImportError, MemoryError, ValueError, torch.OutOfMemoryError)
INTERRUPTED, REFUSED, CUT_OFF = 130, 2, 1


def run(program: str, command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """The exit code of a command: its own (None is 0), 2 after an error of the caller, 130 after Ctrl-C.

    A reader of the output that goes away (``| head``) ends the command with 1 and without a word.
    """
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = CUT_OFF
    except KeyboardInterrupt:
        _say(interrupted)
        code = INTERRUPTED
    except _CALLERS as error:
        hint = " (here: --n)" if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else ""
        _say(f"{program}: {describe(error)}{hint}")
        code = REFUSED
    _end_output()
    return code


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch within, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count(text: str) -> int:
    """An option's integer >= 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def describe(error: Exception) -> str:
    """An error as one line; those of the system as the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return " ".join(f"{error.filename}: {error.strerror}".split()) if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def prepare(folder: Path, option: str) -> None:
    """Make a folder for results and write to it, so that nobody learns after hours that it cannot be.

    Raises:
        ValueError: the option's path is no folder. OSError: naming the folder that cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), folder)
        raise ValueError(f"{option} must be a folder, but {file} is a file") from error
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {option} must be a folder to write to", str(folder)) from error


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _end_output() -> None:
    """Where the output can take no more, the interpreter must not fail over it once again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
