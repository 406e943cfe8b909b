"""Tables from the lines of a first contact: a proposal for the launch table, a roofline, the README's table, a page.

``python -m bench gpu_report DIR`` writes report.md (all, as a fragment for a page), launch_config.md, roofline.md,
readme.md and, where matplotlib is there, roofline.png into DIR. Every table names chip, versions and date. What comes
from a dry run says DRY RUN in every heading, every table and the picture, and proposes nothing.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastagop.kernels import atomic_files

from bench import first_contact_lines
from bench.first_contact_lines import WHOLE
from fastagop import commands

Row = Mapping[str, Any]
GAIN = 1.03  # a configuration is proposed where it is that many times faster than the present one; less is noise
NONE = "nothing measured"


class Report:
    """The lines of one folder, the last one of every case."""

    def __init__(self, rows: Sequence[Row], folder: Path):
        self.about = first_contact_lines.origin_of(rows, folder)
        self.dry = bool(self.about["dry_run"])
        self.rows = list({(row["part"], row["case"]): row for row in rows if row["case"] != WHOLE}.values())
        self.dates = sorted({str(row["date"])[:10] for row in rows})

    @property
    def mark(self) -> str:
        """What every heading begins with."""
        return "DRY RUN, no GPU: " if self.dry else ""

    @property
    def stamp(self) -> str:
        """Chip, versions, date and sources in a sentence."""
        versions = ", ".join(f"{name} {version}" for name, version in self.about["versions"].items() if version)
        days = self.dates[0] if len(self.dates) == 1 else f"{self.dates[0]} to {self.dates[-1]}"
        said = f"{self.about['chip']}; {versions}; {days}; sources {self.about['sources']}."
        warning = " DRY RUN on the CPU at tiny sizes, Triton interpreted: no figure here says anything about a GPU."
        return said + (warning if self.dry else "")

    def part(self, name: str) -> list[Row]:
        """The lines of a part."""
        return [row for row in self.rows if row["part"] == name]

    def section(self, title: str, *texts: str) -> str:
        """A heading, the stamp and tables."""
        return "\n\n".join([f"## {self.mark}{title}", self.stamp, *texts])

    def table(self, columns: Mapping[str, Callable[[Row], str]], rows: Iterable[Row]) -> str:
        """Rows in Markdown, the first heading of a dry run saying so."""
        heads = list(columns)
        if self.dry:
            heads[0] = f"DRY RUN {heads[0]}".strip()
        made = [[make(row) for make in columns.values()] for row in rows]
        if not made:
            return f"{self.mark}{NONE}"
        lines = [heads, ["---"] * len(heads), *made]
        return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in lines)


# ---- formats of a row's values


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def seconds(row: Row) -> str:
    """Seconds, or why there are none."""
    if row["failure"]:
        return str(row["failure"])[:100]
    return "" if row["seconds"] is None else f"{row['seconds']:.4g}"


def error(row: Row) -> str:
    """The relative error."""
    value = row["error"]
    return "" if value is None else value if isinstance(value, str) else f"{value:.1e}"


def peak(row: Row) -> str:
    """Peak memory."""
    return "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f} GB"


def word(name: str, form: str = "{}") -> Callable[[Row], str]:
    """A fact by its name, empty where it is not there."""
    return lambda row: "" if row.get(name) is None else form.format(row[name])


def rate(row: Row) -> float | None:
    """Floating-point operations a second, or bytes of what only moves."""
    work = row.get("flop") or row.get("moved")
    return work / row["seconds"] if work and row["seconds"] else None


def _rate_words(row: Row) -> str:
    value = rate(row)
    return "" if value is None else f"{value / 1e12:.3g} {'TFLOP' if row.get('flop') else 'TB'}/s"


# ---- sections


def launch_table(report: Report) -> str:
    """The fastest configuration of every operation and products beside the present one."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in report.part("launches"):
        if row["seconds"] is not None and row.get("config"):
            found.setdefault((row["operation"], row["products"]), []).append(row)
    made, lines = [], []
    for (operation, products), rows in found.items():
        present = next((row for row in rows if row["present"]), None)
        best = min(rows, key=lambda row: row["seconds"])
        gain = None if present is None else present["seconds"] / best["seconds"]
        take = gain is not None and gain >= GAIN
        made.append({"of": f"{operation} {products}", "present": present, "best": best, "gain": gain, "take": take})
        if take and not report.dry:
            numbers = ", ".join(map(str, best["config"]))
            limit = f", registers={best['maxnreg']}" if best["maxnreg"] else ""
            lines.append(f'        ("{operation}", "{products}"): Config({numbers}{limit}),')
    columns: dict[str, Callable[[Row], str]] = {
        "operation": lambda row: row["of"],
        "present": lambda row: _config(row["present"]),
        "ms": lambda row: _milliseconds(row["present"]),
        "fastest": lambda row: _config(row["best"]),
        "ms, fastest": lambda row: _milliseconds(row["best"]),
        "gain": lambda row: "" if row["gain"] is None else f"{row['gain']:.2f}",
        "proposal": lambda row: "take it" if row["take"] and not report.dry else "keep",
    }
    failed = sum(row["failure"] is not None for row in report.part("launches"))
    note = f"Tile rows, columns, inner dimension, warps, stages, and a limit on registers where there is one. {failed} "
    note += "candidates could not run or computed something else."
    proposal = f"{report.mark}No entry is proposed."
    if lines:
        entries = "\n".join(lines)
        proposal = f"Entries for kernels/triton_backend/launch_config.py:\n\n```\n{entries}\n```"
    return report.section("Launch configurations", report.table(columns, made), note, proposal)


def _config(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return " ".join(map(str, row["config"])) + (f", maxnreg {row['maxnreg']}" if row.get("maxnreg") else "")


def _milliseconds(row: Row | None) -> str:
    return "" if row is None else f"{1e3 * row['seconds']:.4g}"


# The ceiling that an operation's products are taken of, and how many of them stand for one.
_CEILINGS = {
    "fp16x3": ("square product float16", 3),
    "bf16x3": ("square product bfloat16", 3),
    "tf32": ("square product tf32", 1),
    "tf32x3": ("square product tf32", 3),
    "fp64": ("square product float64", 1),
}


def roofline_rows(report: Report) -> list[dict[str, Any]]:
    """Everything with a known work: its rate and the ceiling that its kind of products has."""
    ceilings = {row["case"]: rate(row) for row in report.part("ceilings")}
    made = []
    for row in report.rows:
        value = rate(row)
        if value is None or row["part"] == "launches":
            continue
        ceiling, share = None, ""
        if row["part"] == "ceilings" and (row["case"] == "copy" or row["case"].startswith("square product")):
            pass  # it is a ceiling
        elif row.get("moved") and not row.get("flop"):
            ceiling = ceilings.get("copy")
        else:
            kind, products = _kind(row)
            known = ceilings.get(kind)
            ceiling = None if known is None else known / products
        if ceiling:
            share = f"{100 * value / ceiling:.0f} %"
        made.append({**row, "rate": value, "ceiling": ceiling, "share": share})
    return made


def _kind(row: Row) -> tuple[str, int]:
    """(the ceiling's case, products for one) of a row, from its words."""
    words = f"{row['case']} {row.get('backend', '')} {row.get('contender', '')}"
    if "float64" in words or "solve" in words:
        return _CEILINGS["fp64"]
    if "triton" in words:
        return _CEILINGS["bf16x3" if " high" in words and "highest" not in words else "fp16x3"]
    return "square product float16" if "fp16" in words else "square product float32", 1


def roofline(report: Report) -> str:
    """Rates beside what the device's own products and copies reach."""
    columns: dict[str, Callable[[Row], str]] = {
        "part": lambda row: row["part"],
        "case": lambda row: row["case"],
        "seconds": seconds,
        "rate": _rate_words,
        "of the ceiling": lambda row: row["share"],
        "error": error,
    }
    return report.section("Roofline", report.table(columns, roofline_rows(report)))


def picture(report: Report, path: Path) -> Path | None:
    """Rates as bars on their ceilings; None where matplotlib is not there or nothing was measured."""
    rows = [row for row in roofline_rows(report) if row["ceiling"] and row["part"] != "ceilings"][:40]
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        return None
    if not rows:
        return None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.22 * len(rows)), layout="constrained")
    names = [f"{row['part']}: {row['case']}" for row in rows]
    axes.barh(names, [100 * row["rate"] / row["ceiling"] for row in rows])
    axes.axvline(100, color="black", linewidth=1)
    axes.set(xlabel="% of the ceiling measured in the same run", title=f"{report.mark}{report.about['chip']}")
    axes.tick_params(labelsize=6)
    axes.invert_yaxis()
    if report.dry:
        figure.text(0.5, 0.5, "DRY RUN", fontsize=60, color="red", alpha=0.3, ha="center", va="center", rotation=30)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    atomic_files.write(path, content.getvalue())
    return path


def readme(report: Report) -> str:
    """The README's table: operations beside their peers at the largest n, and the Deep RFM."""
    peers = [row for row in report.part("peers") if row.get("operation")]
    largest = max((row["n"] for row in peers), default=0)
    some = [row for row in peers if row["n"] == largest]
    base = {row["operation"]: row["seconds"] for row in some if row["contender"] == "fastagop triton highest"}
    columns: dict[str, Callable[[Row], str]] = {
        f"n = {largest}": lambda row: row["operation"],
        "contender": lambda row: row["contender"],
        "seconds": seconds,
        "times the Triton backend's": lambda row: _times(row, base.get(row["operation"])),
        "peak memory": peak,
        "error": error,
    }
    whole = [row for row in report.part("deep_rfm") if row.get("depth") and row["seconds"] is not None]
    layers: dict[str, Callable[[Row], str]] = {
        "Deep RFM": lambda row: row["case"],
        "n": word("n"),
        "d": word("d"),
        "seconds": seconds,
        "residual of the readout": word("residual", "{:.1e}"),
    }
    return report.section("Measured on a GPU", report.table(columns, some), report.table(layers, whole))


def _times(row: Row, base: float | None) -> str:
    return "" if not base or row["seconds"] is None else f"{row['seconds'] / base:.2f}"


def layers(report: Report) -> str:
    """The Deep RFM by layer and stage."""
    rows = [row for row in report.part("deep_rfm") if row.get("stages")]
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    columns: dict[str, Callable[[Row], str]] = {"layer": lambda row: row["case"], "seconds": seconds}
    for stage in stages:
        columns[stage] = lambda row, stage=stage: f"{row['stages'].get(stage, 0.0):.3g}"
    columns |= {"solved by": word("method"), "steps": word("iterations"), "residual": word("residual", "{:.0e}")}
    columns |= {"NC1": word("nc1", "{:.1e}"), "peak": peak}
    return report.section("A Deep RFM by stage", report.table(columns, rows))


def others(report: Report) -> list[str]:
    """The parts that are told case by case."""
    titles = {"accuracy": "Accuracy", "blocks": "Rows of a block", "near": "Near pairs", "solve": "Solve by stage"}
    titles |= {"graph": "CUDA graphs", "compile": "torch.compile and export", "ranks": "Ranks", "tests": "Tests"}
    known = {*first_contact_lines.FIELDS, "n", "d", "K", "flop", "moved", "first"}
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "seconds": seconds,
        "rate": _rate_words,
        "error": error,
        "peak": peak,
        "more": lambda row: ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in known),
    }
    return [report.section(title, report.table(columns, report.part(part))) for part, title in titles.items()]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:60]


def write(folder: Path) -> list[Path]:
    """All tables of a folder's lines; what was written."""
    report = Report(first_contact_lines.read(folder), folder)
    made = {"launch_config.md": launch_table(report), "roofline.md": roofline(report), "readme.md": readme(report)}
    drawn = picture(report, folder / "roofline.png")
    shown = [f"![{report.mark}rates by share of the ceiling](roofline.png)"] if drawn else []
    whole = [made["readme.md"], layers(report), made["launch_config.md"], made["roofline.md"], *shown, *others(report)]
    made["report.md"] = "\n\n".join(whole)
    written = []
    for name, text in made.items():
        atomic_files.write(folder / name, (text + "\n").encode())
        written.append(folder / name)
    return [*written, *([drawn] if drawn else [])]


def command(argv: Sequence[str]) -> int:
    """Write the tables and say where they are."""
    made = argparse.ArgumentParser(prog="python -m bench gpu_report", description=__doc__)
    made.add_argument("folder", type=Path, metavar="DIR", help="that --out of first_contact named")
    folder = made.parse_args(argv).folder

    def run() -> None:
        for path in write(folder):
            print(f"written to {path}")

    return commands.run("python -m bench gpu_report", run)
