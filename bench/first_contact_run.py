"""How a part of a first contact measures: its device and sizes, its time, and what becomes of a failure.

Everything that belongs to a case happens inside its try: setting up, the calls that are timed, the truth and the
comparison. A case that leaves the device unusable ends the process, whose successor skips it and goes on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import clock, costs, first_contact_lines, problems

LONG = 5.0  # seconds from which one call of a case is enough


class OutOfTime(Exception):
    """The part's share is over; what is missing is left to the next call."""


class Unusable(Exception):
    """The device answers nothing any more, in this process."""


@dataclass(frozen=True)
class Sizes:
    """Rows, features and outputs of the problems, and layers of the Deep RFM."""

    n: int
    d: int
    K: int
    depth: int


DRY_SIZES = Sizes(32, 24, 2, 2)  # a tile of the interpreter


def sizes(dry: bool) -> Sizes:
    """The paper's size, fewer rows where a float64 matrix would take over a third of the device."""
    if dry:
        return DRY_SIZES
    memory = torch.cuda.get_device_properties(0).total_memory
    rows = int((memory / 3 / 8) ** 0.5)
    return Sizes(50_000 if rows >= 50_000 else rows // 1024 * 1024, 1024, 10, 20)


@dataclass
class Run:
    """One part at work.

    Attributes:
        part: its name.
        folder: of the lines.
        about: the origin of every line.
        sizes: of the problems.
        dry: on the CPU, at sizes that say nothing.
        stop: time.monotonic() at which no further case starts.
    """

    part: str
    folder: Path
    about: Mapping[str, Any]
    sizes: Sizes
    dry: bool
    stop: float
    done: set[tuple[str, str]] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where problems lie."""
        return torch.device("cpu" if self.dry else "cuda")

    def few(self, full: int, tiny: int) -> int:
        """A number of a full run, or of a dry one."""
        return tiny if self.dry else full

    def problem(self, n: int | None = None, d: int | None = None, K: int | None = None) -> problems.Problem:
        """Unit rows around ten class centres and random coefficients."""
        s = self.sizes
        return problems.draw(n or s.n, d or s.d, K or s.K, device=self.device)

    def wanted(self, case: str) -> bool:
        """Whether a case is still to be measured; OutOfTime where its turn comes too late."""
        if (self.part, case) in self.done:
            return False
        if time.monotonic() > self.stop:
            raise OutOfTime
        (self.folder / first_contact_lines.UNDER_WAY).write_text(case)
        return True

    def write(self, case: str, **found: Any) -> None:
        """A line, and a word on the terminal."""
        row = first_contact_lines.line(self.about, self.part, case, **found)
        first_contact_lines.append(self.folder, row)
        self.done.add((self.part, case))
        print(f"{self.part:14} {case:58.58} {_words(row)}", flush=True)

    def record(self, case: str, measure: Callable[[], Mapping[str, Any]], **facts: Any) -> None:
        """A line of what ``measure`` finds, or of why it fails."""
        if not self.wanted(case):
            return
        try:
            found = dict(measure())
        except Exception as failure:  # whatever ends a case is a line, not the end
            words = str(failure).splitlines()
            found = {"failure": f"{type(failure).__name__}: {words[0][:300] if words else ''}"}
            del failure
        self.write(case, **{**facts, **found})
        self.look_after_the_device()

    def measure(
        self,
        case: str,
        prepare: Callable[[], Callable[[], Any]],
        error: Callable[[Any], float] | None = None,
        repeats: int = 3,
        **facts: Any,
    ) -> None:
        """Seconds of a call after one that warms up, and its peak memory.

        Args:
            case: names it in its part.
            prepare: makes the call.
            error: of the call's result, relative to float64.
            repeats: calls, of which the median counts; a long one is made once.
            facts: more for the line, such as flop.
        """

        def found() -> dict[str, Any]:
            call = prepare()
            if self.dry:  # its seconds say nothing
                results: list[Any] = []
                took = self.seconds(lambda: results.append(call()))
                return {"seconds": took, "first": took, "error": None if error is None else error(results[0])}
            first: list[float] = []
            peak = clock.peak_bytes(lambda: first.append(self.seconds(call)), self.device)
            again = clock.seconds(call, self.device, 1 if first[0] > LONG else repeats, warm=0)
            wrong = None if error is None else error(call())
            return {"seconds": again, "first": first[0], "bytes": peak, "error": wrong}

        self.record(case, found, **facts)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call."""
        return clock.seconds(call, self.device, 1, warm=0)

    def look_after_the_device(self) -> None:
        """Give memory back; Unusable where not even that works."""
        if self.device.type != "cuda":
            return
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as lost:
            raise Unusable(str(lost).splitlines()[0]) from lost


def relative(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error; NaN where the result holds one."""
    return costs.relative(result.double() - truth, truth)


def _words(row: Mapping[str, Any]) -> str:
    if row["failure"]:
        return row["failure"][:100]
    seconds = "" if row["seconds"] is None else f"{row['seconds']:10.4g} s"
    error = "" if row["error"] is None else f"  error {float(row['error']):.1e}"
    rate = f"  {row['flop'] / row['seconds'] / 1e12:.3g} TFLOP/s" if row.get("flop") and row["seconds"] else ""
    return seconds + rate + error
