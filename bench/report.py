"""From committed results: a table and two plots of ``pytest bench --benchmark-json``'s, and the README's tables."""

from __future__ import annotations

import importlib
import importlib.util
import numbers
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bench import drawing, files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("op", "n", "d", "K", "kernel", "contender")
_RATES = ("GFLOP/s", "share of ceiling", "flop/byte", "product ceiling GFLOP/s", "copy GB/s")
_NEEDED = (*_COLUMNS, *_RATES, "peak_bytes", "error")


def rows(read: dict) -> list[dict]:
    """What was measured, from the file's contents: one dict a contender and case, in the order of the run."""
    return [{**b["extra_info"], "seconds": b["stats"]["median"]} for b in read["benchmarks"]]


def rows_of(result: Path) -> list[dict]:
    """What was measured, from a file that may be another one; ValueError naming it then."""
    try:
        found = rows(files.read_json(result))
        if not found:
            raise ValueError("it holds no benchmark")
        if lacking := sorted({name for row in found for name in _NEEDED if name not in row}):
            raise ValueError(f"a benchmark lacks {', '.join(lacking)}")
        if wrong := next(filter(None, map(_wrong, found)), None):
            raise ValueError(f"a benchmark has {wrong}")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"KeyError {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"--result {result} is not what `pytest bench --benchmark-only --benchmark-json FILE` writes ({reason})"
        ) from error
    return found


def _wrong(row: dict) -> str | None:
    """What of a row is not what it should be: texts, numbers above 0, and others."""
    for name, value in row.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        positive = number and 0 < float(value) < float("inf")
        if name in ("op", "kernel", "contender"):
            right = isinstance(value, str)
        elif name in ("seconds", *_COLUMNS, *_RATES):
            right = positive
        else:
            right = name not in _NEEDED or number or (value is None and name == "peak_bytes")
        if not right:
            return f"the {name} {value!r}"
    return None


def table(measured: list[dict]) -> str:
    """The rows as a Markdown table, each with its ratio to fastagop on the same case."""
    ours = {_case(row): row["seconds"] for row in measured if row["contender"] == "fastagop"}
    columns = {"": "{op}", "n": "{n}", "d": "{d}", "K": "{K}", "kernel": "{kernel}", " ": "{contender}"}
    columns |= {"seconds": "{seconds:.3g}", "times fastagop's": "{ratio:.1f}", "of the ceiling": "{share:.0f}%"}
    columns |= {"peak memory": "{peak}", "error": "{error:.0e}"}
    made = [
        row | {"ratio": row["seconds"] / ours.get(_case(row), float("nan")), "share": 100 * row["share of ceiling"]}
        for row in measured
    ]
    return files.markdown(columns, made)


def _case(row: dict) -> tuple:
    return tuple(row[key] for key in _COLUMNS[:-1])


def plots(measured: list[dict], folder: Path) -> list[Path]:
    """Time of the AGOP against n with the peers, and the roofline: rates under what products and copies allow."""
    figure = drawing.new(5, 3.6)
    axes = figure.subplots()
    lines: dict[str, list] = {}
    for row in measured:
        if row["op"] == "agop" and (row["d"], row["K"]) == (784, 10):
            lines.setdefault(row["contender"], []).append((row["n"], row["seconds"]))
    drawing.by_n(axes, lines)
    axes.set_title("AGOP, d = 784, K = 10, Laplace")
    return [
        drawing.save(figure, folder / "agop_time.png"),
        drawing.save(_roofline(measured), folder / "roofline.png"),
    ]


def _roofline(measured: list[dict]) -> Figure:
    """A colour for each contender, a marker for each operation, and a legend for each of the two."""
    from matplotlib.lines import Line2D

    figure = drawing.new(7.5, 4.5)
    axes = figure.subplots()
    product, copy = measured[0]["product ceiling GFLOP/s"], measured[0]["copy GB/s"]
    reach = [min(row["flop/byte"] for row in measured) / 2, max(row["flop/byte"] for row in measured) * 2]
    bend = product / copy
    axes.loglog([reach[0], bend, reach[1]], [reach[0] * copy, product, product], color="black", linewidth=1)
    axes.annotate(f"products {product:.0f} GFLOP/s", (reach[1], product), ha="right", va="bottom")
    axes.annotate(f"copy {copy:.0f} GB/s", (bend, product / 1.5), xytext=(8, 0), textcoords="offset points", va="top")
    names = list(dict.fromkeys(row["contender"] for row in measured))
    marks = dict(zip(dict.fromkeys(row["op"] for row in measured), "osD^vPX", strict=False))
    for row in measured:
        color = drawing.style(row["contender"])[0]
        axes.plot(row["flop/byte"], row["GFLOP/s"], marks[row["op"]], color=color, markersize=6, alpha=0.85)
    patches = [Line2D([], [], color=drawing.style(name)[0], linewidth=6, label=name) for name in names]
    points = [Line2D([], [], color="0.4", marker=mark, linestyle="", label=op) for op, mark in marks.items()]
    for handles, title, place in ((patches, "contender", "upper"), (points, "operation", "lower")):
        options: dict = {"title": title, "loc": f"outside right {place}", "frameon": False, "fontsize": 8}
        figure.legend(handles=handles, alignment="left", **options)
    axes.set(xlabel="least operations per least byte", ylabel="least operations / time, GFLOP/s", title="Roofline")
    return figure


def main(result: Path, out: Path) -> None:
    """Print the table and write it, with the plots, beside ``out``."""
    measured = rows_of(result)
    files.check(out)
    files.write(out, table(measured) + "\n")
    print(table(measured))
    for file in plots(measured, out.parent):
        print(f"written to {file}")


def redraw(folder: Path = files.ROOT / "bench/results") -> None:
    """The pictures of the committed results once more; nothing is measured."""
    for file in plots(rows_of(folder / "operations_cpu.json"), folder):
        print(f"written to {file}")
    for result in sorted(folder.glob("*_cpu.json")):  # of a module of that name, where it has a picture
        name = f"bench.{result.stem}"
        if importlib.util.find_spec(name) and hasattr(module := importlib.import_module(name), "plot"):
            module.plot(files.read_json(result)["rows"], result.with_suffix(".png"))


def readme(path: Path = files.ROOT / "README.md") -> None:
    """Write the committed results' tables between the README's marks."""
    text = path.read_text()
    for case in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        result = files.ROOT / f"bench/results/{case}_cpu.json"
        try:
            made = importlib.import_module(f"bench.{case}_cpu").table(files.read_json(result)["rows"])
            before, rest = text.split(f"<!-- {case} -->\n")
            text = f"{before}<!-- {case} -->\n{made}\n<!-- /{case} -->{rest.split(f'<!-- /{case} -->')[1]}"
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} lacks the marks of {case}, or {result} its rows ({error})") from error
    files.write(path, text)
