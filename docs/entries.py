"""A griffe extension: docstrings name several arguments on one line, the reference gives each an entry of its own."""

from __future__ import annotations

import re

import griffe

_NEXT = re.compile(r"(?<=\.) (?=\w+(?:, \w+)*: \S)")  # "... (n, d). alpha: ..." in the indented text of a section


class OneEntryEach(griffe.Extension):
    """Start a new line where a sentence of a section ends and the next entry's name follows."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Rewrite the docstring's sections before they are parsed."""
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(map(_split, obj.docstring.value.split("\n")))


def _split(line: str) -> str:
    entry = re.match(r" {4,8}(?=\S)", line)
    return line if entry is None else _NEXT.sub("\n    ", line)
