"""``python -m reproduce figure1 | ... | figure12 | all | report | draw | nfa_table | demo | theory``; see README.md.

From another folder: ``python PATH_OF_THE_CHECKOUT/reproduce figure1``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if not __package__:  # It is run by its path: modules come from the current folder and from the checkout.
    sys.path[:1] = ["", str(Path(__file__).resolve().parents[1])]
try:
    from fastagop import commands
except ModuleNotFoundError as missing:
    sys.exit(f"python -m reproduce: {missing}; pip install -e '.[reproduce]' in {Path(__file__).resolve().parents[1]}")

from reproduce import (
    deep_rfm_figures,
    demo,
    everything,
    figures,
    network_figures,
    nfa_table,
    redraw,
    report,
    theory,
)
from reproduce.pictures import PICTURES

FIGURES = deep_rfm_figures.FIGURES | network_figures.FIGURES
SHOWN = FIGURES | {name: picture.ABOUT for name, picture in PICTURES.items()}


def parser() -> argparse.ArgumentParser:
    """The command line; each family of experiments brings its own options."""
    top = argparse.ArgumentParser(prog="python -m reproduce", description="Redo the paper's figures and theory.")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, figure in FIGURES.items():
        figure.family.add_options(_add(commands, name, figure.description, partial(figures.make, name, figure)))
    text = "every figure and table, one after the other, and a page that shows them"
    everything.add_options(_add(commands, "all", text, partial(everything.command, parser, SHOWN)))
    for name, picture in PICTURES.items():
        picture.add_options(_add(commands, name, picture.ABOUT.help, picture.command))
    text = "a page of whatever results there are, beside what the paper says"
    report.add_options(_add(commands, "report", text, partial(report.command, SHOWN)))
    text = "the pictures of a folder once more, small, from its tables; nothing is computed"
    redraw.add_options(_add(commands, "draw", text, partial(redraw.command, FIGURES)))
    text = "NFA correlation and collapse at every layer of a model of yours"
    nfa_table.add_options(_add(commands, "nfa_table", text, nfa_table.command))
    text = "collapse of scikit-learn's digits in 20 layers, offline, in about half a minute"
    demo.add_options(_add(commands, "demo", text, demo.demo))
    _add(commands, "theory", "proposition A.1 and theorems 4.3 and 4.4 against numbers", _theory)
    return top


def _add(commands, name: str, text: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=text, description=text, usage=f"python -m reproduce {name} [options]")
    added.set_defaults(command=command)
    return added


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0, or 2 with one line on stderr for what the caller can change."""
    args = parser().parse_args(argv)

    def work() -> int:
        if hasattr(args, "out"):
            commands.prepare(args.out, "--out")
        return args.command(args)

    interrupted = "interrupted; the same command resumes after the last finished layer or measurement"
    return commands.run("python -m reproduce", work, interrupted)


def _theory(_: argparse.Namespace) -> int:
    with commands.threads(1):  # More cost more than they bring for matrices of 60 rows.
        theory.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
