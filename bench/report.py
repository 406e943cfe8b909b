"""From a committed result of ``pytest bench --benchmark-only --benchmark-json``: the README's table and two plots."""

from __future__ import annotations

import json
from pathlib import Path

_HEAD = [
    "| | n | d | K | kernel | | seconds | times fastagop's | of the ceiling | peak memory | error |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]
_COLUMNS = ("op", "n", "d", "K", "kernel", "contender")


def rows(result: Path) -> list[dict]:
    """What was measured, one dict a contender and case, in the order of the run."""
    read = json.loads(result.read_text())
    return [{**b["extra_info"], "seconds": b["stats"]["median"]} for b in read["benchmarks"]]


def table(measured: list[dict]) -> str:
    """The rows as a Markdown table, each with its ratio to fastagop on the same case."""
    ours = {_case(row): row["seconds"] for row in measured if row["contender"] == "fastagop"}
    lines = list(_HEAD)
    for row in measured:
        ratio = row["seconds"] / ours[_case(row)] if _case(row) in ours else float("nan")
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f} MB"
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        facts = " | ".join(str(row[key]) for key in _COLUMNS)
        share = f"{100 * row['share of ceiling']:.0f}%"
        lines.append(f"| {facts} | {row['seconds']:.3g} | {ratio:.1f} | {share} | {peak} | {error} |")
    return "\n".join(lines)


def _case(row: dict) -> tuple:
    return tuple(row[key] for key in _COLUMNS[:-1])


def plots(measured: list[dict], folder: Path) -> list[Path]:
    """Time of the AGOP against n with the peers, and the share of the ceiling that each operation reaches."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    growing = [row for row in measured if row["op"] == "agop" and (row["d"], row["K"]) == (784, 10)]
    for name in dict.fromkeys(row["contender"] for row in growing):
        points = sorted((row["n"], row["seconds"]) for row in growing if row["contender"] == name)
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="n", ylabel="seconds", title="AGOP, d = 784, K = 10, Laplace")
    axes.legend(frameon=False)
    files = [folder / "agop_time.png"]
    figure.savefig(files[0], dpi=130)

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    largest = {(row["op"], row["contender"]): row for row in sorted(measured, key=lambda row: row["n"] * row["d"])}
    names = list(dict.fromkeys(name for _, name in largest))
    ops = list(dict.fromkeys(op for op, _ in largest))
    for i, name in enumerate(names):
        own = {op: row["share of ceiling"] for (op, who), row in largest.items() if who == name}
        at = [ops.index(op) + 0.8 * i / len(names) for op in own]
        axes.bar(at, [100 * share for share in own.values()], width=0.8 / len(names), label=name)
    axes.set_xticks([k + 0.3 for k in range(len(ops))], ops)
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.set(
        ylabel="% of the measured product ceiling", title="least operations / time, over the ceiling; largest case"
    )
    axes.legend(frameon=False, fontsize="small")
    files.append(folder / "roofline.png")
    figure.savefig(files[1], dpi=130)
    plt.close("all")
    return files


def main(result: Path, out: Path) -> None:
    """Print the table and write it, with the plots, beside ``out``."""
    measured = rows(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table(measured) + "\n")
    print(table(measured))
    for file in plots(measured, out.parent):
        print(f"written to {file}")
