"""What a page says beside a picture that is not one of the paper's figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """A title, what is to be seen and who has shown it, the command's help, and whether it reads a data set.

    It is of one data set at a time, and made at once, without runs that are resumed.
    """

    title: str
    shows: str
    help: str
    reads_data: bool = True
    has_runs: bool = False
