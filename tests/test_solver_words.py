"""What is said about a solve: its repr, its one warning, and bandwidths at which a kernel says nothing."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from fastagop.kernels.scaling import scale_points

import fastagop
from fastagop import Laplace
from fastagop.solvers import bandwidth
from fastagop.solvers.solution import Solution, warn_about

F32, F64 = torch.float32, torch.float64


def solution(n=4, **changes):
    alpha = torch.ones(n, 2, dtype=changes.pop("alpha", F64))
    made = Solution(alpha, 1e-12, 1e-3, 0.0, "cholesky", F64, 0, n, 0.123)
    return dataclasses.replace(made, **changes)


def said(*args, **keywords):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_about(*args, **keywords)
    return [str(warning.message) for warning in caught]


def test_a_solution_in_words():
    assert repr(solution()) == (
        "Solution(alpha 4 x 2 float64, cholesky in float64, ridge 0.001, residual 1.0e-12, 0.12 s)"
    )
    full = solution(jitter=2e-9, residual_rows=3, merged=2, contradictions=1, stopped="why", dtype=F32)
    assert repr(full) == (
        "Solution(alpha 4 x 2 float64, cholesky in float32, ridge 0.001, jitter 2.0e-09, residual 1.0e-12 on 3 rows, "
        "2 rows merged, 1 contradict, stopped: why, 0.12 s)"
    )
    assert "on 4 rows" not in repr(solution(residual_rows=4))
    assert "contradict" not in repr(solution(merged=1))
    assert solution().residual_rows == solution().merged == solution().contradictions == 0


@pytest.mark.parametrize(("changes", "words"), [
    ({}, None),
    ({"jitter": 2e-9}, "jitter 2.0e-09 was added to the diagonal beyond the ridge 1.0e-03"),
    ({"method": "eigh", "rank": 3, "merged": 1}, "1 of 3 eigenvalues were dropped"),
    ({"method": "cholesky", "rank": 3}, None),
    ({"residual": 0.9e-6}, None),
    ({"residual": 1.1e-6}, "the relative residual is 1.1e-06"),
    ({"residual": float("nan")}, "the relative residual is nan"),
    ({"residual": 1e-9, "merged_residual": 0.5}, "the relative residual is 5.0e-01"),
    ({"residual": 0.5, "merged_residual": 1e-9, "contradictions": 1}, None),
    ({"residual": 0.9e-3, "alpha": F32, "dtype": F32}, None),
    ({"residual": 1.1e-3, "alpha": F32, "dtype": F32}, "the relative residual is 1.1e-03"),
    ({"residual": 0.9e-3, "alpha": F32}, None),
    ({"residual": 0.9e-4, "dtype": F32}, None),
    ({"residual": 0.9e-2, "tolerance": 1e-2, "method": "cg"}, None),
    ({"jitter": 2e-9, "ridge": 0.0}, "jitter 2.0e-09 was added to the diagonal beyond the ridge 0.0e+00"),
    ({"jitter": 2e-9, "ridge": 0.0, "alpha": F32}, "jitter 2.0e-09 was added to the diagonal beyond the ridge 0.0e+00"),
])  # fmt: skip
def test_what_is_warned_of(changes, words):
    remedy = "a larger ridge makes the problem well posed"
    if changes.get("alpha") == F32:
        remedy = f"float32 does not hold coefficients of this size: float64 points or {remedy}"
    if changes.get("ridge") == 0.0:
        remedy = "the kernel matrix is singular to rounding here. A ridge above 0 makes the problem well posed"
        if changes.get("alpha") == F32:
            remedy = (
                "the kernel matrix is singular to rounding here, or coefficients are larger than float32 bears. "
                "Float64 points, a bandwidth nearer to the points' distances or a ridge above 0 makes the problem "
                "well posed"
            )
    assert said(solution(**changes)) == ([] if words is None else [f"solve: {words}; {remedy}"])


def test_copies_that_the_kernel_tells_apart_are_said_to_be_that(normal):
    """Two rows a few roundings apart, at a bandwidth of that size."""
    X = normal(20, 3, dtype=F32)
    X[1] = X[0] * (1 + 2 * torch.finfo(F32).eps)
    with pytest.warns(fastagop.NumericalWarning, match="1 rows are copies of others to rounding and share .* apart"):
        found = fastagop.solve(Laplace(1e-6), X, torch.ones(20, 1))
    assert found.merged == 1
    assert found.merged_residual < 1e-6
    assert found.residual > 1e-3


@pytest.mark.parametrize("method", ["auto", "cholesky+cg", "eigh", "cg"])
def test_a_small_column_that_is_not_solved_is_said(method, normal):
    """Rows that nearly agree and differ in targets that are small beside the others': no residual of all shows them."""
    X = normal(60, 3, dtype=F32)
    X[30:] = X[:30] + 1e-5 * normal(30, 3, dtype=F32, seed=2)
    Y = torch.stack([1e4 * X.sum(1).sin(), normal(60, 1, dtype=F32, seed=3)[:, 0]], 1)
    with pytest.warns(fastagop.NumericalWarning, match="one of them, compared with itself, has the relative residual"):
        found = fastagop.solve(Laplace(2.0), X, Y, method=method)
    assert found.residual < 1e-4
    left = fastagop.kernel_matrix(Laplace(2.0), X.double()) @ found.alpha.double() - Y
    worst = float((left.norm(dim=0) / Y.norm(dim=0)).max())
    assert found.column_residual == pytest.approx(worst, rel=1e-3)
    fine = fastagop.solve(Laplace(2.0), X, Y, ridge=1e-1, method=method)
    assert fine.column_residual <= 1e-3


@pytest.mark.parametrize("method", ["auto", "cholesky", "eigh", "cg"])
@pytest.mark.parametrize(("unit", "factor"), [(1e-44, 1.0), (1.0, 1e200)])
def test_coefficients_below_float32_are_said_to_be_that(method, unit, factor, normal):
    """No ridge, rank or number of steps makes them larger."""
    X, Y = normal(20, 3, dtype=F32), normal(20, 2, seed=2, dtype=F32) * unit
    with pytest.warns(fastagop.NumericalWarning, match="Multiply Y by a large constant, or take float64") as caught:
        fastagop.solve(factor * Laplace(2.0) if factor > 1 else Laplace(2.0), X, Y, ridge=1e-3, method=method)
    assert len(caught) == 1


def test_steps_that_met_their_tolerance_do_not_need_more(normal):
    """The residual is that of coefficients that float32 rounds, as after a factorisation."""
    X, Y = normal(120, 7, dtype=F32), normal(120, 3, dtype=F32, seed=2)
    for method in ("cg", "cholesky"):
        with pytest.warns(fastagop.NumericalWarning, match="float64 points or a larger ridge") as caught:
            found = fastagop.solve(fastagop.Polynomial(2), X, Y, ridge=1e-3, method=method)
        assert found.stopped == ""
        assert "max_iterations" not in str(caught[0].message)


def test_fits_say_which_solve_a_warning_is_of():
    assert said(solution(residual=0.5), which="of layer 3")[0].startswith("solve of layer 3: the relative residual is")
    rows = torch.randn(30, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    y, one = torch.arange(30) % 2, fastagop.ConjugateGradients(rank=0, max_iterations=1)
    deep = fastagop.DeepRFMClassifier(depth=2, width=8, dtype="float64", solver=one, random_state=0)
    rfm = fastagop.RFMClassifier(iterations=2, dtype="float64", solver=one)
    for model, words in (
        (deep, ("of layer 1", "of the readout")),
        (rfm, ("of iteration 2", "after the last iteration")),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(rows, y)
        texts = [str(warning.message) for warning in caught]
        assert all(
            any(text.startswith(f"solve {word}: conjugate gradients ended") for text in texts) for word in words
        ), texts


def test_several_things_are_one_warning():
    stopped = solution(method="cg", jitter=1e-9, stopped="it was late", iterations=7, note="mind the gap", ridge=0.0)
    assert said(dataclasses.replace(stopped, contradictions=3)) == [
        "solve: jitter 1.0e-09 was added to the diagonal beyond the ridge 0.0e+00 and conjugate gradients ended after "
        "7 steps because it was late and the relative residual is 1.0e-12; a larger rank, more max_iterations or a "
        "larger ridge helps. 3 rows are copies of each other to rounding but their targets differ: copies are answered "
        "by their mean target. Remove all but one of them, or take a ridge above 0. mind the gap"
    ]


def test_what_is_wrong_with_the_problem_is_said_once_in_a_fit():
    seen: set[str] = set()
    found = solution(contradictions=3, ridge=0.0, note="mind the gap")
    first, *others = said(found, seen)
    assert not others
    assert "answered by their mean target, without jitter. Remove" in first
    assert first.endswith(". mind the gap")
    assert said(found, seen) == []
    assert len(said(dataclasses.replace(found, jitter=1.0), seen)) == 1  # what was done is said each time
    assert said(solution(contradictions=3)) == []  # under a ridge a mean is the answer


# ---- bandwidths


def note(X, L, dtype=F64):
    kernel, X = Laplace(L), torch.as_tensor(X, dtype=dtype)
    return bandwidth.note(scale_points(kernel, X, X), kernel)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("value", "finding"), [("0.4 eps", "0 to"), ("2 eps", None), ("1 - 2 eps", "1 to"), ("1 - 9 eps", None)]
)
def test_values_that_say_nothing(value, finding, dtype):
    """Two points whose kernel value is that: 0 or 1 to rounding, or not."""
    eps = torch.finfo(dtype).eps
    apart = {"0.4 eps": -math.log(0.4 * eps), "2 eps": -math.log(2 * eps), "1 - 2 eps": 2 * eps, "1 - 9 eps": 9 * eps}
    text = note([[0.0], [apart[value]]], 1.0, dtype)
    assert ("" if finding is None else f"every kernel value of two different points is {finding}") in text
    assert bool(text) == (finding is not None)


@pytest.mark.parametrize("unit", [1.0, 2.0**40])
def test_a_note_says_what_and_how_far(unit):
    three = [[0.0, 0.0], [3.0, 0.0], [1.5, 27**0.5 / 2]]
    X = unit * torch.tensor(three, dtype=F64)
    start = f"at bandwidth {1e-3 * unit:.3g} every kernel value of two different points is "
    remedy = "take a bandwidth of that size or, where units of features differ, scale them first"
    end = f". Their typical distance is {3 * unit:.3g}: {remedy}"
    assert note(X, 1e-3 * unit) == f"{start}0 to rounding: no point says anything about another{end}"
    assert "is 1 to rounding: all points look alike" in note(X, 1e20 * unit)
    both = note(torch.cat([X, X]), 1e-3 * unit)
    assert "is 0 or 1 to rounding: points are equal to it or have nothing in common" in both


def test_equal_points_ask_for_no_bandwidth_of_zero():
    assert note(torch.zeros(5, 2), 1.0).endswith(
        "look alike. Most of them are equal here, at any bandwidth: other or more features are needed"
    )


@pytest.mark.parametrize("n", [0, 1])
def test_one_point_has_no_distance(n):
    assert note(torch.zeros(n, 2), 1.0) == ""


@pytest.mark.parametrize("rows", [(1, 2), (97, 99), (298, 299)])
def test_one_pair_that_is_near_says_enough(rows):
    """Of 300 points, each far from all others, two are not; wherever they stand."""
    X = 1e3 * torch.arange(300, dtype=F64)[:, None]
    assert note(X, 1.0).startswith("at bandwidth 1 ")
    X[rows[1]] = X[rows[0]] + 1.0
    assert note(X, 1.0) == ""
