"""The plan of a fit in numbers: its seconds, bytes and words are those of the steps that fit takes."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pandas
import pytest
import torch
from fastagop.kernels import calibration
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask, format_bytes
from fastagop.kernels.torch_backend import costs, diagonal

import fastagop
from fastagop import DeepRFMClassifier, Gaussian, RFMClassifier, RFMRegressor
from fastagop.deep_rfm import fit_plan
from fastagop.estimators import fit_plans
from fastagop.estimators.fit_plans import Data, Step
from fastagop.estimators.kernel_ridge import KernelRidge
from fastagop.solvers import direct, table
from fastagop.solvers.problem import Problem
from fastagop.solvers.solve import prepare

CPU = torch.device("cpu")
N, D, K = 300, 40, 3
TASK = AgopTask("sum")


def data(n=N, d=D, outputs=K, dtype=torch.float32) -> Data:
    blank = torch.zeros((1, 1), dtype=dtype)
    return Data(blank.expand(n, d), blank.expand(n, outputs), ())


def regression(ridge=1e-3, **how) -> KernelRidge:
    return KernelRidge(Gaussian(2.0), ridge, "highest", "auto", **how)


def seconds_of(flops, products, pairs=0.0):
    return calibration.seconds(flops, pairs, CPU, "gram", products)


def root_by_hand(n, d):
    """An eigendecomposition of size r = min(n, d), and the products that bring it from and to d dimensions."""
    r = min(n, d)
    return seconds_of(9.0 * r**3, "float64") + seconds_of(6.0 * d * d * r, "float64")


# ---- steps


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
def test_the_steps_of_a_recursive_feature_machine(iterations, diagonal, dtype, size):
    given = data(dtype=dtype)
    steps, held = fit_plans.iteration_steps(given, regression(), 1, TASK, (iterations, diagonal))
    name = {1: "iteration, 40 features", 3: "3 iterations, 40 features"}
    expected = [(name[iterations], iterations)] if iterations else []
    assert [step[:2] for step in steps] == [*expected, ("last solve, 40 features", 1)]
    # the last M and the root of every iteration, and float64 coefficients of every solve
    kept = (D if diagonal else D * D) * size
    assert held == kept * (iterations + 1 if iterations else 2) + 8 * N * K * (iterations + 1)
    alone = fit_plans.solve_only(given.X, given.Y, regression())
    assert steps[-1][2] == alone
    assert list(alone.seconds) == ["solve"]
    if iterations:
        step, single = steps[0][2], fit_plans.step_of(given.X, given.Y, regression(), 1, TASK, diagonal)
        assert list(step.seconds) == ["solve", "agop", "root"]
        product = seconds_of(2.0 * N * D * D, str(dtype).removeprefix("torch."))
        assert step.seconds["root"] == (0.0 if diagonal else pytest.approx(root_by_hand(N, D) + product))
        assert step.seconds["solve"] == alone.seconds["solve"]
        assert step.seconds["agop"] == single.seconds["agop"]
        # the projected points, and what an eigendecomposition takes
        assert step.peak_bytes == single.peak_bytes + N * D * size + (0 if diagonal else 4 * 8 * D * D)
        assert step.total == pytest.approx(sum(step.seconds.values()))


@pytest.mark.parametrize("diagonal", [False, True])
def test_fewer_rows_than_features_are_planned_in_their_span(diagonal):
    """In float64, whatever the dtype; rows that are held out, or left out, have a part in the last solve alone."""
    given, learn = data(), D - 10
    how = (given, regression(), 1, TASK, (3, diagonal))
    steps, held = fit_plans.iteration_steps(*how, (learn, 7))
    names = [step[:2] for step in steps]
    work = calibration.seconds(2.0 * 7 * learn * (D if diagonal else learn), 7.0 * learn, CPU, "gradient", "float64")
    scored = work + seconds_of(2.0 * 7 * D * (D if diagonal else learn), "float64")
    if diagonal:
        assert names == [("3 iterations, 40 features", 3), ("last solve, 40 features", 1)]
        assert held == D * 4 * 4 + 8 * (N + 3 * learn) * K
        assert steps[0][2].seconds["score"] == pytest.approx(scored)
        return
    assert names == [("span of 30 rows", 1), ("3 iterations, 30 features", 3), ("last solve, 30 features", 1)]
    wide = torch.zeros((1, 1), dtype=torch.float64)
    single = fit_plans.step_of(wide.expand(learn, learn), wide.expand(learn, K), regression(), 1, TASK)
    root = root_by_hand(learn, learn) + seconds_of(2.0 * learn**3, "float64")
    assert steps[0][2].seconds == {"factor": pytest.approx(seconds_of(6.0 * D * learn * learn, "float64"))}
    assert steps[0][2].peak_bytes == 3 * 8 * learn * D
    assert steps[1][2].seconds == {**single.seconds, "root": pytest.approx(root), "score": pytest.approx(scored)}
    assert steps[1][2].peak_bytes == single.peak_bytes + 8 * learn * learn + 4 * 8 * learn * learn
    assert steps[2][2] == fit_plans.solve_only(wide.expand(N, learn), wide.expand(N, K), regression())
    assert held == 8 * learn * learn * 4 + 8 * (N + 3 * learn) * K + 8 * learn * D
    assert fit_plans.iteration_steps(given, regression(), 1, TASK, (0, False), (learn, 0))[0][0][0].endswith(
        "40 features"
    )


def test_rows_that_the_metric_is_not_learnt_from_are_left_out_of_its_plan():
    X, y = np.random.default_rng(0).normal(size=(40, 30)), np.arange(40) % 2
    assert "span of" not in fastagop.explain(RFMClassifier(), X, y)
    text = fastagop.explain(RFMClassifier(early_stopping=True, validation_fraction=0.3), X, y)
    assert "  span of 28 rows: " in text
    assert "score" in text
    assert "  5 iterations, 20 features: " in fastagop.explain(RFMClassifier(metric_samples=0.5), X, y)


@pytest.mark.parametrize(("n", "d"), [(50, 20), (20, 50)])
def test_a_root_is_taken_in_the_smaller_of_two_spaces(n, d):
    assert fit_plans.root_seconds(n, d, CPU) == pytest.approx(root_by_hand(n, d))


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_ranks_share_the_agop_and_the_passes_of_cg(solver):
    given = data()
    alone, shared = (fit_plans.step_of(given.X, given.Y, regression(solver=solver), share, TASK) for share in (1, 4))
    assert shared.seconds["agop"] == pytest.approx(alone.seconds["agop"] / 4)
    assert shared.seconds["solve"] == pytest.approx(alone.seconds["solve"] / (4 if solver == "cg" else 1))
    solve = prepare(Gaussian(2.0), given.X, given.Y, regression(solver=solver).options)
    assert alone.seconds["solve"] == solve.seconds()


@pytest.mark.parametrize("solver", ["cholesky", "cg", "float32"])
def test_a_float64_matrix_becomes_the_weights_of_the_agop(solver, monkeypatch):
    """Its AGOP takes the cheaper form's seconds and no more memory; any other one is planned as a call is."""
    if solver == "float32":
        monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 0)
        monkeypatch.setattr(table, "FLOAT64_ROWS", 0)
    monkeypatch.setattr(Problem, "large", False)
    given, how = data(), regression(solver="cg" if solver == "cg" else "cholesky")
    step = fit_plans.step_of(given.X, given.Y, how, 1, TASK)
    solve = prepare(Gaussian(2.0), given.X, given.Y, how.options)
    if solver == "cholesky":
        works = costs.costs(given.X, given.X, K, costs.products_of(given.X, None, symmetric=True), symmetric=True)
        assert step.seconds["agop"] == min(works.values())
        assert step.peak_bytes == solve.plan.peak_bytes
    else:
        call = KernelOperator("agop", Gaussian(2.0), given.X).agop(given.Y, TASK)
        assert step.seconds["agop"] == call.seconds()
        assert step.peak_bytes == max(solve.plan.peak_bytes, call.plan.peak_bytes)
        assert solver == "cg" or step.peak_bytes >= direct.needed_bytes(N, D, torch.float64)


@pytest.mark.parametrize("limit", [None, 10**7])
def test_the_diagonal_of_an_agop(limit):
    given, how = data(), regression(memory_limit=limit)
    step = fit_plans.step_of(given.X, given.Y, how, 1, TASK, True)
    _, peak = diagonal.plan_rows(given.X, K, limit or 10**9)
    flops = 2.0 * N * N * D * (K + 1)  # the gradients of all outputs, and the distances; no outer products
    expected = calibration.seconds(flops, float(N) * N, CPU, "gradient", "float32")
    assert step.seconds["agop"] == pytest.approx(expected)
    solve = prepare(Gaussian(2.0), given.X, given.Y, how.options)
    assert step.peak_bytes == max(solve.plan.peak_bytes, peak)


def test_what_does_not_fit_is_no_step():
    """Where the solve does not fit there is nothing; where only the AGOP does not, the solve is there."""
    given, how = data(), regression(solver="cholesky", memory_limit=1e4)
    for step in (fit_plans.solve_only(given.X, given.Y, how), fit_plans.step_of(given.X, given.Y, how, 1, TASK)):
        assert (step.seconds, step.peak_bytes, step.solver) == ({}, 0, "")
        assert step.total == 0
        assert step.refused.startswith("solve with n = 300 needs ")
    room = 10**6
    wide = data(d=2000)
    how = regression(solver=fastagop.ConjugateGradients(rank=0), memory_limit=8 * 10**6)
    step = fit_plans.step_of(wide.X, wide.Y, how, 1, TASK)
    solve = prepare(Gaussian(2.0), wide.X, wide.Y, how.options)
    assert step.seconds == {"solve": solve.seconds()}
    assert step.peak_bytes == solve.plan.peak_bytes > room
    assert step.solver.startswith("cg on torch, float64 passes: ")
    assert step.refused.startswith("agop, ")


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("classes", [True, False])
def test_the_layers_of_a_deep_rfm(depth, classes):
    width, given = 64, data()
    settings = DeepRFMClassifier(Gaussian(2.0), depth=depth, width=width)._settings()
    steps, held = fit_plan.layer_steps(given, 1, settings, classes)
    later = {1: [], 2: [("layer 2, 64 features", 1)], 4: [("layers 2 to 4, 64 features", 3)]}[depth]
    assert [step[:2] for step in steps] == [("layer 1, 40 features", 1), *later, ("readout, 64 features", 1)]
    sizes = [D, *[width] * (depth - 1)]
    # M and its root, the random map, and float64 coefficients
    assert held == sum((2 * d * d + d * width) * 4 + 8 * N * K for d in sizes)
    for (_, _, step), d in zip(steps[:-1], sizes, strict=False):
        X = given.of_width(d)
        assert X.shape == (N, d)
        single = fit_plans.step_of(X, given.Y, settings.regression, 1, TASK)
        measures = 12 * N * (2 * d + width) * 8 / 4e9 if classes else 0.0
        assert step.seconds == {
            **single.seconds,
            "root": pytest.approx(root_by_hand(N, d)),
            "features": pytest.approx(seconds_of(2.0 * N * d * (d + width), "float32")),
            "measures": pytest.approx(measures),
        }
        # normalised and projected points and two of features, and the random map
        assert step.peak_bytes == max(single.peak_bytes, 4 * 8 * d * d) + (N * (d + 2 * width) + d * width) * 4


def test_memory_is_read_faster_on_cuda():
    assert fit_plans.memory_rate(CPU) == 4e9
    assert fit_plans.memory_rate(torch.device("cuda")) == 1e12


# ---- data


@pytest.mark.parametrize("make", [RFMRegressor, RFMClassifier])
def test_a_frame_is_explained_without_a_warning(make):
    frame = pandas.DataFrame(np.random.default_rng(0).normal(size=(20, 3)), columns=["a", "b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = fastagop.explain(make(), frame, np.arange(20) % 2)
    assert text.startswith(f"{make.__name__}.fit: 20 rows, 3 features, ")


def test_rows_of_weight_zero_are_left_out():
    X, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    text = fastagop.explain(RFMClassifier(), X, y, np.r_[np.zeros(5), np.full(15, 0.5)])
    assert text.startswith("RFMClassifier.fit: 15 rows, 3 features, 2 output(s), ")
    with pytest.raises(ValueError, match="sample_weight must not be negative"):
        fastagop.explain(RFMClassifier(), X, y, np.r_[-1.0, np.ones(19)])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (3, 3, 3)])
def test_tensors_on_meta_have_rows_and_columns(shape):
    with pytest.raises(ValueError, match="X must be a floating matrix"):
        fastagop.explain(RFMRegressor(), torch.empty(shape, device="meta"), torch.empty(3, device="meta"))


def test_tensors_on_meta_hold_floats():
    whole = torch.empty(3, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"X must be a floating matrix \(n, d\), got torch.int64 of shape \(3, 2\)"):
        fastagop.explain(RFMRegressor(), whole, torch.empty(3, device="meta"))


def test_targets_on_meta_beside_points_that_are_there():
    X = torch.randn(30, 4)
    text = fastagop.explain(RFMRegressor(), X, torch.empty(30, 7, device="meta"))
    assert text.startswith("RFMRegressor.fit: 30 rows, 4 features, 7 output(s)")
    assert "assumed    tensors on meta are planned for" in text
    text = fastagop.explain(RFMRegressor(), X, torch.empty(30, device="meta"), torch.empty(30, device="meta"))
    assert text.startswith("RFMRegressor.fit: 30 rows, 4 features, 1 output(s)")


def test_one_process_has_no_ranks():
    X, y = torch.randn(30, 4), torch.randn(30)
    text = fastagop.explain(RFMRegressor(), X, y)
    assert "ranks" not in text
    given = data(30, 4, 1)
    planned = fit_plans.iteration_steps(given, RFMRegressor()._regression(), 1, TASK, (5, False))
    assert f"about {planned[0][0][2].total:.2g} s each" in text


# ---- the text

ONE = Step({"solve": 2.0, "agop": 1.0, "root": 0.0}, 5000, "cholesky on torch, float64: why")
TWO = Step({"solve": 4.0}, 7000, "cholesky on torch, float64: why")
NONE = Step({}, 0, "", "solve needs more")


@pytest.fixture
def written(monkeypatch):
    def text(steps, held=1000, share=1, free=10**6, assumed=()):
        monkeypatch.setattr(fit_plans, "available_bytes", lambda device: free)
        monkeypatch.setattr(calibration, "source", lambda device: "rates")
        return fit_plans.text_of("Model", dataclasses.replace(data(), assumed=assumed), steps, held, share).splitlines()

    return text


def test_the_text_of_a_plan(written):
    assert written([("3 iterations", 3, ONE), ("last", 1, TWO)]) == [
        "Model.fit: 300 rows, 40 features, 3 output(s), float32 on cpu",
        "  3 iterations: about 3 s each (solve 2, agop 1), 5.0 kB",
        "  last: about 4 s (solve 4), 7.0 kB",
        "  solver     cholesky on torch, float64: why",
        "  seconds    about 13 in all (rates)",
        f"  memory     8.0 kB beyond X and y, 1.0 kB of it kept; {format_bytes(10**6)} are free now",
    ]


@pytest.mark.parametrize(("free", "fits"), [(8000, True), (7999, False)])
def test_all_of_it_together_may_not_fit(free, fits, written):
    lines = written([("3 iterations", 3, ONE), ("last", 1, TWO)], free=free)
    assert (lines[-1].startswith("  does not fit: all of it together; use fewer rows")) != fits


def test_a_step_that_does_not_fit_says_why(written):
    lines = written([("first", 1, ONE), ("last", 1, NONE)], free=1)
    assert lines[2] == "  last: does not fit, see below"
    assert lines[4].startswith("  seconds    about 3 for what fits")
    assert lines[5].startswith("  memory     6.0 kB for what fits; ")
    assert lines[6:] == ["  does not fit: last: solve needs more"]  # and nothing about all of it


def test_ranks_and_assumptions_are_said(written):
    steps = [("first", 1, ONE), ("last", 1, dataclasses.replace(TWO, solver="cg on torch"))]
    lines = written(steps, share=2, assumed=("ten classes",))
    assert lines[3:5] == ["  solver     cholesky on torch, float64: why", "  solver     cg on torch"]
    assert lines[-2] == "  ranks      2: each makes its part of AGOPs and of passes of cg; the first factors alone"
    assert lines[-1] == "  assumed    ten classes"
    assert not any("ranks" in line or "assumed" in line for line in written(steps))
