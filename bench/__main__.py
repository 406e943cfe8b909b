"""``python -m bench CASE``: measure, print a table, write a result file. A case is an entry of a table below.

From another folder: ``python PATH_OF_THE_CHECKOUT/bench agop``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: modules come from the folder one is in and from the checkout
    sys.path[:1] = ["", str(Path(__file__).resolve().parents[1])]
try:
    from bench import checkout

    checkout.place()
    import torch

    from fastagop import commands
except ModuleNotFoundError as missing:
    sys.exit(f"python -m bench: {missing}; pip install -e '.[bench]' in {Path(__file__).resolve().parents[1]}")

if __name__ == "__main__" and sys.argv[1:2] and sys.argv[1] in checkout.ALONE:
    sys.exit(importlib.import_module(f"bench.{sys.argv[1]}").command(sys.argv[2:]))

from bench import (
    agop_cpu,
    beyond_cpu,
    calibrate,
    cg_cpu,
    coefficients_cpu,
    collapse_cpu,
    files,
    keops_cpu,
    machine_code,
    network_cpu,
    report,
    rfm_cpu,
    rows_cpu,
    scale_cpu,
    small_cpu,
    suite,
    tables_contenders,
    tables_cpu,
)


class Case(NamedTuple):
    """A case: its function, whose arguments are the options that it takes, and what the help says of it."""

    main: Callable[..., Any]
    about: str
    writes: str = ""  # This is where it does not write the file that --out names.

    @property
    def options(self) -> tuple[str, ...]:
        """Its options beside --out."""
        return tuple(name for name in inspect.signature(self.main).parameters if name in OF_CASES)


OF_CASES = ("device", "result", "repeats", "n", "d", "threads", "only", "quick")
# These measure, and write their result file. Those without a device measure the CPU.
MEASURES = {
    "suite": Case(
        suite.main,
        "every operation beside its peers at the paper's size (the default), in at most nine minutes on a GPU",
    ),
    "agop": Case(agop_cpu.main, "the AGOP on the CPU against xrfm and torch, with peak memory: the README's table"),
    "keops": Case(keops_cpu.main, "KeOps against torch by number of features, on the CPU"),
    "network": Case(network_cpu.main, "the AGOP of an MLP's layers against Jacobians by torch.func, on the CPU"),
    "beyond": Case(
        beyond_cpu.main, "l1 kernels, convolutions and networks of many outputs beside their peers, on the CPU"
    ),
    "cg": Case(cg_cpu.main, "conjugate gradients with and without their preconditioner, on the CPU: minutes"),
    "collapse": Case(
        collapse_cpu.main, "AGOP and kernel matrix of collapsed classes beside xrfm and torch, on the CPU"
    ),
    "coefficients": Case(
        coefficients_cpu.main,
        "the AGOP of coefficients that float32 does not hold, by the dtype of its products, on the CPU",
    ),
    "small": Case(
        small_cpu.main, "calls on 60 points beside plain torch, on the CPU: what a call costs before it computes"
    ),
    "scale": Case(
        scale_cpu.main,
        "seconds and peak memory of a solve, an AGOP and a layer by n, beside LAPACK and xrfm, on the CPU: minutes",
    ),
    "tables": Case(
        tables_cpu.main, "learners of 14 small tables beside each other by cross-validation, on the CPU: minutes"
    ),
    "rfm": Case(rfm_cpu.main, "whole RFMs at equal settings against xrfm's and the authors' update, on the CPU"),
    "rows": Case(rows_cpu.main, "learners of 10,000 and 100,000 rows, a tree of RFMs among them, on the CPU: minutes"),
    "calibrate": Case(calibrate.main, "rates and launch configurations of this device, for fastagop's own choices"),
}
# These measure nothing here.
OTHERS = {
    "report": Case(report.main, "table and plots from a result of `pytest bench --benchmark-only --benchmark-json`"),
    "draw": Case(
        report.redraw, "the pictures of the committed results once more; nothing is measured", "bench/results/*.png"
    ),
    "readme": Case(report.readme, "the committed results' tables into README.md", "README.md"),
    "machine_code": Case(
        machine_code.main,
        "every Triton launch compiled, without a GPU, into the table of docs/pages/gpu.md: minutes",
        "docs/pages/gpu.md",
    ),
}
OPTIONS = {name: case.options for name, case in {**MEASURES, **OTHERS}.items()}
CASES = (*OPTIONS, *checkout.ALONE)
_NAMES = ", ".join(tables_contenders.CONTENDERS)
RESULT = files.ROOT / "bench/results/operations_cpu.json"


def parser() -> argparse.ArgumentParser:
    """The command line; what is not given is None, so that a case can refuse what it would ignore."""
    made = argparse.ArgumentParser(
        prog="python -m bench", description=_described(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("case", nargs="?", choices=CASES, default="suite")
    add("--device", type=_device, help="cpu (default) or cuda; suite and calibrate")
    add("--result", type=Path, help="for report; default bench/results/operations_cpu.json")
    add("--out", type=Path, help="result file; default out/<case>_<device>.json")
    add("--repeats", type=_count, help=f"how often each contender is timed; default 3; {_taking('repeats')}")
    add(
        "--n",
        type=_count,
        help=f"points, in place of the case's own numbers; suite: default 50000 on CUDA; {_taking('n')}",
    )
    add("--d", type=_count, nargs="+", help="features; suite: default 1024 3072 on CUDA; agop, keops, scale")
    add("--threads", type=_count, help="tables; default all")
    add("--only", nargs="+", choices=tables_contenders.CONTENDERS, metavar="NAME", help=f"tables; of {_NAMES}")
    add("--quick", action="store_const", const=True, help="tables: three tables, two folds, no plot")
    return made


def _taking(option: str) -> str:
    """The cases that take an option, in words."""
    return f"of {', '.join(name for name, options in OPTIONS.items() if option in options)}"


def _described() -> str:
    about = {name: case.about for name, case in {**MEASURES, **OTHERS}.items()} | checkout.ALONE
    lines = [f"{name:{max(map(len, about))}}  {text}" for name, text in about.items()]
    return "\n".join(["Measure, print a table, write a result file.", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run: 0, or 2 with one line on stderr for what the caller can change."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in checkout.ALONE:
        return importlib.import_module(f"bench.{words[0]}").command(words[1:])
    made = parser()
    given = made.parse_args(words)
    takes = OPTIONS[given.case]
    for option in OF_CASES:
        value = getattr(given, option)
        says_nothing = option == "device" and given.case in MEASURES and value == torch.device("cpu")
        if value is not None and option not in takes and not says_nothing:
            known = ", ".join(f"--{name}" for name in takes) or "no option but --help"
            made.error(f"{given.case} does not take --{option}; it takes {known}")
    if given.case in OTHERS and given.out is not None and (writes := OTHERS[given.case].writes):
        made.error(f"{given.case} does not take --out; it writes {writes}")
    return commands.run("python -m bench", lambda: _run(given))


def _run(given: argparse.Namespace) -> None:
    device, repeats = given.device or torch.device("cpu"), given.repeats or 3
    if given.case == "report":
        result = given.result or RESULT
        report.main(result, given.out or result.with_suffix(".md"))
        return
    if given.case in OTHERS:
        OTHERS[given.case].main()
        return
    out = given.out or Path(f"out/{given.case}_{device.type}.json")
    files.check(out)
    options = vars(given) | {"device": device, "repeats": repeats}
    MEASURES[given.case].main(out=out, **{name: options[name] for name in OPTIONS[given.case]})


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("the benchmarks run on cpu and cuda")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return device


if __name__ == "__main__":
    sys.exit(main())
