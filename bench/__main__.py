"""``python -m bench agop``: measure, print a table, write a result file."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import agop_cpu


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("case", choices=["agop"])
    parser.add_argument("--out", type=Path, default=Path("out/agop_cpu.json"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    agop_cpu.main(arguments.out, arguments.repeats)


if __name__ == "__main__":
    main()
