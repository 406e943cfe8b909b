"""How far a fit is: a bar where a terminal shows it, and a line in the log where there is none."""

from __future__ import annotations

import logging

from tqdm.auto import tqdm

from fastagop.kernels import checks

log = logging.getLogger("fastagop")


def check_verbose(value) -> None:
    """Refuse a ``verbose`` that is neither a flag nor a whole number."""
    if not isinstance(value, bool):
        checks.integer("verbose", value, 0)


class Progress:
    """A progress bar over ``total`` steps; quiet, or without a terminal, there is no bar. Steps are logged at INFO.

    Args:
        title: the name before the bar.
        unit: the name of a step.
        done: steps already made.
        quiet: show nothing.
    """

    def __init__(self, title: str, unit: str, total: int, *, done: int = 0, quiet: bool):
        self._title, self._unit, self._total, self._count, self._quiet = title, unit, total, done, quiet
        # With None, tqdm asks whether stderr is a terminal.
        self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, disable=True if quiet else None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised) -> None:
        self._bar.close()

    def step(self, **figures: str) -> None:
        """One more step is done; ``figures`` are shown beside the bar."""
        self._count += 1
        self._bar.update()
        if figures:
            self._bar.set_postfix(figures)
        if not self._quiet:
            shown = "".join(f", {name} {value}" for name, value in figures.items())
            log.info("%s: %s %d of %d%s", self._title, self._unit, self._count, self._total, shown)
