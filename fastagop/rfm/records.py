"""What a recursive feature machine tells of its fit: records, events, and directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastagop.estimators import files as storage
from fastagop.solvers.solution import Solution, size_of


@dataclass(frozen=True)
class IterationRecord:
    """What happened in one iteration.

    Attributes:
        solution: of the kernel regression whose AGOP was taken, alpha in float64.
        agop_scale: the number that the summed AGOP was divided by.
        seconds: wall-clock time.
        score: of that kernel regression on the validation rows; None where there are none.
    """

    solution: Solution
    agop_scale: float
    seconds: float
    score: float | None = None

    def __repr__(self) -> str:
        score = "" if self.score is None else f"score {self.score:.4g}, "
        return f"IterationRecord({score}agop_scale {self.agop_scale:.2g}, {self.seconds:.2g} s, {self.solution})"


def pack_record(record: IterationRecord) -> dict:
    """An iteration's record without its alpha, for a file's JSON."""
    solution = storage.pack_solution(record.solution)
    score = None if record.score is None else pack_score(record.score)
    return {"solution": solution, "agop_scale": record.agop_scale, "seconds": record.seconds, "score": score}


def unpack_record(metadata: dict, alpha: torch.Tensor) -> IterationRecord:
    """The record of ``pack_record`` with its alpha."""
    solution, score = storage.unpack_solution(metadata["solution"], alpha), metadata.get("score")
    return IterationRecord(**{**metadata, "solution": solution, "score": None if score is None else float(score)})


def pack_score(score: float) -> float | str:
    """A score for a file's JSON, which has no infinity; ``float`` reads it."""
    return score if math.isfinite(score) else str(score)


@dataclass(frozen=True)
class IterationEvent:
    """What callbacks see after each iteration; M is valid during the call only.

    Attributes:
        iteration: index from 0.
        iterations: how many there will be.
        record: the IterationRecord.
        M: the new metric (d, d) or (d,), of the features as the kernel sees them.
    """

    iteration: int
    iterations: int
    record: IterationRecord
    M: torch.Tensor

    def __repr__(self) -> str:
        return f"IterationEvent(iteration {self.iteration} of {self.iterations}, M {size_of(self.M)}, {self.record})"


Callback = Callable[[IterationEvent], None]


class Directions(NamedTuple):
    """The directions that a metric stretches most, in tensors or arrays as the fit was given.

    Attributes:
        vectors: unit vectors v (k, d); the learnt feature of a row x is x . v.
        values: eigenvalues of the metric (k,), largest first.
        correlations: of x . v with the target over the training rows, (k,); signs of vectors make them positive. Of
            several outputs the one that is correlated most counts.
    """

    vectors: Any
    values: Any
    correlations: Any
