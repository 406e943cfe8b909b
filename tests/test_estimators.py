"""Deep RFM as estimators: scikit-learn's rules, the contract, and the algorithm itself written out plainly."""

import dataclasses

import numpy as np
import pytest
import torch
from fastagop.kernels import reference
from kernel_cases import CASES, one_of_each_class
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, Laplace
from fastagop.deep_rfm import layer as deep
from fastagop.deep_rfm.random_features import FeatureMap
from fastagop.solvers.solution import Solution

SMALL = {"depth": 2, "width": 64, "random_state": 0}
# scikit-learn's checks feed duplicated, one-dimensional and constant data: singular on purpose.
singular = pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")
SOLUTION = Solution(torch.zeros(4, 2, dtype=torch.float64), 1e-12, 0.0, 0.0, "cholesky", torch.float64, 0, 4, 0.5)
RECORD = deep.LayerRecord({"projected": 0.25}, {}, SOLUTION, 3.0, 1.5, {}, 7)


@singular
@parametrize_with_checks([DeepRFMClassifier(**SMALL), DeepRFMRegressor(**SMALL)])
def test_scikit_learn(estimator, check):
    check(estimator)


def blobs(n=90, d=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return 3 * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d)), y


def plain_deep_rfm(X, Y, kernel, maps):
    """Algorithm 1 with dense float64 algebra and the reference AGOP, M divided by its largest entry."""
    X = torch.from_numpy(X)
    for phi in maps:
        X = X / X.norm(dim=1, keepdim=True)
        alpha = torch.linalg.solve(reference.kernel_matrix(kernel, X), Y)
        M = reference.agop(kernel, X, alpha)
        values, vectors = torch.linalg.eigh(M / M.max())
        X = phi(X @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T)
    X = X / X.norm(dim=1, keepdim=True)
    K = reference.kernel_matrix(kernel, X)
    return X, K, torch.linalg.solve(K, Y)


# Matern52 has no closed form of the weight in the value: a layer measures its pairs a second time
@pytest.mark.parametrize("kernel", [case.at(1.0).kernel for case in one_of_each_class(CASES)], ids=repr)
@pytest.mark.parametrize("features", ["relu", "cos"])
def test_equals_algorithm_one(kernel, features):
    X, y = blobs()
    scale = None if features == "relu" else 0.5
    model = DeepRFMClassifier(kernel, features=features, feature_scale=scale, dtype="float64", **SMALL).fit(X, y)
    Y = torch.from_numpy(2.0 * np.eye(3)[y] - 1.0)
    features, _, alpha = plain_deep_rfm(X, Y, kernel, [layer.map for layer in model._layers])
    # The solution's error is eps times the kernel matrix's condition number, at most about 1e6 on these blobs.
    close = {"rtol": 1e-6, "atol": 1e-7}
    normal = model.transform(X) / np.linalg.norm(model.transform(X), axis=1, keepdims=True)
    torch.testing.assert_close(torch.from_numpy(normal), features, **close)
    torch.testing.assert_close(model.solution_.alpha, alpha, rtol=1e-5, atol=1e-5 * float(alpha.abs().max()))
    torch.testing.assert_close(torch.from_numpy(model.decision_function(X)), Y, **close)


def test_classifier_contract():
    X, y = blobs()
    names = np.array(["ant", "bee", "cat"])[y]
    model = DeepRFMClassifier(**SMALL).fit(X, names)
    assert model.score(X, names) == 1.0
    assert set(model.predict(X)) == {"ant", "bee", "cat"}
    assert model.decision_function(X).shape == (90, 3)
    assert [M.shape for M in model.agops_] == [(6, 6), (64, 64)]
    assert [M.dtype for M in model.agops_] == [np.float32] * 2
    assert all(M.max() == pytest.approx(1.0) for M in model.agops_)
    assert [a.shape for a in model.alphas_] == [(90, 3)] * 2
    for record in model.layers_:
        assert set(record.nc1) == set(record.nc2) == {"input", "projected", "features"}
        assert record.seconds > 0
        assert record.peak_bytes > 0
        assert record.solution.residual < 1e-3


def test_records_measure_what_they_say():
    X, y = blobs()
    seen = []
    model = DeepRFMClassifier(callbacks=[seen.append], dtype="float64", **SMALL).fit(X, y)
    for index, event in enumerate(seen):
        assert (event.layer, event.depth) == (index, 2)
        assert model.layers_[index] is event.record
    inputs = torch.from_numpy(model.transform(X, layer=1))
    inputs = inputs / inputs.norm(dim=1, keepdim=True)
    assert model.layers_[1].nc1["input"] == pytest.approx(fastagop.collapse.nc1(inputs, y), rel=1e-9)
    root = torch.linalg.matrix_power(model._layers[1].root, 2)
    torch.testing.assert_close(root, torch.from_numpy(model.agops_[1]), rtol=1e-9, atol=1e-9)
    assert model.layers_[1].nc1["projected"] == pytest.approx(
        fastagop.collapse.nc1(inputs @ model._layers[1].root, y), rel=1e-6
    )


def test_collapse_deepens():
    """The paper's claim, in small: NC1 of the projected data falls from layer to layer."""
    X, y = blobs(n=120)
    model = DeepRFMClassifier(depth=5, width=128, random_state=0, dtype="float64").fit(X, y)
    nc1 = [record.nc1["projected"] for record in model.layers_]
    assert nc1 == sorted(nc1, reverse=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_seed_same_result(dtype):
    X, y = blobs()
    first, second = (DeepRFMClassifier(dtype=dtype, **SMALL).fit(X, y) for _ in range(2))
    other = DeepRFMClassifier(**{**SMALL, "random_state": 1}, dtype=dtype).fit(X, y)
    assert np.array_equal(first.transform(X), second.transform(X))
    assert not np.array_equal(first.transform(X), other.transform(X))


def test_torch_in_torch_out():
    X, y = blobs()
    tensors = torch.from_numpy(X).float(), torch.from_numpy(y)
    model = DeepRFMClassifier(**SMALL).fit(*tensors)
    arrays = DeepRFMClassifier(**SMALL).fit(X.astype(np.float32), y)
    for name in ("predict", "decision_function", "transform"):
        ours, theirs = getattr(model, name)(tensors[0]), getattr(arrays, name)(X.astype(np.float32))
        assert isinstance(ours, torch.Tensor)
        assert isinstance(theirs, np.ndarray)
        assert np.array_equal(ours.numpy(), theirs)
    assert isinstance(model.agops_[0], torch.Tensor)
    assert model.score(*tensors) == 1.0


def test_regressor_shapes_and_interpolation():
    X, _ = blobs()
    Y = np.stack([X[:, 0], X[:, 1] ** 2], 1)
    model = DeepRFMRegressor(dtype="float64", **SMALL).fit(X, Y)
    np.testing.assert_allclose(model.predict(X), Y, rtol=1e-6, atol=1e-6)
    flat = DeepRFMRegressor(dtype="float64", **SMALL).fit(X, Y[:, 0])
    assert flat.predict(X).shape == (90,)
    assert flat.layers_[0].nc1 == {}
    assert flat.score(X, Y[:, 0]) == pytest.approx(1.0)


def test_agop_scale_changes_cosines_only():
    X, y = blobs()
    relu = [DeepRFMClassifier(agop_scale=s, dtype="float64", **SMALL).fit(X, y) for s in ("max", "mean", "sum")]
    for model in relu[1:]:
        np.testing.assert_allclose(model.decision_function(X), relu[0].decision_function(X), rtol=1e-6, atol=1e-8)
    scales = [model.layers_[0].agop_scale for model in relu]
    assert scales[1] == 90
    assert scales[2] == 1
    cos = [
        DeepRFMClassifier(agop_scale=s, features="cos", feature_scale=0.5, dtype="float64", **SMALL).fit(X, y)
        for s in ("max", "sum")
    ]
    assert not np.allclose(cos[0].transform(X), cos[1].transform(X))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("kernel", "laplace"),
        ("depth", 0),
        ("depth", 2.5),
        ("width", True),
        ("features", "tanh"),
        ("feature_scale", 0.1),  # means nothing with relu
        ("ridge", -1.0),
        ("agop_scale", "trace"),
        ("precision", "low"),
        ("dtype", "float16"),
        ("backend", "cuda"),
    ],
)
def test_bad_parameters_are_named(parameter, value):
    X, y = blobs()
    with pytest.raises((ValueError, TypeError), match=parameter):
        DeepRFMClassifier(**{**SMALL, parameter: value}).fit(X, y)


def test_bad_data():
    X, y = blobs()
    with pytest.raises(ValueError, match="two classes"):
        DeepRFMClassifier(**SMALL).fit(X, np.zeros(90, int))
    with pytest.raises(ValueError, match="NaN"):
        DeepRFMClassifier(**SMALL).fit(torch.full((4, 2), float("nan")), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="one row per row"):
        DeepRFMClassifier(**SMALL).fit(X, y[:-1])
    model = DeepRFMClassifier(**SMALL).fit(X, y)
    with pytest.raises(ValueError, match="features"):
        model.predict(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="layer"):
        model.transform(X, layer=3)


def test_altered_solves_are_reported():
    """Contradicting labels on points that nothing tells apart cannot be met: the fit warns and stays finite."""
    X, y = blobs()
    X[1] = X[0] * (1 + 1e-14 * np.arange(len(X[0])))  # more than rounding apart
    with pytest.warns(fastagop.NumericalWarning, match="jitter"):
        model = DeepRFMClassifier(dtype="float64", **SMALL).fit(X, y)
    assert model.layers_[0].solution.jitter > 0
    assert np.isfinite(model.decision_function(X)).all()


@pytest.mark.parametrize("features", ["relu", "cos"])
@pytest.mark.parametrize("classes", [2, 3])
def test_to_module(features, classes):
    X, y = blobs(classes=classes)
    scale = None if features == "relu" else 0.5
    model = DeepRFMClassifier(features=features, feature_scale=scale, **SMALL).fit(X, y)
    module = model.to_module()
    Z = torch.from_numpy(blobs(seed=1)[0])
    expected = torch.from_numpy(model.decision_function(Z.numpy()))
    torch.testing.assert_close(module(Z), expected, rtol=1e-9, atol=1e-9)
    fresh = DeepRFMClassifier(features=features, feature_scale=scale, **{**SMALL, "random_state": 5}).fit(X, y)
    other = fresh.to_module()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(Z), module(Z))
    exported = torch.export.export(module, (Z,))
    torch.testing.assert_close(exported.module()(Z), expected, rtol=1e-9, atol=1e-9)


def test_to_module_of_a_regressor():
    X, _ = blobs()
    for y in (X[:, 0], X[:, :2]):
        model = DeepRFMRegressor(dtype="float64", **SMALL).fit(X, y)
        np.testing.assert_allclose(model.to_module()(torch.from_numpy(X)).numpy(), model.predict(X), atol=1e-9)


def test_module_has_gradients_and_refuses_to_round():
    X, _ = blobs()
    module = DeepRFMRegressor(dtype="float64", **SMALL).fit(X, X[:, 0]).to_module()
    Z = torch.from_numpy(X[:3] + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(module, (Z,))
    whole = torch.ones(2, X.shape[1], dtype=torch.long)
    torch.testing.assert_close(module(whole), module(whole.double()))


@pytest.mark.parametrize("exponent", [-100, 66])  # squares of such rows leave float32
def test_the_size_of_rows_does_not_matter(exponent):
    X, y = blobs()
    X = torch.from_numpy(X).float()
    models = [DeepRFMClassifier(**SMALL).fit(scaled, y) for scaled in (X, X * 2.0**exponent)]
    for layer in range(1, SMALL["depth"] + 1):
        assert torch.equal(models[0].transform(X, layer), models[1].transform(X * 2.0**exponent, layer))


@pytest.mark.parametrize("exponent", [-90, 90])
def test_the_size_of_targets_does_not_matter(exponent):
    """Up to a power of two, that is, and where M is scaled by its largest entry."""
    X, _ = blobs()
    y = X[:, 0].astype(np.float32)
    for make in (lambda: DeepRFMRegressor(**SMALL), lambda: fastagop.RFMRegressor(iterations=2)):
        plain, scaled = make().fit(X, y), make().fit(X, y * np.float32(2.0**exponent))
        np.testing.assert_allclose(scaled.predict(X) / 2.0**exponent, plain.predict(X), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="y is so large that the AGOP"):
        DeepRFMRegressor(dtype="float64", **SMALL).fit(X, X[:, 0] * 1e200)
    with pytest.raises(ValueError, match="y is so small, or X so large"):
        DeepRFMRegressor(dtype="float64", **SMALL).fit(X, X[:, 0] * 1e-160)


@pytest.mark.parametrize(("points", "targets"), [(1e170, 1e170), (1e-170, 1e-170), (1e145, 1.0), (1e155, 1e140)])
def test_units_of_points_and_targets_do_not_matter_in_float64(points, targets):
    X, _ = blobs()
    y = X[:, 0] * X[:, 1]
    fit = fastagop.RFMRegressor(fastagop.Laplace(3.0), iterations=2, dtype="float64").fit(X, y)
    kernel = fastagop.Laplace(3.0 * points)
    other = fastagop.RFMRegressor(kernel, iterations=2, dtype="float64").fit(X * points, y * targets)
    np.testing.assert_allclose(other.M_, fit.M_, rtol=1e-9, atol=1e-12)


def test_the_size_of_weights_does_not_matter_in_float32():
    """Beyond float32 y was refused for them; below it they were lost, and M stayed the identity without a word."""
    X, _ = blobs()
    y, weights = X[:, 0] * X[:, 1], np.linspace(1.0, 2.0, len(X))
    for size in (1e-200, 1e300):
        fit, other = (
            fastagop.RFMRegressor(iterations=2, ridge=0.0).fit(X, y, sample_weight=weights * unit)
            for unit in (1.0, size)
        )
        np.testing.assert_allclose(other.M_, fit.M_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("points", "targets"), [(1e160, 1.0), (1e200, 1.0), (1.0, 1e-160), (1.0, 1e-300)])
def test_squares_of_gradients_below_float64_are_refused(points, targets):
    """They were lost, and M stayed the identity without a word."""
    X, _ = blobs()
    y = X[:, 0] * X[:, 1]
    model = fastagop.RFMRegressor(fastagop.Laplace(3.0 * points), iterations=2, dtype="float64")
    with pytest.raises(ValueError, match="y is so small, or X so large"):
        model.fit(X * points, y * targets)


# ---- layers


def test_records_of_layers_in_words():
    assert repr(RECORD) == f"LayerRecord(NC1 2.5e-01, agop_scale 3, 1.5 s, {SOLUTION})"
    plain = dataclasses.replace(RECORD, nc1={})
    assert repr(plain) == f"LayerRecord(agop_scale 3, 1.5 s, {SOLUTION})"
    event = deep.LayerEvent(1, 5, plain, torch.zeros(4, 3), torch.zeros(4, 8), None)
    assert repr(event) == f"LayerEvent(layer 1 of 5, projected 4 x 3, features 4 x 8, {plain})"


def test_layers_in_words():
    cos = FeatureMap("cos", torch.zeros(8, 3), torch.zeros(8))
    layer = deep.Layer(torch.eye(3), torch.eye(3), cos, RECORD)
    assert repr(layer) == f"Layer(agop 3 x 3, cos features 8, {RECORD})"
    assert repr(layer.copy()) == "Layer(agop 3 x 3, cos features 8)"
    assert layer.copy().bias is not layer.bias
    relu = deep.Layer(torch.eye(3), torch.eye(3), FeatureMap("relu", torch.zeros(8, 3)))
    assert repr(relu) == "Layer(agop 3 x 3, relu features 8)"
    assert relu.copy().bias is None


def test_a_seed_for_each_layer():
    drawn = deep.seeds(np.random.RandomState(3), 4)
    assert drawn == np.random.RandomState(3).randint(0, 2**31 - 1, size=4).tolist()
    assert all(type(seed) is int for seed in drawn)


def test_a_layer_leaves_the_users_peak_of_memory_alone(monkeypatch):
    """(in use, at most so far) before; what was most after; what the layer says that it took, planned with 50."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: pytest.fail("the user's statistics"))
    assert deep._peak(deep._allocated(torch.device("cpu")), torch.device("cpu"), 50) == 50
    for in_use, before, after, taken in ((10, 30, 90, 80), (10, 90, 90, 50), (70, 90, 90, 20)):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, count=in_use: count)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, count=before: count)
        found = deep._allocated(cuda)
        assert found == (in_use, before)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, count=after: count)
        assert deep._peak(found, cuda, 50) == taken


def test_stages_of_a_layer_add_up_to_its_seconds(normal):
    X, Y = normal(30, 3), normal(30, 2)
    settings = deep.Settings(kernel=Laplace(2.0), depth=1, features="relu", width=8, ridge=1e-3)
    classes = torch.arange(30) % 2
    layer, made = deep.train_layer(X, Y, settings, 0, classes)
    stages = layer.record.stages
    assert list(stages) == ["solve", "agop", "root", "features", "measures"]
    assert layer.record.seconds == pytest.approx(sum(stages.values()))
    assert all(seconds > 0 for seconds in stages.values())
    assert list(layer.record.nc1) == list(layer.record.nc2) == ["input", "projected", "features"]
    assert made.rest is None
    assert torch.equal(made.points, made.features)
    for none in (None, torch.zeros(30, dtype=torch.int64)):
        assert deep.train_layer(X, Y, settings, 0, none)[0].record.nc1 == {}
