"""Where the benchmarks' results go: whole files, JSON that is what it should be, and Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastagop.kernels import atomic_files

from bench import machine
from fastagop import commands
from fastagop.estimators import tensor_files

ROOT = Path(__file__).resolve().parents[1]
_MOST = 2**28  # bytes of a result


def check(out: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if out.is_dir():
        raise ValueError(f"--out must be a file, but {out} is a folder")
    commands.prepare(out.parent, f"the folder of --out {out}")


def write(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, content.encode() if isinstance(content, str) else content)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result, with the machine that it was measured on."""
    write(path, json.dumps({"machine": machine.describe(), **result}, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """A result; ValueError naming the file where it holds no JSON."""
    if tensor_files.regular_size(path) > _MOST:
        raise ValueError(f"{path} is no result of a benchmark: it is too long")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON ({error})") from error


def markdown(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns are pairs of a heading (only spaces for none) and a format of a row's values.

    A row's peak_bytes can be formatted as peak, in MB.
    """
    lines = ["".join(f"| {heading} ".replace("  ", " ") for heading in map(str.strip, columns)) + "|"]
    lines.append("|---" * len(columns) + "|")
    for row in rows:
        peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.0f} MB"
        lines.append("| " + " | ".join(form.format(**row, peak=peak) for form in columns.values()) + " |")
    return "\n".join(lines)
