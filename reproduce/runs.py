"""One run of any family: settings in, a folder of results out; resumed where it stopped, reused once complete.

A run folder holds settings.json, the files of the family's procedure, a checkpoint until the run is complete and,
written last, record.json: a folder that has it is complete.
"""

from __future__ import annotations

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastagop import locks
from reproduce import files
from reproduce.settings import Experiment, RunLocation


@dataclass(frozen=True)
class Run:
    """A complete run; ``record`` is its record.json."""

    folder: Path
    settings: Any  # This is an Experiment; each family reads the fields of its own subclass.
    record: dict[str, Any]

    @property
    def relative_folder(self) -> str:
        """The folder as result files name it: below --out, wherever that lies."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The measured layers, as in the run's table of layers."""
        return self.record["layers"]


class Procedure(ABC):
    """How a family of experiments computes a run, and how it prints one."""

    parts: ClassVar[tuple[str, ...]]  # These keys of a record are read by figures.
    checkpoint: ClassVar[str]  # This file or folder of the run is removed once the run is complete.
    prints_table: ClassVar[bool]  # Whether ``compute`` prints the table line by line, so that ``run`` need not.

    @abstractmethod
    def compute(self, settings: Any, location: RunLocation, folder: Path) -> dict[str, Any]:
        """The run's record without settings and environment, computed or resumed."""

    @abstractmethod
    def table(self, rows: list[dict[str, Any]]) -> str:
        """The layers as lines below a header."""

    @abstractmethod
    def summary(self, record: dict[str, Any]) -> str:
        """What is printed below the table."""


def run(procedure: Procedure, settings: Experiment, location: RunLocation) -> Run:
    """Compute, resume or reuse a run, and print its table and summary."""
    folder = location.folder(settings)
    print(f"\n{settings}\n{folder}")
    with exclusive(folder):
        reused = is_complete(folder)
        if reused:
            print("complete, nothing to compute")
            if location.keep_checkpoint and not (folder / procedure.checkpoint).exists():
                print("its trained layers were not kept; remove the folder to compute them again")
            record = files.read_record(folder / "record.json", settings.recorded, procedure.parts)
        else:
            record = _compute(procedure, settings, location, folder)
    if reused or not procedure.prints_table:
        print(procedure.table(record["layers"]))
    print(procedure.summary(record))
    return Run(folder, settings, record)


def _compute(procedure: Procedure, settings: Experiment, location: RunLocation, folder: Path) -> dict[str, Any]:
    """Compute the record and write it; the checkpoint is removed only after that."""
    record = {"settings": settings.recorded, "environment": files.environment(location.torch_device)}
    files.write_json(folder / "settings.json", record)
    record |= procedure.compute(settings, location, folder)
    files.write_record(folder / "record.json", record)
    if not location.keep_checkpoint:
        checkpoint = folder / procedure.checkpoint
        shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    return record


def is_complete(folder: Path) -> bool:
    """Whether a run's folder holds the record that is written last."""
    return (folder / "record.json").exists()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep a second process from the same run; the system drops the lock with its holder.

    Raises:
        fastagop.locks.FolderInUse: the process that computes the run is stopped.
    """
    with locks.waiting(folder, lambda line: print(line, flush=True)):
        yield
