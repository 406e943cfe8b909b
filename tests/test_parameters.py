"""Parameters as scikit-learn wants them: kernels inside estimators, names in errors, dtypes, what is saved of them."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import torch
from fastagop.kernels import backends
from kernel_cases import CASES, one_of_each_class
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fastagop
from fastagop import (
    BackendUnavailable,
    ConjugateGradients,
    DeepRFMClassifier,
    DeepRFMRegressor,
    Gaussian,
    GeneralisedLaplace,
    Laplace,
    RFMClassifier,
    RFMRegressor,
)
from fastagop.estimators import MODULES

KERNELS = [case.kernel for case in one_of_each_class(CASES)]
SMALL = {
    RFMClassifier: {"iterations": 1},
    RFMRegressor: {"iterations": 1},
    DeepRFMClassifier: {"depth": 1, "width": 16, "random_state": 0},
    DeepRFMRegressor: {"depth": 1, "width": 16, "random_state": 0},
}
every = pytest.mark.parametrize("make", SMALL, ids=lambda make: make.__name__)


def data(n=40, d=4):
    X = np.random.default_rng(0).normal(size=(n, d))
    return X, (X[:, 0] * X[:, 1] > 0).astype(int)


class Products:
    """A backend for products only, which says so."""

    name = "products"
    operations = ("kernel_matrix", "kernel_matmul")

    def refusal(self, request):
        return None if request.operation in self.operations else "it stores no factor"


@every
def test_a_backend_says_itself_why_it_cannot_fit(make, monkeypatch):
    monkeypatch.setitem(backends._TABLE, ("products", "radial"), Products())
    for backend, reason in (
        ("products", "backend 'products' cannot serve solve: it stores no factor; use backend='torch' or 'auto'"),
        ("keops", "backend 'keops' cannot serve kernel_matrix: it would store the kernel matrix and KeOps never does;"),
    ):
        with pytest.raises(BackendUnavailable, match=reason):
            make(Laplace(2.0), backend=backend, **SMALL[make]).fit(*data())
    with pytest.raises(ValueError, match=r"^backend must be one of 'auto', .*, got 'nobody'"):
        make(Laplace(2.0), backend="nobody", **SMALL[make]).fit(*data())


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_kernels_answer_with_copies(kernel):
    before, text, number = kernel.get_params(deep=True), repr(kernel), hash(kernel)
    changed = kernel.set_params(bandwidth=7)
    assert changed == type(kernel)(**{**before, "bandwidth": 7.0})
    assert type(changed.bandwidth) is float
    assert (kernel.get_params(), repr(kernel), hash(kernel)) == (before, text, number)
    assert kernel.set_params() == kernel
    assert clone(kernel) is kernel
    with pytest.raises(ValueError, match=r"Invalid parameter 'width' for .*Valid parameters are: \['bandwidth'"):
        kernel.set_params(width=1.0)
    with pytest.raises(ValueError, match="bandwidth must be a positive"):
        kernel.set_params(bandwidth=-1.0)


def test_every_parameter_of_a_kernel():
    kernel = GeneralisedLaplace(2.0, 0.7)
    assert kernel.get_params() == {"bandwidth": 2.0, "exponent": 0.7}
    assert kernel.set_params(exponent=1.5) == GeneralisedLaplace(2.0, 1.5)


@every
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_nested_parameters(make, kernel):
    shared = inspect.signature(make).parameters["kernel"].default
    model = make(kernel)
    assert model.get_params()["kernel__bandwidth"] == kernel.bandwidth
    assert model.set_params(kernel__bandwidth=np.float64(9.0)) is model
    assert model.kernel == kernel.set_params(bandwidth=9.0)
    assert make().set_params(kernel__bandwidth=5.0).kernel.bandwidth == 5.0
    assert make().kernel == shared  # what others have by default is untouched
    assert clone(model).kernel == model.kernel
    assert model.set_params(kernel__bandwidth=3.0, kernel=Gaussian(1.0), ridge=0.5).kernel == Gaussian(3.0)
    assert model.ridge == 0.5
    with pytest.raises(ValueError, match=r"Invalid parameter 'width'.*\['bandwidth'\]"):
        model.set_params(kernel__width=1.0, ridge=0.1)
    assert model.ridge == 0.5
    with pytest.raises(ValueError, match="Invalid parameter 'kern'"):
        model.set_params(kern__bandwidth=1.0)
    with pytest.raises(TypeError, match="kernel must be a fastagop kernel"):
        make("laplace").set_params(kernel__bandwidth=1.0)


@pytest.mark.parametrize("name", MODULES)
def test_nested_parameters_of_every_estimator(name):
    """Searches and trees, too: a model selection over them would try the same kernel again and again."""
    make = getattr(fastagop, name)
    model, shared = make(), inspect.signature(make).parameters["kernel"].default
    assert model.set_params(kernel__bandwidth=5.0).kernel == shared.set_params(bandwidth=5.0)
    assert make().kernel == shared


SMALL_TREE = {"leaf_size": 20, "iterations": 1, "random_state": 0, "ridge": 0.5}
SMALL_SEARCH = {"n_settings": 1, "cv": 2, "iterations": 1, "random_state": 0}


@pytest.mark.parametrize(
    ("base", "fixed"),
    [
        *SMALL.items(),
        (fastagop.RFMTreeClassifier, SMALL_TREE),
        (fastagop.RFMTreeRegressor, SMALL_TREE),
        (fastagop.RFMClassifierCV, SMALL_SEARCH),
        (fastagop.RFMRegressorCV, SMALL_SEARCH),
    ],
)
def test_subclasses_with_parameters_of_their_own(base, fixed):
    """As scikit-learn's estimators have them: the constructor fixes some parameters of the base and adds others."""

    class Mine(base):
        def __init__(self, bandwidth=3.0, note=None):
            super().__init__(kernel=Laplace(bandwidth), **fixed)
            self.bandwidth, self.note = bandwidth, note

    X, y = data()
    mine = clone(Mine(2.0, note="kept")).fit(X, y)
    assert mine.get_params() == {"bandwidth": 2.0, "note": "kept"}
    np.testing.assert_array_equal(mine.predict(X), base(kernel=Laplace(2.0), **fixed).fit(X, y).predict(X))
    assert len(cross_val_score(mine, X, y, cv=2, error_score="raise")) == 2


@pytest.mark.parametrize("n", [40, 3])  # 3 points have a span
def test_a_dtype_set_after_fit_is_that_of_the_next_fit(n, tmp_path):
    """Rows of float32 fits are known by what float32 rounds to, or the kernel's kink adds a vector to gradients."""
    X, y = data(n)
    model = RFMRegressor(Laplace(3.0), iterations=1).fit(X, y)
    gradients, metric = model.gradients(X), model.M_
    model.set_params(dtype="float64").save(tmp_path / "model")
    for later in (model, fastagop.load(tmp_path / "model")):
        np.testing.assert_array_equal(later.gradients(X), gradients)
        assert later.M_.dtype == metric.dtype == np.float32
    assert model.fit(X, y).M_.dtype == np.float64


@pytest.mark.parametrize("fitted", [True, False])
def test_a_metric_of_the_identity_keeps_its_shape(fitted, tmp_path):
    """No number of M = I tells whether it is a diagonal; ``diagonal`` may be set for the next fit."""
    X, y = data()
    model = RFMRegressor(iterations=0, diagonal=fitted).fit(X, y)
    shape = (4,) if fitted else (4, 4)
    model.set_params(diagonal=not fitted).save(tmp_path / "model")
    for later in (model, fastagop.load(tmp_path / "model")):
        assert later.M_.shape == shape
    assert model.fit(X, y).M_.shape != shape


@pytest.mark.parametrize("make", [RFMClassifier, RFMRegressor])
def test_flags_of_numpy_as_grids_of_arrays_have_them(make, tmp_path):
    X, y = data()
    grid = {"diagonal": np.array([True, False]), "center": np.array([True]), "early_stopping": np.array([False])}
    search = GridSearchCV(make(iterations=1), grid, cv=2, error_score="raise").fit(X, y)
    by_hand = make(iterations=1, diagonal=bool(search.best_params_["diagonal"]), center=True).fit(X, y)
    np.testing.assert_array_equal(search.predict(X), by_hand.predict(X))
    search.best_estimator_.save(tmp_path / "model")
    np.testing.assert_array_equal(fastagop.load(tmp_path / "model").predict(X), by_hand.predict(X))


@every
def test_nested_parameters_in_searches(make):
    X, y = data()
    grid = {"kernel__bandwidth": [1.0, 4.0], "ridge": [1e-2]}
    search = GridSearchCV(make(**SMALL[make]), grid, cv=2).fit(X, y)
    assert search.best_estimator_.kernel.bandwidth == search.best_params_["kernel__bandwidth"]
    scores = search.cv_results_["mean_test_score"]
    by_hand = [cross_val_score(make(type(make().kernel)(L), ridge=1e-2, **SMALL[make]), X, y, cv=2) for L in (1.0, 4.0)]
    np.testing.assert_array_equal(scores, np.mean(by_hand, axis=1))
    pipe = make_pipeline(StandardScaler(), make(**SMALL[make]))
    name = f"{make.__name__.lower()}__kernel__bandwidth"
    assert pipe.set_params(**{name: 2.5}).fit(X, y)[-1].kernel.bandwidth == 2.5
    assert GridSearchCV(pipe, {name: [1.0, 2.0]}, cv=2).fit(X, y).best_params_[name] in (1.0, 2.0)


@every
def test_unknown_arguments_name_the_class(make):
    with pytest.raises(TypeError, match=rf"{make.__name__}.__init__\(\) got an unexpected keyword argument 'bandwith'"):
        make(bandwith=1.0)
    with pytest.raises(ValueError, match=f"Invalid parameter 'bandwith' for estimator {make.__name__}"):
        make().set_params(bandwith=1.0)


@every
def test_order_of_arguments(make):
    """What was there first stays where it was; only classifiers know class_weight."""
    names = list(inspect.signature(make).parameters)
    assert names[0] == "kernel"
    assert names[names.index("process_group") + 1 :][:2] == ["solver", "memory_limit"]
    assert ("class_weight" in names) == ("Classifier" in make.__name__)


@every
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("callbacks", None),
        ("callbacks", "print"),
        ("callbacks", [3]),
        ("verbose", -1),
        ("verbose", 0.5),
        ("verbose", "yes"),
        ("dtype", "float16"),
        ("dtype", torch.float16),
        ("dtype", np.int64),
        ("dtype", None),
        ("device", "meta"),
        ("device", "nowhere"),
        ("device", 1.5),
        ("process_group", "gloo"),
        ("solver", "lu"),
        ("solver", None),
        ("memory_limit", -1),
        ("memory_limit", "1 GB"),
        ("random_state", "seven"),
        ("random_state", -1),
        ("kernel", Laplace),
        ("agop_scale", np.array(["max", "mean"])),
        ("scale", np.array(["standard", "none"])),
    ],
)
def test_bad_parameters_are_named_before_any_work(make, name, value, monkeypatch):
    X, y = data()
    if name not in make().get_params():
        pytest.skip("not a parameter of this one")
    monkeypatch.setattr("fastagop.estimators.inputs.matrix", None)  # nothing of the data is looked at
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name.replace("process_", "process ?_?")):
        make(**{**SMALL[make], name: value}).fit(X, y)


@every
@pytest.mark.parametrize("dtype", [torch.float64, np.float64, np.dtype("float64"), "float64"], ids=repr)
def test_dtypes_by_any_name(make, dtype, tmp_path):
    X, y = data()
    model = make(dtype=dtype, **SMALL[make]).fit(X, y)
    named = make(dtype="float64", **SMALL[make]).fit(X, y)
    np.testing.assert_array_equal(model.predict(X), named.predict(X))
    assert clone(model).dtype == dtype
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(fastagop.load(tmp_path / "model").predict(X), model.predict(X))


@every
def test_parameters_are_saved(make, tmp_path):
    X, y = data()
    model = make(solver=ConjugateGradients(tolerance=1e-9), memory_limit=1e9, **SMALL[make])
    if hasattr(model, "class_weight"):
        model.set_params(class_weight={0: 2.0, np.int64(1): 1.0})
    model.fit(X, y).save(tmp_path / "model")
    assert fastagop.load(tmp_path / "model").get_params() == model.get_params()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


@every
@pytest.mark.parametrize("solver", ["auto", "cholesky", "eigh", "cg", ConjugateGradients(tolerance=1e-12)], ids=repr)
def test_solvers(make, solver):
    """Each one's predictions are those of the others."""
    X, y = data()
    settings = {**SMALL[make], "ridge": 1e-2, "dtype": "float64"}
    model, plain = make(solver=solver, **settings).fit(X, y), make(**settings).fit(X, y)
    method = solver if isinstance(solver, str) else "cg"
    assert model.solution_.method.startswith("cholesky" if method == "auto" else method)
    tolerance = 1e-4 if method == "cg" else 1e-9
    np.testing.assert_allclose(model.transform(X), plain.transform(X), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_an_infinite_memory_limit_is_none(name):
    few = {
        "iterations": 1,
        "n_settings": 1,
        "cv": 2,
        "depth": 1,
        "width": 8,
        "leaf_size": 550,
        "ridge": 0.1,
        "random_state": 0,
    }
    make, (X, y) = getattr(fastagop, name), data(600)
    few = {key: value for key, value in few.items() if key in make().get_params()}
    predicted = [make(memory_limit=limit, **few).fit(X, y).predict(X[:9]) for limit in (None, float("inf"))]
    np.testing.assert_array_equal(*predicted)
    assert fastagop.explain(make(memory_limit=float("inf"), **few), X, y)


@every
def test_advice_of_a_memory_error_can_be_followed(make):
    X, y = data(200)
    with pytest.raises(MemoryError, match="solver='cg'") as caught:
        make(solver="cholesky", memory_limit=100_000, ridge=0.1, **SMALL[make]).fit(X, y)
    assert "memory_limit" in str(caught.value)
    model = make(solver="cg", memory_limit=10_000_000, ridge=0.1, **SMALL[make]).fit(X, y)
    assert model.solution_.method == "cg"
    assert model.score(X, y) > 0.5


def test_html_and_text():
    model = RFMRegressor(Laplace(3.0), dtype=torch.float64)
    assert repr(model) == "RFMRegressor(dtype=torch.float64, kernel=Laplace(bandwidth=3.0))"
    assert "Laplace" in model._repr_html_()
