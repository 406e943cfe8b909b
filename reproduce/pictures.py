"""Pictures that are none of the paper's figures, each a module; a new one is a module and its name here.

Such a module has ``NAME``, of its command and its files; ``ABOUT``; ``add_options(parser)``; ``command(args)``, which
writes NAME.png, .csv and .json with "runs" and "lessons"; and, where the table holds what the picture shows,
``drawing(settings, lines)``, by which ``draw`` makes it once more.
"""

from __future__ import annotations

import argparse
from typing import Any, Protocol

from reproduce import conv_rfm, eigenvectors, grokking
from reproduce.about import About


class Picture(Protocol):
    """What every such module has."""

    NAME: str
    ABOUT: About

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Options of the command."""
        ...

    def command(self, args: argparse.Namespace) -> int:
        """Compute, draw, write, and say what to see."""
        ...


_MODULES: tuple[Any, ...] = (conv_rfm, grokking, eigenvectors)
PICTURES: dict[str, Picture] = {module.NAME: module for module in _MODULES}
