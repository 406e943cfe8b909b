"""What a solve found, in words and numbers, and what is said aloud about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastagop.kernels.checks import largest
from fastagop.kernels.errors import warn
from fastagop.kernels.precision import dtype_name
from fastagop.solvers.limits import RESIDUAL

_COLUMN = 2.0  # times the residual that is worth a warning: columns of one size differ by less
_OF_FLOAT32 = 1e-4  # residual worth a warning where alpha is float64 and the matrix float32: a sample finds 1e-5


_BEFORE = "as before, "


def size_of(tensor: torch.Tensor) -> str:
    """A tensor's shape in a short repr."""
    return " x ".join(map(str, tensor.shape))


@dataclass(frozen=True)
class Solution:
    """What ``solve`` found and what it did to find it.

    Attributes:
        alpha: coefficients (n, K), in X's dtype.
        residual: ||(k + ridge W^-1) alpha - Y|| / ||Y|| (Frobenius) over rows with weight, of the alpha returned and of
            k(X, X) in float64, without the jitter; what copies of a row contradict each other is in it.
        ridge: the ridge asked for.
        jitter: what was added to the diagonal beyond the ridge; 0.0 when nothing.
        method: what ran, "cholesky", "cholesky+cg" (float64 kernel values, a float32 factor), "eigh" or "cg".
        dtype: the dtype of the factorisation, or of the products of "cg".
        iterations: steps of "cg", or of float64 refinement on a float32 factor.
        rank: n less the eigenvalues dropped by "eigh"; rank of the preconditioner of "cg"; n otherwise.
        seconds: wall-clock time.
        stopped: why "cg" ended before its tolerance; "" where it did not.
        tolerance: the residual that "cg" or "cholesky+cg" was asked for; 0.0 for the others.
        residual_rows: rows that the residual was measured on: all, or an evenly spaced sample.
        merged: rows merged away because the dtype cannot tell them apart from others; these share a coefficient, or
            under a ridge differ by what their targets ask for.
        contradictions: rows whose target differs from the mean target of their copies.
        merged_residual: residual of the merged system, whose targets are those means; None where nothing was merged.
        note: what is wrong with the problem itself, such as a bandwidth at which points look alike; "" where nothing.
        fallback: why a float32 factor gave way to the solver that ran, here or ("as before, ...") in an earlier solve
            of a fit; "" where none did.
        column_residual: the largest residual of a column of Y relative to that column, of the merged system where there
            is one: the residual of a column of small targets hardly shows in ``residual``.
    """

    alpha: torch.Tensor
    residual: float
    ridge: float
    jitter: float
    method: str
    dtype: torch.dtype
    iterations: int
    rank: int
    seconds: float
    stopped: str = ""
    tolerance: float = 0.0
    residual_rows: int = 0
    merged: int = 0
    contradictions: int = 0
    merged_residual: float | None = None
    note: str = ""
    fallback: str = ""
    column_residual: float = 0.0

    def __repr__(self) -> str:
        header = f"{self.method} in {dtype_name(self.dtype)}, ridge {self.ridge:g}"
        header += f", jitter {self.jitter:.1e}" if self.jitter else ""
        rows = f" on {self.residual_rows} rows" if 0 < self.residual_rows < len(self.alpha) else ""
        parts = [
            f"alpha {size_of(self.alpha)} {dtype_name(self.alpha.dtype)}",
            header,
            f"residual {self.residual:.1e}{rows}",
        ]
        if self.merged:
            parts.append(
                f"{self.merged} rows merged" + f", {self.contradictions} contradict" * bool(self.contradictions)
            )
        parts += [f"fell back: {self.fallback}"] * bool(self.fallback)
        parts += [f"stopped: {self.stopped}"] * bool(self.stopped) + [f"{self.seconds:.2g} s"]
        return f"Solution({', '.join(parts)})"


def as_before(fallback: str) -> str:
    """The words of a fallback for the solves of a fit that come after it."""
    return fallback if not fallback or fallback.startswith(_BEFORE) else _BEFORE + fallback


@dataclass(frozen=True)
class Solved:
    """A Solution for the rows given, and the coefficients (r, K) of the points that they were merged into."""

    solution: Solution
    alpha: torch.Tensor

    def to(self, device: torch.device) -> Solved:
        """A copy whose tensors lie on a device."""
        return Solved(replace(self.solution, alpha=self.solution.alpha.to(device)), self.alpha.to(device))


def warn_about(
    solution: Solution, warned: set[str] | None = None, points: str = "", *, which: str = "", columns: bool = False
) -> None:
    """Warn once about what was altered, or about a residual larger than the dtype promises.

    ``warned``: kinds of what a fit of many solves has warned about already; what is true of the whole fit is not
    repeated. ``points``: what made points of the rows given, in words. ``which``: solve of a fit this was.
    ``columns``: whether a single column of targets counts; a fit's may be rounding errors of nothing.
    """
    altered, wrong = _altered(solution, columns), _problem(solution, points)
    warned, texts = set() if warned is None else warned, []
    if altered:
        texts.append(f"{' and '.join(altered)}; {_remedy(solution)}")
    texts += [text for kind, text in wrong.items() if kind not in warned]
    warned.update(wrong)
    if texts:
        warn(f"solve{which and f' {which}'}: {'. '.join(texts)}")


def _remedy(solution: Solution) -> str:
    """What helps where a solve was altered, or its residual is too large."""
    alpha, narrow = solution.alpha, solution.alpha.dtype == torch.float32
    if not solution.jitter and alpha.numel() and largest(alpha) < torch.finfo(alpha.dtype).tiny:
        more = ", or take float64 points" if narrow else ""
        return f"coefficients are smaller than {dtype_name(alpha.dtype)} holds. Multiply Y by a large constant{more}"
    ended = solution.stopped or solution.jitter > 0
    if solution.method == "cg" and (ended or not narrow):
        return "a larger rank, more max_iterations or a larger ridge helps"
    if solution.ridge > 0:
        more = "float32 does not hold coefficients of this size: float64 points or " if narrow else ""
        return f"{more}a larger ridge makes the problem well posed"
    singular = "the kernel matrix is singular to rounding here"
    if narrow:
        return (
            f"{singular}, or coefficients are larger than float32 bears. Float64 points, a bandwidth nearer to the "
            "points' distances or a ridge above 0 makes the problem well posed"
        )
    return f"{singular}. A ridge above 0 makes the problem well posed"


def _altered(solution: Solution, columns: bool) -> list[str]:
    """What was done to this solve, and a residual that is too large, of one of the ``columns``, too."""
    reported, points = [], len(solution.alpha) - solution.merged
    dropped = len(solution.alpha) - solution.rank if solution.method == "eigh" else 0
    if solution.jitter > 0:
        reported.append(f"jitter {solution.jitter:.1e} was added to the diagonal beyond the ridge {solution.ridge:.1e}")
    if dropped:
        reported.append(f"{dropped} of {points} eigenvalues were dropped")
    if solution.stopped:
        reported.append(f"conjugate gradients ended after {solution.iterations} steps because {solution.stopped}")
    residual = solution.residual if solution.merged_residual is None else solution.merged_residual
    limit = RESIDUAL[solution.alpha.dtype]
    if solution.dtype != solution.alpha.dtype == torch.float64:
        limit = _OF_FLOAT32
    if solution.stopped or not residual <= max(limit, solution.tolerance):
        reported.append(f"the relative residual is {residual:.1e}")
    elif columns and not solution.column_residual <= _COLUMN * max(limit, solution.tolerance):
        reported.append(
            "the columns of Y differ in size, and one of them, compared with itself, has the relative residual "
            f"{solution.column_residual:.1e}"
        )
    return reported


def _problem(solution: Solution, points: str) -> dict[str, str]:
    """What is wrong with the problem, whatever the solver does: texts by their kind."""
    wrong = {}
    if solution.contradictions and solution.ridge == 0:
        more = "" if solution.jitter else ", without jitter"
        wrong["contradictions"] = (
            f"{solution.contradictions} rows are copies of each other to rounding{points} but their targets differ: "
            f"copies are answered by their mean target{more}. Remove all but one of them, or take a ridge above 0"
        )
    if solution.merged_residual is not None and not solution.contradictions:
        limit = max(RESIDUAL[solution.alpha.dtype], solution.tolerance, 2.0 * solution.merged_residual)
        if not solution.residual <= limit:
            wrong["copies"] = (
                f"{solution.merged} rows are copies of others to rounding{points} and share their coefficients, but "
                f"the kernel tells them apart: the relative residual is {solution.residual:.1e}. Subtract from X what "
                "all rows have in common before they are rounded, or take a larger bandwidth"
            )
    if solution.note:
        wrong["bandwidth"] = solution.note
    return wrong
