"""What the measures of a network return: a dictionary by layer name that also says what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ByLayer(dict[str, T]):
    """A measure by layer name, in the model's order.

    Attributes:
        skipped: the layers that are left out, and why.
        standard_error: with ``sketch``, by layer, root of the mean square of |M - exact M| to expect, a Frobenius norm
            in units of M; empty otherwise.
    """

    def __init__(
        self, values: Mapping[str, T], skipped: Mapping[str, str], standard_error: Mapping[str, float] | None = None
    ):
        super().__init__(values)
        self.skipped: dict[str, str] = dict(skipped)
        self.standard_error: dict[str, float] = dict(standard_error or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.skipped, self.standard_error)
