"""``all``: every figure, the NFA table and the theory, one after the other, and a page that shows them.

What lacks its data is passed over and named, and what fails is named, too; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fastagop import commands
from reproduce import files, options, report
from reproduce.report import TEXTS
from reproduce.settings import DATASETS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--quick", action="store_true", help="few points, layers and epochs: minutes on two CPU cores")
    text = f"{DATASETS}; repeat for several, of which pictures of one data set show the first; default: each its own"
    parser.add_argument("--dataset", action="append", default=[], help=text)
    options.add_location(parser, "out")


def command(parser: Callable[[], argparse.ArgumentParser], shown: Mapping[str, report.Shown], args: argparse.Namespace):
    """Make everything, write the page, and say what is not on it and why: 0, or 1 where something failed."""
    absent, failed = [], []
    for name in (*TEXTS, *shown):
        print(f"\n==== {name}", flush=True)
        given = [] if name in TEXTS else _forwarded(args, shown[name])
        ready = parser().parse_args([name, *given])
        try:
            _write_text(name, ready, args.out) if name in TEXTS else ready.command(ready)
        except (FileNotFoundError, ImportError) as error:
            absent.append(f"{name}: {commands.describe(error)}")
        except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            failed.append(f"{name} failed: {commands.describe(error)}")
    page = report.write(args.out, shown)
    print("\n".join(["", *absent, *failed, f"wrote {page}: all figures beside what the paper says of them"]))
    return 1 if failed else 0


def _forwarded(args: argparse.Namespace, picture: report.Shown) -> list[str]:
    """The options of a picture: those that say where data are for one that reads any, what to keep for one of runs."""
    given = ["--out", str(args.out)] + (["--quick"] if args.quick else [])
    if not picture.reads_data:
        return given
    datasets = args.dataset if picture.has_runs else args.dataset[:1]
    given += ["--device", args.device, *(word for dataset in datasets for word in ("--dataset", dataset))]
    given += ["--data-root", args.data_root] if args.data_root else []
    return given + ["--download"] * args.download + ["--keep-checkpoint"] * (args.keep_checkpoint and picture.has_runs)


def _write_text(name: str, args: argparse.Namespace, out: Path) -> None:
    """Run a command that prints, show what it printed and keep it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        args.command(args)
    print(printed.getvalue(), end="")
    files.write(out / f"{name}.txt", printed.getvalue())
