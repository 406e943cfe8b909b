"""What the scores of many learners on many tables come to: gaps, ranks, log losses and seconds, and their tables."""

from __future__ import annotations

import statistics

from bench import files
from bench.tables_contenders import LABELS

AGAINST, PACE = "boosting", "pytabkit"  # whom wins are counted against, and whose seconds are the unit


def gaps(rows: list[dict]) -> dict[tuple[str, str], float]:
    """(table, contender) -> the best score on that table less the contender's."""
    found = _by(rows, "score")
    best: dict[str, float] = {}
    for (name, _), score in found.items():
        best[name] = max(best.get(name, score), score)
    return {key: best[key[0]] - score for key, score in found.items()}


def ranks(rows: list[dict]) -> dict[tuple[str, str], float]:
    """(table, contender) -> 1 for the best score on that table; equal scores share the mean of their places."""
    found = _by(rows, "score")
    made = {}
    for (name, who), score in found.items():
        others = [other for (at, _), other in found.items() if at == name]
        made[name, who] = 0.5 + sum(other > score for other in others) + 0.5 * sum(other == score for other in others)
    return made


def summary(rows: list[dict]) -> list[dict]:
    """One entry a contender: means over the tables that it finished, and ratios over those that both finished."""
    made, gap, rank, score = [], gaps(rows), ranks(rows), _by(rows, "score")
    loss, seconds = _by(rows, "log_loss"), _seconds(rows)
    tables = len({row["set"] for row in rows})
    for who in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == who]
        against = [name for name, other in score if other == who and (name, AGAINST) in score]
        paced = [name for name, other in seconds if other == who and (name, PACE) in seconds]
        pace = sum(seconds[name, PACE] for name in paced)
        made.append(
            {
                "contender": who,
                "sets": sum(other == who for _, other in score),
                "of": tables,
                "gap": _mean(gap, who),
                "worst_gap": max((value for (_, other), value in gap.items() if other == who), default=None),
                "rank": _mean(rank, who),
                "at_or_above": sum(score[name, who] >= score[name, AGAINST] for name in against),
                "compared": len(against),
                "log_loss": _mean(loss, who),
                "seconds": sum((value for (_, other), value in seconds.items() if other == who), 0.0),
                "times_pytabkit": sum(seconds[name, who] for name in paced) / pace if pace else None,
                "errors": list(dict.fromkeys(row["error"] for row in mine if "error" in row)),
            }
        )
    return made


def _by(rows: list[dict], key: str) -> dict[tuple[str, str], float]:
    return {(row["set"], row["contender"]): row[key] for row in rows if row.get(key) is not None}


def _seconds(rows: list[dict]) -> dict[tuple[str, str], float]:
    fits, predictions = _by(rows, "fit_seconds"), _by(rows, "predict_seconds")
    return {key: fit + predictions[key] for key, fit in fits.items()}


def _mean(values: dict[tuple[str, str], float], who: str) -> float | None:
    mine = [value for (_, other), value in values.items() if other == who]
    return statistics.fmean(mine) if mine else None


def table(rows: list[dict]) -> str:
    """The summary as a Markdown table, the smallest mean gap first; who did not finish says why."""
    found = sorted(summary(rows), key=lambda one: (one["gap"] is None, one["gap"] or 0.0))
    columns = {"": "{name}", "mean gap": "{gap}", "worst gap": "{worst}", "mean rank": "{rank}"}
    columns |= {f"at or above {LABELS[AGAINST]}": "{above}", "mean log loss": "{loss}", "seconds": "{total}"}
    columns |= {f"times {LABELS[PACE]}'s": "{pace}"}
    if any(one["errors"] for one in found):
        columns |= {"not finished": "{why}"}
    return files.markdown(columns, [_words(one) for one in found])


def _words(one: dict) -> dict:
    return {
        "name": LABELS[one["contender"]],
        "gap": _number(one["gap"], ".3f"),
        "worst": _number(one["worst_gap"], ".3f"),
        "rank": _number(one["rank"], ".1f"),
        "above": f"{one['at_or_above']} of {one['compared']}" if one["compared"] else "",
        "loss": _number(one["log_loss"], ".3f"),
        "total": _number(one["seconds"] or None, ".3g"),
        "pace": _number(one["times_pytabkit"], ".2g"),
        "why": f"{one['of'] - one['sets']} of {one['of']}: {'; '.join(one['errors'])}" if one["errors"] else "",
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def scores(rows: list[dict]) -> str:
    """Every table's accuracy or R² by contender, the best in bold."""
    found, gap = _by(rows, "score"), gaps(rows)
    who = list(dict.fromkeys(row["contender"] for row in rows))
    columns = {"": "{set}", "n": "{n}", "d": "{d}"} | {LABELS[name]: "{%s}" % name for name in who}  # noqa: UP031
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(row["set"], row)
    made = []
    for row in first.values():
        at = {name: (row["set"], name) for name in who}
        words = {name: _number(found.get(key), ".3f") for name, key in at.items()}
        bold = {name: f"**{words[name]}**" for name, key in at.items() if gap.get(key) == 0.0}
        made.append(row | words | bold)
    return files.markdown(columns, made)
