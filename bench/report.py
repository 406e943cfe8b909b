"""From committed results: a table and two plots of ``pytest bench --benchmark-json``'s, and the README's tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

_HEAD = [
    "| | n | d | K | kernel | | seconds | times fastagop's | of the ceiling | peak memory | error |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]
_COLUMNS = ("op", "n", "d", "K", "kernel", "contender")


def rows(read: dict) -> list[dict]:
    """What was measured, from the file's contents: one dict a contender and case, in the order of the run."""
    return [{**b["extra_info"], "seconds": b["stats"]["median"]} for b in read["benchmarks"]]


def table(measured: list[dict]) -> str:
    """The rows as a Markdown table, each with its ratio to fastagop on the same case."""
    ours = {_case(row): row["seconds"] for row in measured if row["contender"] == "fastagop"}
    lines = list(_HEAD)
    for row in measured:
        ratio = row["seconds"] / ours[_case(row)] if _case(row) in ours else float("nan")
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f} MB"
        error = f"{row['error']:.0e}"
        facts = " | ".join(str(row[key]) for key in _COLUMNS)
        share = f"{100 * row['share of ceiling']:.0f}%"
        lines.append(f"| {facts} | {row['seconds']:.3g} | {ratio:.1f} | {share} | {peak} | {error} |")
    return "\n".join(lines)


def _case(row: dict) -> tuple:
    return tuple(row[key] for key in _COLUMNS[:-1])


def plots(measured: list[dict], folder: Path) -> list[Path]:
    """Time of the AGOP against n with the peers, and the roofline: rates under what products and copies allow."""
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

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names = list(dict.fromkeys(row["contender"] for row in measured))
    ops = list(dict.fromkeys(row["op"] for row in measured))
    product, copy = measured[0]["product ceiling GFLOP/s"], measured[0]["copy GB/s"]
    reach = [min(row["flop/byte"] for row in measured) / 2, max(row["flop/byte"] for row in measured) * 2]
    bend = product / copy
    axes.loglog([reach[0], bend, reach[1]], [reach[0] * copy, product, product], color="black", linewidth=1)
    axes.annotate(f"products {product:.0f} GFLOP/s", (reach[1], product), ha="right", va="bottom")
    axes.annotate(f"copy {copy:.0f} GB/s", (reach[0], reach[0] * copy), ha="left", va="bottom")
    for row in measured:
        colour, mark = f"C{names.index(row['contender'])}", "osD^vPX"[ops.index(row["op"])]
        axes.plot(row["flop/byte"], row["GFLOP/s"], mark, color=colour, markersize=5)
    for i, name in enumerate(names):
        axes.plot([], [], "o", color=f"C{i}", label=name)
    for i, op in enumerate(ops):
        axes.plot([], [], "osD^vPX"[i], color="grey", label=op)
    axes.set(xlabel="least operations per least byte", ylabel="least operations / time, GFLOP/s", title="Roofline")
    figure.legend(frameon=False, fontsize="x-small", loc="outside right upper")
    files.append(folder / "roofline.png")
    figure.savefig(files[1], dpi=130)
    plt.close("all")
    return files


def main(result: Path, out: Path) -> None:
    """Print the table and write it, with the plots, beside ``out``."""
    measured = rows(json.loads(result.read_text()))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table(measured) + "\n")
    print(table(measured))
    for file in plots(measured, out.parent):
        print(f"written to {file}")


def readme(path: Path = Path("README.md")) -> None:
    """Write the committed results' tables between the README's marks."""
    text = path.read_text()
    for case in ("agop", "network", "cg"):
        module = importlib.import_module(f"bench.{case}_cpu")
        made = module.table(json.loads(Path(f"bench/results/{case}_cpu.json").read_text())["rows"])
        before, rest = text.split(f"<!-- {case} -->\n")
        text = f"{before}<!-- {case} -->\n{made}\n<!-- /{case} -->{rest.split(f'<!-- /{case} -->')[1]}"
    path.write_text(text)
