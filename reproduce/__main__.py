"""``python -m reproduce figure1 | ... | figure12 | nfa_table | demo | theory``; see README.md beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from reproduce import deep_rfm_figures, demo, network_figures, nfa_table, options, theory


def parser() -> argparse.ArgumentParser:
    """The command line; each family of experiments brings its own options."""
    top = argparse.ArgumentParser(prog="python -m reproduce", description="Redo the paper's figures and theory.")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, figure in deep_rfm_figures.FIGURES.items():
        what = f"{figure.title}: {', '.join(dict.fromkeys(dataset for dataset, _ in figure.rows))}".replace("$", "")
        command = _add(commands, name, what, partial(deep_rfm_figures.figure, name))
        options.add_figure(command)
    for name, figure in network_figures.FIGURES.items():
        what = f"{figure.title}: {', '.join(dict.fromkeys(dataset for dataset, _ in figure.rows))}"
        options.add_network_figure(_add(commands, name, what, partial(network_figures.figure, name)))
    what = "NFA correlation and collapse at every Linear layer of a model of yours"
    nfa_table.add_options(_add(commands, "nfa_table", what, nfa_table.command))
    what = "collapse of scikit-learn's digits in 20 layers, in seconds and offline"
    demo.add_options(_add(commands, "demo", what, demo.demo))
    _add(commands, "theory", "proposition A.1 and theorems 4.3 and 4.4 against numbers", _theory)
    return top


def _add(commands, name: str, what: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=what, description=what, usage=f"python -m reproduce {name} [options]")
    added.set_defaults(command=command)
    return added


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0, or 2 with one line on stderr for what the caller can change."""
    args = parser().parse_args(argv)
    try:
        return args.command(args)
    except (FileNotFoundError, ImportError, MemoryError, ValueError, torch.OutOfMemoryError) as error:
        hint = " (here: --n)" if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else ""
        print(f"python -m reproduce: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes after the last finished layer or measurement", file=sys.stderr)
        return 130
    return 2


def _theory(_: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # matrices of 60 rows: threads cost more than they bring
    theory.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
