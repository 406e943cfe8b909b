"""``python -m bench agop|cg|keops``: measure, print a table, write a result file."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import agop_cpu, cg_cpu, keops_cpu

REPEATED = {"agop": agop_cpu, "keops": keops_cpu}  # timed several times over
ONCE = {"cg": cg_cpu}  # minutes


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("case", choices=[*REPEATED, *ONCE])
    parser.add_argument("--out", type=Path, help="default out/CASE_cpu.json")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of a case that takes seconds")
    arguments = parser.parse_args()
    out = arguments.out or Path(f"out/{arguments.case}_cpu.json")
    if arguments.case in ONCE:
        ONCE[arguments.case].main(out)
    else:
        REPEATED[arguments.case].main(out, arguments.repeats)


if __name__ == "__main__":
    main()
