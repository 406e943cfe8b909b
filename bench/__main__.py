"""``python -m bench agop | network``: measure, print a table, write a result file."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import agop_cpu, network_cpu

CASES = {"agop": agop_cpu, "network": network_cpu}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--out", type=Path, help="default out/<case>_cpu.json")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    CASES[arguments.case].main(arguments.out or Path(f"out/{arguments.case}_cpu.json"), arguments.repeats)


if __name__ == "__main__":
    main()
