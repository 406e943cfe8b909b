"""Bandwidths that are the median distance of the points: the words, the number, and fits that settle it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fastagop.kernels.radial import Radial
from kernel_cases import CASES, one_of_each_class
from scipy.spatial.distance import pdist
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastagop
from fastagop import (
    DeepRFMClassifier,
    DeepRFMRegressor,
    GeneralisedLaplace,
    Laplace,
    Matern52,
    RFMClassifier,
    RFMRegressor,
    settled,
)
from fastagop.solvers import bandwidth


@dataclass(frozen=True)
class Users(Radial):
    """A kernel of a user's own, with a parameter of its own: exp(-(r / L)^2) to a power."""

    power: float

    def value_(self, sq):
        return sq.mul_(-self.power / self.bandwidth**2).exp_()

    def weight_(self, sq):
        zero = sq == 0
        return self.value_(sq).mul_(2 * self.power / self.bandwidth**2).masked_fill_(zero, 0.0)


CLASSES = {type(case.kernel): case.further for case in one_of_each_class(CASES)} | {Users: (2.0,)}
classes = pytest.mark.parametrize("cls", CLASSES)
SMALL = {
    RFMClassifier: {"iterations": 1},
    RFMRegressor: {"iterations": 1},
    DeepRFMClassifier: {"depth": 2, "width": 16, "random_state": 0},
    DeepRFMRegressor: {"depth": 2, "width": 16, "random_state": 0},
}
every = pytest.mark.parametrize("make", SMALL, ids=lambda make: make.__name__)
MEDIAN, HALF = Laplace("median"), Laplace(("median", 0.5))
# scikit-learn's checks feed duplicated, one-dimensional and constant data: singular on purpose.
singular = pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")


def median(X) -> float:
    """The median distance of all pairs, by SciPy in float64."""
    return float(np.median(pdist(np.asarray(X, dtype=np.float64))))


def data(n=40, d=4):
    X = np.random.default_rng(0).normal(size=(n, d))
    return X, (X[:, 0] * X[:, 1] > 0).astype(int)


# ---- the words


@classes
@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("median", "median"),
        (np.str_("median"), "median"),
        (("median", 0.5), ("median", 0.5)),
        (["median", 2], ("median", 2.0)),  # as JSON gives it
        (("median", np.float32(0.25)), ("median", 0.25)),
        (("median", 1), "median"),
    ],
)
def test_kernels_stay_values(cls, given, stored):
    kernel = cls(given, *CLASSES[cls])
    assert kernel.bandwidth == stored
    assert type(kernel.bandwidth) is type(stored)
    assert kernel == cls(stored, *CLASSES[cls])
    assert hash(kernel) == hash(cls(stored, *CLASSES[cls]))
    assert len({kernel, cls(stored, *CLASSES[cls]), cls(2.0, *CLASSES[cls]), cls(("median", 3.0), *CLASSES[cls])}) == 3
    assert kernel.get_params() == {**cls(2.0, *CLASSES[cls]).get_params(), "bandwidth": stored}
    assert cls(2.0, *CLASSES[cls]).set_params(bandwidth=given) == kernel
    assert kernel.set_params(bandwidth=2) == dataclasses.replace(kernel, bandwidth=2.0) == cls(2.0, *CLASSES[cls])
    assert eval(repr(kernel), {cls.__name__: cls}) == kernel
    assert clone(kernel) is kernel
    for twin in (copy.copy(kernel), copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert twin == kernel
    assert cls(**json.loads(json.dumps(dataclasses.asdict(kernel)))) == kernel
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernel.bandwidth = 2.0


@classes
@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("mean", TypeError),
        ("Median", TypeError),
        (("mean", 0.5), TypeError),
        (("median",), TypeError),
        (("median", 0.5, 2.0), TypeError),
        (("median", "half"), TypeError),
        (("median", True), TypeError),
        (("median", None), TypeError),
        ((), TypeError),
        (("median", 0.0), ValueError),
        (["median", -1.0], ValueError),
        (("median", np.nan), ValueError),
        (("median", np.inf), ValueError),
        (("median", 10**400), ValueError),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_other_words_are_refused(cls, given, error):
    with pytest.raises(error) as caught:
        cls(given, *CLASSES[cls])
    text = str(caught.value)
    assert text.startswith("bandwidth must be a ")
    assert "'median' or ('median', factor > 0)" in text
    assert text.endswith(f"got {given!r}")


# ---- the number


@classes
@pytest.mark.parametrize(("word", "factor"), [("median", 1.0), (("median", 0.5), 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_class_gets_the_median(cls, word, factor, dtype):
    for n in (2, 3, 4, 50):  # one pair, and odd and even numbers of pairs
        X = torch.from_numpy(data(n)[0]).to(dtype)
        found = settled(cls(word, *CLASSES[cls]), X)
        assert type(found) is cls
        assert found == cls(found.bandwidth, *CLASSES[cls])
        assert found.bandwidth == pytest.approx(factor * median(X), rel=1e-14)


def test_a_number_stays():
    kernel = Matern52(2.0)
    assert settled(kernel, torch.ones(3, 2)) is kernel


def test_a_sample_stands_for_many_points():
    """The pairs of 1024 places that are spread over all points, whatever the order that these come in."""
    X = np.random.default_rng(1).normal(size=(20480, 3))
    X[np.arange(20480) % 20 > 9] *= 100.0  # points in a cycle: 20 rows are also the stretch that one is taken of
    found = settled(MEDIAN, torch.from_numpy(X)).bandwidth
    some = X[np.random.default_rng(2).permutation(len(X))[:4000]]
    assert found == pytest.approx(median(some), rel=0.1)
    assert settled(MEDIAN, torch.from_numpy(X[np.argsort(np.abs(X[:, 0]))])).bandwidth == pytest.approx(found, rel=0.1)


def test_a_row_that_two_stretches_take_is_at_no_distance_of_itself():
    """Of 1100 rows 1024 stretches take some twice."""
    X = np.random.default_rng(4).normal(size=(1100, 3))
    apart = pdist(X[bandwidth._places(len(X)).numpy()])
    assert (apart == 0).any()
    wanted = float(np.median(apart[apart > 0]))
    assert settled(MEDIAN, torch.from_numpy(X)).bandwidth == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 1500, 2048, 10**7])
def test_places_of_the_sample(n):
    """Within n, ascending, one in every stretch; all of them where there are no more than 1024."""
    places = bandwidth._places(n)
    count = min(n, 1024)
    assert len(places) == count
    assert torch.equal(places, places.sort().values)
    assert bool(((places >= torch.arange(count) * n // count) & (places < n)).all())
    assert bool((places - torch.arange(count, dtype=torch.float64) * n / count < n / count).all())
    if n <= 1024:
        assert places.tolist() == list(range(n))


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float64, [1e-30, 1e-5, 3.0, 1e30, 1e200, 1e-250]), (torch.float32, [1e-30, 1e-5, 3.0, 1e30])],
)
def test_scale(dtype, sizes):
    """A bandwidth is a length: c X has c times that of X, where squares of c X leave the dtype too."""
    X = torch.from_numpy(data()[0]).to(dtype)
    one = settled(HALF, X).bandwidth
    for c in sizes:
        assert settled(HALF, c * X).bandwidth == pytest.approx(c * one, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("offset", [1e3, 1e9, 1e14])
def test_translation(offset):
    """Beside an offset differences keep what digits the points have: here all, as they are whole numbers."""
    X = torch.from_numpy(np.random.default_rng(3).integers(-99, 99, (30, 4)).astype(np.float64))
    assert settled(MEDIAN, X + offset).bandwidth == settled(MEDIAN, X).bandwidth == pytest.approx(median(X), rel=1e-14)


def test_copies_and_order_change_nothing():
    X = torch.from_numpy(data()[0])
    one = settled(MEDIAN, X).bandwidth
    many = torch.cat([X, X[:1].expand(500, -1), X[3:9]])  # most pairs are at distance zero
    assert settled(MEDIAN, many).bandwidth == pytest.approx(one, rel=1e-14)
    assert settled(MEDIAN, X.flip(0)).bandwidth == pytest.approx(one, rel=1e-14)


@pytest.mark.parametrize("X", [torch.ones(1, 3), torch.ones(5, 3), torch.zeros(4, 2)], ids=["a row", "equal", "zeros"])
def test_no_distance(X):
    assert settled(HALF, X) == Laplace(1.0)


def test_autograd_and_autocast_play_no_part():
    X = torch.from_numpy(data()[0]).requires_grad_()
    with torch.autocast("cpu"):
        assert settled(MEDIAN, X) == settled(MEDIAN, X.detach())


@pytest.mark.parametrize(
    ("kernel", "X", "error", "words"),
    [
        ("laplace", torch.ones(3, 2), TypeError, "kernel must be a fastagop kernel"),
        (MEDIAN, np.ones((3, 2)), TypeError, "X must be a torch.Tensor"),
        (MEDIAN, torch.ones(3), ValueError, "X must be a matrix"),
        (MEDIAN, torch.ones(0, 2), ValueError, r"X must have at least 1 row\(s\)"),
        (MEDIAN, torch.full((3, 2), torch.nan), ValueError, "X holds NaN"),
        (MEDIAN, torch.ones(3, 2, device="meta"), TypeError, "X must hold numbers"),
    ],
)
def test_what_settled_refuses(kernel, X, error, words):
    with pytest.raises(error, match=words):
        settled(kernel, X)


# ---- functions compute with numbers only

X3 = torch.eye(3)
CALLS = {
    "call": lambda kernel: kernel(X3),
    "kernel_matrix": lambda kernel: fastagop.kernel_matrix(kernel, X3),
    "kernel_matmul": lambda kernel: fastagop.kernel_matmul(kernel, X3, V=X3),
    "gradients": lambda kernel: fastagop.gradients(kernel, X3, X3),
    "agop": lambda kernel: fastagop.agop(kernel, X3, X3),
    "solve": lambda kernel: fastagop.solve(kernel, X3, X3),
    "solve by cg": lambda kernel: fastagop.solve(kernel, X3, X3, method="cg"),
    **{
        f"explain {name}": lambda kernel, name=name: fastagop.explain(name, kernel, X3, X3)
        for name in ("gradients", "agop", "solve")
    },
    "explain kernel_matrix": lambda kernel: fastagop.explain("kernel_matrix", kernel, X3),
    "explain kernel_matmul": lambda kernel: fastagop.explain("kernel_matmul", kernel, X3, V=X3),
    "explain on meta": lambda kernel: fastagop.explain("agop", kernel, X3.to("meta"), X3.to("meta")),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_functions_say_what_to_do(call):
    with pytest.raises(
        ValueError, match=r"got Laplace\(bandwidth=\('median', 0.5\)\); use fastagop.settled\(kernel, X\)"
    ):
        call(HALF)
    call(settled(HALF, X3))


# ---- estimators


@every
@pytest.mark.parametrize("kernel", [HALF, GeneralisedLaplace("median", 0.7)], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])  # Deep RFM normalises float64 rows before it rounds them
def test_a_fit_is_the_fit_with_the_number(make, kernel, dtype):
    X, y = data()
    X = X.astype(dtype)
    model = make(kernel, **SMALL[make]).fit(X, y)
    assert model.kernel == kernel
    by_hand = make(model.kernel_, **SMALL[make]).fit(X, y)
    assert by_hand.kernel_ == by_hand.kernel == model.kernel_
    np.testing.assert_array_equal(model.predict(X), by_hand.predict(X))
    np.testing.assert_array_equal(model.transform(X), by_hand.transform(X))
    deep, factor = "Deep" in make.__name__, 0.5 if kernel is HALF else 1.0
    wanted = factor * median(X / np.linalg.norm(X, axis=1, keepdims=True) if deep else X)
    assert model.kernel_.bandwidth == pytest.approx(wanted, rel=1e-6)  # of float32 points
    again = model.fit(2.0 * X, y).kernel_.bandwidth  # the parameter is not used up
    assert again == pytest.approx(wanted if deep else 2.0 * wanted, rel=1e-6)


def test_settled_says_what_fit_reports():
    X = torch.from_numpy(data()[0])
    X = torch.cat([X, X[:5]])
    model = RFMRegressor(HALF, iterations=1, dtype="float64").fit(X, X[:, 0])
    assert model.kernel_ == settled(HALF, X)


@every
def test_a_weight_of_two_is_a_row_written_twice(make):
    X, y = data()
    weight = np.ones(len(X))
    weight[:9], weight[20:30] = 2.0, 0.0
    rows = np.concatenate([np.arange(20), np.arange(30, 40), np.arange(9)])
    weighted = make(MEDIAN, **SMALL[make]).fit(X, y, sample_weight=weight)
    assert weighted.kernel_ == make(MEDIAN, **SMALL[make]).fit(X[rows], y[rows]).kernel_


@pytest.mark.parametrize("make", [RFMRegressor, DeepRFMRegressor], ids=lambda make: make.__name__)
def test_one_row_and_equal_rows(make):
    for n in (1, 4):
        model = make(MEDIAN, **SMALL[make]).fit(np.ones((n, 2)), np.full(n, 3.0))
        assert model.kernel_ == Laplace(1.0)
        np.testing.assert_allclose(model.predict(np.ones((1, 2))), 3.0, rtol=1e-2)  # the ridge of 1e-3 shrinks it


@every
def test_saved_with_both(make, tmp_path):
    X, y = data()
    model = make(HALF, **SMALL[make]).fit(X, y)
    model.save(tmp_path / "model")
    for again in (fastagop.load(tmp_path / "model"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert (again.kernel, again.kernel_) == (HALF, model.kernel_)
        np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert clone(model).kernel == HALF
    assert not hasattr(clone(model), "kernel_")


@every
def test_searches(make):
    X, y = data()
    assert make(HALF).set_params(kernel__bandwidth="median").kernel == MEDIAN
    assert make(HALF).get_params()["kernel__bandwidth"] == ("median", 0.5)
    words = ["median", ("median", 0.5), 3.0]
    search = GridSearchCV(make(**SMALL[make], ridge=1e-2), {"kernel__bandwidth": words}, cv=2).fit(X, y)
    assert [found["kernel__bandwidth"] for found in search.cv_results_["params"]] == words
    best = search.best_params_["kernel__bandwidth"]
    assert best in words
    assert search.best_estimator_.kernel.bandwidth == best
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@every
def test_plans_need_no_number(make):
    X, y = data()
    plan = fastagop.explain(make(HALF, **SMALL[make]), X, y)
    number = fastagop.explain(make(Laplace(2.0), **SMALL[make]), X, y)
    assert plan.split("are free now")[0].rsplit(";", 1)[0] == number.split("are free now")[0].rsplit(";", 1)[0]
    blank = torch.empty(40, 4, device="meta")
    assert f"{make.__name__}.fit: 40 rows" in fastagop.explain(make(HALF, **SMALL[make]), blank, blank[:, 0])


@pytest.mark.parametrize("make", [DeepRFMClassifier, DeepRFMRegressor], ids=lambda make: make.__name__)
def test_networks(make):
    X, y = data()
    model = make(MEDIAN, **SMALL[make]).fit(X, y)
    answer = model.decision_function(X) if "Classifier" in make.__name__ else model.predict(X)
    np.testing.assert_allclose(model.to_module()(torch.from_numpy(X)).numpy(), answer, rtol=1e-9, atol=1e-9)


def test_checkpoints(tmp_path):
    """A fit resumes with the word, to the same bits; other words and other data are refused."""
    X, y = data()

    def fit(X=X, kernel=HALF, folder=tmp_path, **more):
        return DeepRFMClassifier(kernel, depth=3, width=16, random_state=0, checkpoint_dir=folder, **more).fit(X, y)

    def stop(event):
        if event.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(callbacks=[stop])
    layers = []
    resumed, whole = fit(callbacks=[lambda event: layers.append(event.layer)]), fit(folder=None)
    assert layers == [2]
    assert resumed.kernel_ == whole.kernel_
    np.testing.assert_array_equal(resumed.decision_function(X), whole.decision_function(X))
    with pytest.raises(ValueError, match=r"kernel was \"Laplace\(bandwidth=\('median', 0.5\)\)\", now .*2.0"):
        fit(kernel=Laplace(2.0))
    with pytest.raises(ValueError, match="kernel was"):
        fit(kernel=MEDIAN)
    with pytest.raises(ValueError, match="the data differ"):
        fit(X=X + np.eye(len(X), 4))


@singular
@parametrize_with_checks([RFMRegressor(MEDIAN, iterations=1), RFMClassifier(HALF, iterations=1)])
def test_scikit_learn(estimator, check):
    check(estimator)
