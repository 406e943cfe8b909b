"""``python -m bench``: measure, print a table, write a result file.

suite      every operation beside its peers at the paper's size (the default), in at most nine minutes on a GPU
agop       the AGOP on the CPU against xrfm and torch, with peak memory: the README's table
keops      KeOps against torch by number of features, on the CPU: what "auto" goes by
network    the AGOP of an MLP's layers against Jacobians by torch.func, on the CPU
cg         conjugate gradients with and without their preconditioner, on the CPU: minutes
report     table and plots from a result of `pytest bench --benchmark-only --benchmark-json`
readme     the committed results' tables into README.md
calibrate  rates and launch configurations of this device, for fastagop's own choices
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import agop_cpu, calibrate, cg_cpu, keops_cpu, network_cpu, report, suite

REPEATED = {"agop": agop_cpu, "keops": keops_cpu, "network": network_cpu}  # timed several times over
ONCE = {"cg": cg_cpu}  # minutes
CASES = ("suite", *REPEATED, *ONCE, "report", "readme", "calibrate")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", choices=CASES, default="suite")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--result", type=Path, default=Path("bench/results/operations_cpu.json"), help="for report")
    parser.add_argument("--out", type=Path, help="result file; default out/<case>_<device>.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n", type=int, help="rows; default 50000 on CUDA")
    parser.add_argument("--d", type=int, nargs="+", help="features; default 1024 3072 on CUDA")
    given = parser.parse_args()
    if given.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {given.repeats}")
    if given.case == "report" and not given.result.is_file():
        parser.error(f"--result {given.result}: there is no such file")
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    out = given.out or Path(f"out/{given.case}_{given.device.type}.json")
    if given.case == "suite":
        suite.main(given.device, out, given.repeats, given.n, tuple(given.d) if given.d else None)
    elif given.case == "report":
        report.main(given.result, given.out or given.result.with_suffix(".md"))
    elif given.case == "readme":
        report.readme()
    elif given.case == "calibrate":
        calibrate.main(given.device, out, given.repeats, given.n)
    elif given.case in ONCE:
        ONCE[given.case].main(out)
    else:
        REPEATED[given.case].main(out, given.repeats)


if __name__ == "__main__":
    main()
