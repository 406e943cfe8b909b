"""What estimators make of their arguments, in numbers: offsets, weights, dtypes; and how a fit says where it is."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, Gaussian, Laplace, RFMClassifier, RFMRegressor
from fastagop.estimators import inputs, kernel_ridge, rounding, target_means
from fastagop.estimators.progress import Progress
from fastagop.rfm import preparation
from fastagop.solvers import copies

F32, F64 = torch.float32, torch.float64


# ---- offsets


@pytest.mark.parametrize("n", [5, 6, 101, 102, 104])
@pytest.mark.parametrize("copied", [1, 3])
def test_an_offset_is_the_median_and_its_spread_that_between_quartiles(n, copied):
    """Values number (n - 1) / 4, half and three quarters of n - 1 decide, rounded down; those beyond do not."""
    low, middle, high = (k * (n - 1) // 4 for k in (1, 2, 3))
    near = 100.0 + 1e-3 * torch.arange(n, dtype=F64)

    def found(below=0, above=n):
        values = near.clone()
        values[:below] -= 100.0
        values[above:] += 1000.0
        return float(preparation.offsets(values.repeat(copied)[:, None]))

    assert found() == found(below=low) == found(above=high + 1) == float(near[middle])
    assert found(below=low + 1) == found(above=high) == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("middle", "is_offset"), [(2.01, True), (1.99, False)])
def test_an_offset_exceeds_its_spread_four_times(middle, is_offset, sign):
    column = sign * (middle + torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5], dtype=F64))  # half between quartiles
    assert float(preparation.offsets(column[:, None])) == (sign * middle if is_offset else 0.0)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
@pytest.mark.parametrize(("times", "is_offset"), [(4.01, True), (3.99, False)])
def test_an_offset_of_targets_exceeds_their_deviation_four_times(times, is_offset, weights):
    values, weights = np.array([-1.0, 1.0]), None if weights is None else np.array(weights)
    mean = np.average(values, weights=weights)
    deviation = np.sqrt(np.average((values - mean) ** 2, weights=weights))
    y = (values - mean + times * deviation)[:, None]
    for column in (y, -y):
        found = target_means.offset(column, weights)
        expected = np.average(column, axis=0, weights=weights) if is_offset else [0.0]
        np.testing.assert_allclose(found, expected, rtol=1e-14)


# ---- dtypes, weights


@pytest.mark.parametrize(
    ("largest", "word"),
    [(1e39, "large"), (1e-39, "small"), (2.0**-126, None), (3e38, None), (0.0, None), (0.99 * 2.0**-126, "small")],
)
def test_numbers_that_a_dtype_does_not_hold(largest, word):
    value = torch.tensor([largest, -largest / 2], dtype=F64)
    if word is None:
        assert inputs.narrowed("X", value, F32).dtype == F32
        return
    remedy = {"large": "divide", "small": "multiply"}[word]
    with pytest.raises(ValueError, match=f"^X is too {word} for torch.float32: its largest entry .*; {remedy} X by "):
        inputs.narrowed("X", value, F32)
    assert inputs.narrowed("X", value, F64) is value


def test_weights_of_one_are_none():
    assert inputs.weights(None, 3) is None
    assert inputs.weights(np.ones(3), 3) is None
    assert inputs.weights(1, 3) is None
    assert inputs.weights(2.0, 3).tolist() == [2.0, 2.0, 2.0]
    assert inputs.weights([1, 1, 2], 3).tolist() == [1.0, 1.0, 2.0]
    rows = torch.arange(6.0).reshape(3, 2)
    kept = inputs.weighted_rows(np.array([1.0, 0.0, 2.0]), rows, np.arange(3), None)
    assert kept[0].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert (kept[1].tolist(), kept[2], kept[3].tolist()) == ([0, 2], None, [1.0, 2.0])
    assert inputs.weighted_rows(None, rows)[0] is rows


def test_class_weights_in_numbers():
    classes, codes = np.array(["a", "b"]), np.array([0, 0, 0, 1])
    assert inputs.class_weights(None, classes, codes, None) is None
    np.testing.assert_allclose(inputs.class_weights("balanced", classes, codes, None), [4 / 6] * 3 + [2.0])
    weighted = inputs.class_weights("balanced", classes, codes, np.array([1.0, 1.0, 0.0, 6.0]))
    np.testing.assert_allclose(weighted, [2.0, 2.0, 2.0, 8 / 12])
    assert inputs.class_weights({"b": 5}, classes, codes, None).tolist() == [1.0, 1.0, 1.0, 5.0]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("X", "dtype"),
    [
        (np.zeros(2, np.float32), np.float32),
        (np.zeros(2), np.float64),
        (np.zeros(2, np.int32), np.float64),
        ([0.0], np.float64),
        (torch.zeros(2), F32),
        (torch.zeros(2, dtype=F64), F64),
        (torch.zeros(2, dtype=torch.int64), F64),
        (torch.zeros(2, dtype=torch.float16), torch.float16),
    ],
)
def test_answers_have_the_dtype_of_the_rows(X, dtype, wide):
    found = RFMRegressor()._like_input(torch.ones(2, dtype=F64), X, wide)
    assert found.dtype == ((F64 if isinstance(X, torch.Tensor) else np.float64) if wide else dtype)


# ---- the AGOP of a kernel regression


@pytest.mark.parametrize(("scale", "expected"), [("max", 3.0), ("mean", 7.0), ("sum", 1.0)])
def test_what_divides_an_agop(scale, expected):
    assert kernel_ridge.agop_divisor(torch.tensor([[3.0, -9.0], [-9.0, 2.0]]), scale, 7) == expected
    zero = kernel_ridge.agop_divisor(torch.zeros(2, 2), scale, 7)
    assert zero == (7.0 if scale == "mean" else 1.0)
    assert kernel_ridge.agop_divisor(torch.full((1, 1), 0.25), scale, 7) == {"max": 0.25, "mean": 7, "sum": 1}[scale]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("K", [1, 2])
def test_what_rounding_costs_the_gradients(K, weighted, center, normal, monkeypatch):
    """At eight points evenly spaced and at the eight of largest coefficients, against gradients made by hand."""
    X, alpha = normal(40, 3, dtype=F32), normal(40, K, seed=2)
    alpha[11] = 100.0
    w = normal(40, seed=3).square() if weighted else None
    x, root = X.double(), torch.ones(40, dtype=F64) if w is None else w.sqrt()
    W = Gaussian(2.0).weight_(torch.cdist(x, x).square())
    index = torch.cat([torch.arange(8) * 5, (alpha.abs().amax(1) * root).topk(8)[1]])
    total = lost = 0.0
    for c in range(K):
        apart = x[None] - x[index][:, None]
        exact = W[index] * alpha[:, c]
        rounded = W[index].float().double() * alpha[:, c].float().double()
        g, change = (torch.einsum("ij,ijd->id", t, apart) * root[index, None] for t in (exact, rounded - exact))
        g = g - g.mean(0) if center else g
        total, lost = total + float(g.square().sum()), lost + float(change.square().sum())
    share = (lost / total) ** 0.5
    assert 1e-9 < share < 1e-6
    for limit, costs in ((0.99 * share, True), (1.01 * share, False)):
        monkeypatch.setattr(rounding, "LIMIT", limit)
        assert rounding.costs(Gaussian(2.0), X, alpha, center, w) == costs
    assert not rounding.costs(Gaussian(2.0), X, alpha[:, :0], center, w)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("wide", [True, False])
def test_an_agop_is_that_of_the_backend_asked_for(wide, dtype, backend, normal, monkeypatch):
    """Float64 points stay with it; float32 ones that are computed in float64 go to whoever serves them."""
    made = []
    plain = kernel_ridge.Predictor
    monkeypatch.setattr(kernel_ridge, "Predictor", lambda *args: made.append(args) or plain(*args))
    monkeypatch.setattr(rounding, "costs", lambda *args: wide)
    monkeypatch.setattr(kernel_ridge.float64_fit, "fit", lambda *args: None)
    how = kernel_ridge.KernelRidge(Laplace(2.0), 1e-3, "highest", backend)
    kernel_ridge.fit_and_agop(normal(20, 3, dtype=dtype), normal(20, 2, dtype=dtype), how)
    widened = wide and dtype == F32
    assert made[0][1].dtype == (F64 if widened else dtype)
    assert made[0][4] == ("auto" if widened else backend)


def test_gradients_are_promised_to_five_digits():
    assert rounding.LIMIT == 2e-6


def test_an_agop_in_float64_stays_there(normal):
    """Whether rounding costs too much is asked of float32 points only."""
    X, Y = normal(30, 3), normal(30, 2)
    how = kernel_ridge.KernelRidge(Laplace(2.0), 1e-3, "highest", "auto")
    given = kernel_ridge.fit_and_agop(X, Y, how)
    assert torch.equal(kernel_ridge.fit_and_agop(X, Y, how, rows=copies.alone(X))[1], given[1])
    marks = []
    kernel_ridge.fit_and_agop(X, Y, how, mark=marks.append)
    assert marks == ["solve", "agop"]


# ---- how far a fit is

MAKE = {
    "DeepRFMClassifier": lambda **how: DeepRFMClassifier(depth=2, width=16, ridge=0.01, random_state=0, **how),
    "DeepRFMRegressor": lambda **how: DeepRFMRegressor(depth=2, width=16, ridge=0.01, random_state=0, **how),
    "RFMClassifier": lambda **how: RFMClassifier(iterations=2, **how),
    "RFMRegressor": lambda **how: RFMRegressor(iterations=2, **how),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("verbose", [0, 1])
def test_a_bar_counts_steps_and_shows_collapse(name, verbose, monkeypatch, capfd, caplog, normal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    X, y = normal(20, 3).numpy(), np.arange(20) % 2
    with caplog.at_level(logging.INFO, logger="fastagop"):
        MAKE[name](verbose=verbose).fit(X, y)
    bar, lines = capfd.readouterr().err, [record.getMessage() for record in caplog.records]
    if not verbose:
        assert bar == ""
        assert not any(" of 2" in line for line in lines)
        return
    step = "RFM: iteration" if name.startswith("RFM") else "Deep RFM: layer"
    found = [line for line in lines if " of 2" in line]
    assert [line.split(",")[0] for line in found] == [f"{step} 1 of 2", f"{step} 2 of 2"]
    collapse = name == "DeepRFMClassifier"
    assert all((", nc1 " in line) == collapse for line in found)
    assert "2/2" in bar
    assert ("nc1=" in bar) == collapse


def test_a_resumed_fit_goes_on_counting(monkeypatch, capfd, caplog, tmp_path, normal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO, logger="fastagop"), Progress("Fit", "part", 5, done=3, quiet=False) as bar:
        bar.step()
    assert [record.getMessage() for record in caplog.records] == ["Fit: part 4 of 5"]
    shown = capfd.readouterr().err
    assert "3/5" in shown
    assert "4/5" in shown


@pytest.mark.parametrize("name", [None, 1.5, "nowhere", "cuda:x"])
def test_what_is_no_device_is_refused_in_plain_words(name):
    with pytest.raises(ValueError, match=r"^device must be 'auto' or a device of torch, got .*; use 'auto'") as info:
        inputs.device(name)
    assert len(str(info.value)) < 120
    assert info.value.__cause__ is not None


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named_without_the_internals_of_torch(name):
    if name != "cuda:99" and getattr(torch, name).is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match=rf"^device '{name}' is not there( \([^()]*\))?; use 'auto' or 'cpu'$") as info:
        inputs.device(name)
    assert len(str(info.value)) < 120
    assert isinstance(info.value.__cause__, (RuntimeError, AssertionError))


def test_means_of_the_largest_targets():
    """Sums of them leave float64, their means do not."""
    y = np.random.default_rng(0).uniform(-1.0, 1.0, (50, 2))
    weights = np.linspace(1.0, 2.0, 50)
    for row_weights in (None, weights):
        plain = target_means.mean(y, row_weights)
        assert np.array_equal(target_means.mean(y * 2.0**1022, row_weights), plain * 2.0**1022)
        assert np.array_equal(target_means.mean(y * 2.0**-300, row_weights), plain * 2.0**-300)
    assert np.array_equal(target_means.mean(y, weights * 2.0**1000), target_means.mean(y, weights))


@pytest.mark.parametrize("name", ["y", "sample_weight", "class_weight"])
def test_numbers_whose_sums_leave_float64_are_refused_by_name(name):
    X = np.random.default_rng(0).normal(size=(40, 3))
    y, weights, how = X[:, 0], None, {}
    if name == "y":
        y = 1e308 * np.abs(y).clip(0, 1)
    elif name == "sample_weight":
        weights = np.full(40, 1e308)
    else:
        y, how = y > 0, {"class_weight": {False: 1e307, True: 1e307}}
    make = RFMClassifier if name == "class_weight" else RFMRegressor
    with pytest.raises(ValueError, match=f"^{name} is (so|too) large"):
        make(iterations=1, **how).fit(X, y, weights)


@pytest.mark.parametrize("seed", range(40))
def test_the_quick_look_for_an_offset_of_targets_never_decides_otherwise(seed, monkeypatch):
    random = np.random.default_rng(seed)
    n, K = random.integers(1, 30), random.integers(1, 4)
    y = random.normal(size=(n, K)) * 10.0 ** random.integers(-200, 200)
    y += random.normal(size=K) * 10.0 ** random.integers(-5, 5) * [0.0, np.abs(y).max(), 1.0][seed % 3]
    row_weights = random.uniform(0.1, 1.0, n) if seed % 2 else None
    found = target_means.offset(y, row_weights)
    monkeypatch.setattr(target_means, "_clearly_none", lambda *_: False)
    np.testing.assert_array_equal(found, target_means.offset(y, row_weights))


# ---- arrays that are none


MASKED = np.ma.array(np.ones((6, 2)), mask=[[True, False]] * 2 + [[False, False]] * 4)
ROWS, KINDS = np.arange(12.0).reshape(6, 2), np.array([0, 1] * 3)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("X", lambda: fastagop.RFMClassifier().fit(MASKED, KINDS)),
        ("X", lambda: fastagop.RFMClassifierCV(cv=2).fit(MASKED, KINDS)),
        ("X", lambda: fastagop.DeepRFMRegressor().fit(MASKED, KINDS)),
        ("X_val: X", lambda: fastagop.RFMClassifier().fit(ROWS, KINDS, X_val=MASKED, y_val=KINDS)),
        ("y", lambda: fastagop.RFMRegressor().fit(ROWS, MASKED[:, 0])),
        ("y", lambda: fastagop.RFMTreeRegressor().fit(ROWS, MASKED)),
        ("sample_weight", lambda: fastagop.RFMRegressor().fit(ROWS, KINDS, sample_weight=MASKED[:, 0])),
        ("layer 'a'", lambda: fastagop.probes.fit({"a": MASKED}, KINDS)),
    ],
)
def test_masked_entries_are_refused(name, call):
    """NumPy takes the numbers that lie beneath, as if nothing were masked."""
    with pytest.raises(ValueError, match=rf"^{name} holds masked entries, \d of them; leave such rows out"):
        call()


@pytest.mark.parametrize(
    "given", [{"a": 1.0}, {1.0, 2.0}, "abc", b"abc", iter([1.0, 2.0])], ids=lambda given: type(given).__name__
)
def test_what_is_no_array_is_named(given):
    kind = type(given).__name__
    for make in (fastagop.RFMClassifier, fastagop.RFMRegressor):
        with pytest.raises(TypeError, match=rf"^X must be an array, a list, a frame or a tensor, got {kind}$"):
            make().fit(given, KINDS)
        with pytest.raises(TypeError, match=rf"^y must be an array, a list, a frame or a tensor, got {kind}$"):
            make().fit(ROWS, given)
