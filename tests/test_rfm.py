"""Recursive feature machines: scikit-learn's rules, the algorithm by automatic differentiation, and what it learns."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastagop
from fastagop import Gaussian, Laplace, Matern52, ProductLaplace, RFMClassifier, RFMRegressor
from fastagop.rfm import IterationEvent, IterationRecord
from fastagop.solvers.solution import Solution

# scikit-learn's checks feed duplicated, one-dimensional and constant data: singular on purpose.
singular = pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")


@singular
@parametrize_with_checks(
    [
        RFMClassifier(iterations=2),
        RFMRegressor(iterations=2),
        RFMClassifier(iterations=2, scale="standard", early_stopping=True, random_state=0),
        RFMRegressor(iterations=2, scale="standard", early_stopping=True, random_state=0),
    ]
)
def test_scikit_learn(estimator, check):
    if estimator.early_stopping and "sample_weight_equivalence" in getattr(check, "func", check).__name__:
        pytest.skip("a row that is written twice may be held out once, as in scikit-learn's own early stopping")
    check(estimator)


def multi_index(n, d=20, dtype=np.float32, seed=0):
    """(X, y, the plane that y depends on): a product of two directions of a Gaussian in d dimensions."""
    rng = np.random.default_rng(seed)
    X, plane = rng.normal(size=(n, d)), np.linalg.qr(np.random.default_rng(7).normal(size=(d, 2)))[0]
    return X.astype(dtype), (X @ plane).prod(1).astype(dtype), plane


def profile(kernel, r):
    """phi(r) by operations that automatic differentiation knows."""
    u = r / kernel.bandwidth
    if isinstance(kernel, Laplace):
        return torch.exp(-u)
    return torch.exp(-u.square() / 2) if isinstance(kernel, Gaussian) else (
        (1 + 5**0.5 * u + 5 / 3 * u.square()) * torch.exp(-(5**0.5) * u)
    )  # fmt: skip


def plain_rfm(X, Y, kernel, iterations, *, diagonal=False, center=False, scale="max", ridge=1e-3):
    """(M, coefficients, condition number) from the definition: k(||x - z||_M), its gradients by autograd."""
    n, d = X.shape
    M = torch.eye(d, dtype=torch.float64)

    def distance(z, centers):
        difference = centers - z
        return torch.einsum("ij,jk,ik->i", difference, M, difference).sqrt()

    def system():
        K = torch.eye(n, dtype=torch.float64)
        for i in range(n):
            other = torch.arange(n) != i
            K[i, other] = profile(kernel, distance(X[i], X[other]))
        return K + ridge * torch.eye(n, dtype=K.dtype)

    for _ in range(iterations):
        alpha, gradients = torch.linalg.solve(system(), Y), []
        for i in range(n):
            other = torch.arange(n) != i

            def f(z, other=other):
                return profile(kernel, distance(z, X[other])) @ alpha[other]  # noqa: B023

            gradients.append(torch.autograd.functional.jacobian(f, X[i]))
        g = torch.stack(gradients)
        g = g - g.mean(0) if center else g
        M = torch.einsum("icd,ice->de", g, g)
        M = M.diagonal().diag() if diagonal else M
        M = M / {"max": M.max(), "mean": n, "sum": 1.0}[scale]
    K = system()
    return M, torch.linalg.solve(K, Y), float(torch.linalg.cond(K))


@pytest.mark.parametrize(
    ("kernel", "parameters"),
    [
        (Laplace(3.0), {}),
        (Laplace(3.0), {"diagonal": True, "center": True}),
        (Gaussian(3.0), {"center": True}),
        (Matern52(3.0), {"agop_scale": "mean"}),  # no closed form of the weights: pairs are measured again
        (Gaussian(3.0), {"agop_scale": "sum", "diagonal": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ridge", [1e-2, 0.0])
def test_is_the_algorithm(kernel, parameters, ridge, relative):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(25, 4))
    Y = np.stack([X[:, 0] * X[:, 1], np.sin(X[:, 0]) + 0.1 * X[:, 3]], 1)
    names, parameters = [*parameters], {"dtype": "float64", "fit_intercept": False, **parameters}
    model = RFMRegressor(kernel, iterations=3, ridge=ridge, **parameters).fit(X, Y)
    plain = {"scale" if key == "agop_scale" else key: parameters[key] for key in parameters if key in names}
    M, alpha, condition = plain_rfm(torch.from_numpy(X), torch.from_numpy(Y), kernel, 3, ridge=ridge, **plain)
    assert model.M_.shape == ((4,) if model.diagonal else (4, 4))
    rounding = 64 * 2.0**-52 * condition
    assert relative(torch.from_numpy(np.diag(model.M_) if model.diagonal else model.M_), M) <= rounding
    assert relative(model.solution_.alpha, alpha) <= rounding
    half = torch.from_numpy(model.transform(X))
    difference = torch.from_numpy(X)[:, None] - torch.from_numpy(X)
    expected = torch.einsum("ijk,kl,ijl->ij", difference, M, difference)
    assert relative(torch.cdist(half, half, compute_mode="donot_use_mm_for_euclid_dist").square(), expected) <= rounding


def test_finds_the_directions_that_matter():
    X, y, plane = multi_index(800)
    Z, z, _ = multi_index(400, seed=1)
    plain, model = (RFMRegressor(iterations=count).fit(X, y) for count in (0, 4))
    assert np.array_equal(plain.M_, np.eye(20, dtype=np.float32))
    values, vectors = np.linalg.eigh(model.M_)
    overlap = np.linalg.svd(vectors[:, -2:].T @ plane)[1]  # cosines of the angles between the planes
    assert overlap.min() > 0.99
    assert values[-3] < 0.02 * values[-2]
    assert plain.score(Z, z) < 0.7
    assert model.score(Z, z) > 0.95


def test_finds_the_features_that_matter():
    X, _, _ = multi_index(600)
    y = np.where(X[:, 3] * X[:, 11] > 0, "same", "other")
    model = RFMClassifier(iterations=3, diagonal=True).fit(X[:400], y[:400])
    assert set(np.argsort(model.M_)[-2:]) == {3, 11}
    assert (
        model.score(X[400:], y[400:]) > RFMClassifier(iterations=0).fit(X[:400], y[:400]).score(X[400:], y[400:]) + 0.1
    )


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_equals_xrfm(iterations, diagonal, center, relative):
    """xRFM's own RFM with the same kernel, ridge and scale; it centres all outputs by one mean, so K = 1."""
    xrfm = pytest.importorskip("xrfm")
    kernels = pytest.importorskip("xrfm.rfm_src.kernels")
    X, y, _ = (torch.from_numpy(part) for part in multi_index(150, d=8, dtype=np.float64))
    theirs = xrfm.RFM(kernels.LaplaceKernel(10.0, 1.0), iters=iterations, device="cpu", diag=diagonal, verbose=False)
    options = {"reg": 1e-3, "center_grads": center, "return_best_params": False, "early_stop_rfm": False}
    theirs.fit((X, y[:, None]), (X, y[:, None]), **options)
    parameters = {"iterations": iterations, "diagonal": diagonal, "center": center, "dtype": "float64"}
    parameters["fit_intercept"] = False
    ours = RFMRegressor(Laplace(10.0), ridge=1e-3, **parameters).fit(X, y)
    # it adds 1e-8 to M's diagonal before the root (to an M whose largest entry is 1), and cdist loses half the digits
    assert relative(ours.M_, theirs.M) <= 1e-6
    assert relative(ours.predict(X[:50] + 0.1), theirs.predict(X[:50] + 0.1).squeeze(1)) <= 1e-6


def test_torch_in_torch_out():
    X, y, _ = multi_index(60, d=5)
    tensors = RFMRegressor(iterations=2).fit(torch.from_numpy(X), torch.from_numpy(y))
    arrays = RFMRegressor(iterations=2).fit(X, y)
    assert isinstance(tensors.M_, torch.Tensor)
    assert np.array_equal(tensors.M_.numpy(), arrays.M_)
    assert np.array_equal(tensors.predict(torch.from_numpy(X)).numpy(), arrays.predict(X))
    assert arrays.M_.dtype == arrays.predict(X).dtype == arrays.transform(X).dtype == np.float32
    columns = RFMRegressor(iterations=1).fit(X, np.stack([y, y], 1))
    assert columns.predict(X).shape == (60, 2)


def test_records_and_callbacks():
    X, y, _ = multi_index(60, d=5)
    seen = []
    model = RFMRegressor(iterations=3, agop_scale="mean", callbacks=[seen.append]).fit(X, y)
    assert [(event.iteration, event.iterations) for event in seen] == [(0, 3), (1, 3), (2, 3)]
    assert [event.record for event in seen] == model.iterations_
    assert [record.agop_scale for record in model.iterations_] == [60.0] * 3
    assert np.array_equal(seen[-1].M, model.M_)
    assert RFMRegressor(iterations=2).fit(X, y).M_.max() == 1.0


@pytest.mark.parametrize("diagonal", [False, True])
def test_units_do_not_matter(diagonal, relative):
    """Ordinary float32 numbers whose squares are none."""
    X, y, _ = multi_index(60, d=5)
    far = RFMRegressor(Laplace(1e26), iterations=2, diagonal=diagonal, ridge=0.1).fit(X * np.float32(1e25), y)
    near = RFMRegressor(Laplace(10.0), iterations=2, diagonal=diagonal, ridge=0.1).fit(X, y)
    # M is the same number; the distances it makes carry the unit
    assert relative(torch.from_numpy(far.M_), torch.from_numpy(near.M_)) <= 1e-4
    assert far.score(X * np.float32(1e25), y) == pytest.approx(near.score(X, y), abs=1e-4)


def test_more_features_than_points():
    X, y, _ = multi_index(15, d=40, dtype=np.float64)
    model = RFMRegressor(iterations=3, dtype="float64").fit(X, y)
    assert np.linalg.matrix_rank(model.M_) <= 15
    assert np.isfinite(model.predict(X + 1.0)).all()


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_constant_predictor_leaves_the_metric_alone(diagonal):
    X, _, _ = multi_index(30, d=4)
    model = RFMRegressor(iterations=3, diagonal=diagonal).fit(X, np.zeros(30))
    assert np.array_equal(model.M_, np.ones(4) if diagonal else np.eye(4))
    assert not model.predict(X).any()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"diagonal": True, "kernel": fastagop.GeneralisedLaplace(8.0, 1.3), "dtype": "float64"},
        {"iterations": 0, "device": torch.device("cpu")},
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_saved_and_loaded(tmp_path, parameters, kind):
    X, y, _ = multi_index(60, d=5)
    y = np.array(["down", "up"])[(y > 0).astype(int)]
    data = (X, y) if kind == "numpy" else (torch.from_numpy(X), y)
    model = RFMClassifier(**{"iterations": 2, **parameters}).fit(*data)
    model.save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert type(again) is RFMClassifier
    assert type(again.M_) is type(model.M_)
    assert np.array_equal(again.M_, model.M_)
    assert np.array_equal(again.decision_function(X), model.decision_function(X))
    assert np.array_equal(again.predict(X), model.predict(X))
    assert again.get_params() == {**model.get_params(), "device": str(model.device)}
    for a, b in zip(again.iterations_, model.iterations_, strict=True):
        assert (a.agop_scale, a.seconds, a.solution.residual) == (b.agop_scale, b.seconds, b.solution.residual)
        assert torch.equal(a.solution.alpha, b.solution.alpha)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))
    assert np.array_equal(clone(again).fit(*data).M_, model.M_)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", -1),
        ("iterations", True),
        ("iterations", 1.5),
        ("diagonal", 1),
        ("center", "yes"),
        ("kernel", "laplace"),
        ("ridge", -1.0),
        ("agop_scale", "trace"),
        ("precision", "low"),
        ("dtype", "float16"),
        ("device", "nowhere"),
        ("backend", "cuda"),
    ],
)
def test_bad_parameters_are_named(name, value):
    X, y, _ = multi_index(20, d=3)
    with pytest.raises((ValueError, TypeError), match=name):
        RFMRegressor(**{name: value}).fit(X, y)


def test_centers_are_not_the_callers(normal):
    X = normal(20, 3)
    model = RFMRegressor(iterations=0, dtype="float64").fit(X, X[:, 0].clone())
    Z = normal(2, 3, seed=2)
    before = model.predict(Z)
    X += 1
    assert torch.equal(model.predict(Z), before)


def test_records_in_words():
    solution = Solution(torch.zeros(4, 2, dtype=torch.float64), 1e-12, 0.0, 0.0, "cholesky", torch.float64, 0, 4, 0.5)
    record = IterationRecord(solution, 3.0, 1.5)
    assert repr(record) == f"IterationRecord(agop_scale 3, 1.5 s, {solution})"
    event = IterationEvent(0, 2, record, torch.zeros(3))
    assert repr(event) == f"IterationEvent(iteration 0 of 2, M 3, {record})"


@pytest.mark.parametrize("where", ["spread", "offset", "units", "more features than rows"])
@pytest.mark.parametrize(
    "parameters",
    [{}, {"diagonal": True}, {"iterations": 0}, {"scale": "standard"}, {"kernel": ProductLaplace("median")}],
    ids=str,
)
@pytest.mark.parametrize("given", [np.float32, np.float64])
def test_gradients_at_training_rows_of_a_float32_fit(where, parameters, given):
    """A center is its row rounded to float32, and its kink would add a vector of any direction."""
    n, d = (40, 90) if where == "more features than rows" else (150, 8)
    X = np.random.default_rng(0).normal(size=(n, d)) + (1e3 if where == "offset" else 0.0)
    X = (X * np.logspace(-1, 1, d) if where == "units" else X).astype(given)
    y = (X - X.mean(0))[:, 1] * (X - X.mean(0))[:, 2]
    options = {"kernel": Laplace("median"), "iterations": 2, "device": "cpu"} | parameters
    found, exact = (
        RFMRegressor(dtype=dtype, **options).fit(X, y / y.std()).gradients(X) for dtype in ("float32", "float64")
    )
    rotated = "kernel" in parameters and d > n  # where features of the metric meet in many pairs, each a kink
    assert np.linalg.norm(found - exact) <= (0.1 if rotated else 1e-4) * np.linalg.norm(exact)
