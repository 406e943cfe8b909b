"""What a page says beside a picture that is not one of the paper's figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """A title, and what is to be seen and who has shown it."""

    title: str
    shows: str
