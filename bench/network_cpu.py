"""AGOP of all hidden layers of an MLP on the CPU against Jacobians by torch.func: time and peak memory of each."""

from __future__ import annotations

from pathlib import Path

from bench import contenders, costs, files, harness, peers, problems

N = 2000
CONTENDERS = {
    **contenders.OPERATIONS["network_agop"],
    "vmap(jacrev), chunks of 256": lambda p: peers.jacobians(p, 256),
}
problem = problems.network


def measure(repeats: int, n: int = N) -> list[dict]:
    """One row per contender; the difference is that to the Jacobians in the same dtype."""
    drawn = problem(n)
    plain = peers.jacobians(drawn)
    rows = harness.Harness(repeats=repeats).rows(
        CONTENDERS, drawn, lambda _, found: costs.largest_difference(found, plain)
    )
    facts = {"n": n, "width": problems.WIDTHS[-1], "K": problems.OUTPUTS, "layers": len(problems.LAYERS)}
    for row in rows:
        row["difference"] = row.pop("error")
        row["peak_bytes"] = harness.alone("network_cpu", row["contender"], n)["peak_bytes"]
    return [facts | row for row in rows]


def main(out: Path, repeats: int, n: int | None = None) -> None:
    """Measure, print the table, write the result file."""
    rows = measure(repeats, n or N)
    files.write_result(out, {"repeats": repeats, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {f"five layers, n = {rows[0]['n']}, width 512, K = 10": "{contender}", "seconds": "{seconds:.2f}"}
    columns |= {"times fastagop's": "{ratio:.1f}", "peak memory": "{peak}", "difference of M": "{difference:.0e}"}
    return files.markdown(columns, rows)
