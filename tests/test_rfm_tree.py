"""Trees of recursive feature machines: what splits and leaves promise, and that one leaf is one machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastagop
from fastagop import Laplace, RFMClassifier, RFMRegressor, RFMTreeClassifier, RFMTreeRegressor
from fastagop.rfm import splits
from fastagop.rfm.leaves import Constant
from fastagop.rfm.splits import Leaf, Split, Tree

# scikit-learn's checks feed duplicated, one-dimensional and constant data: singular on purpose.
singular = pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")
# Nothing is sampled and nothing held out: what a fit comes to depends on the rows alone.
PLAIN = {"iterations": 2, "leaf_size": 50, "soft": False, "early_stopping": False, "random_state": 0}


@singular
@parametrize_with_checks(
    [RFMTreeClassifier(**{**PLAIN, "leaf_size": 12}), RFMTreeRegressor(**{**PLAIN, "leaf_size": 12})]
)
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def problem():
    """(X, targets, labels) of 400 rows: which feature counts depends on where a row lies."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 5))
    y = np.where(X[:, 0] > 0, np.sin(2 * X[:, 1]), X[:, 2]) + X[:, 0]
    return X, y, np.array(["low", "middle", "high"])[np.digitize(y, [-0.7, 0.7])]


@pytest.fixture(scope="module")
def trees(problem):
    """A regressor and a classifier with soft routing."""
    X, y, labels = problem
    regressor = RFMTreeRegressor(leaf_size=60, iterations=2, random_state=0).fit(X, y)
    return regressor, RFMTreeClassifier(leaf_size=60, iterations=2, random_state=0).fit(X, labels)


@pytest.mark.parametrize("n", [101, 128, 237])  # odd numbers of rows, a power of two, and neither
@pytest.mark.parametrize("leaf_size", [16, 50])
def test_leaves_are_even(n, leaf_size):
    rng = np.random.default_rng(n)
    X = rng.normal(size=(n, 3))
    model = RFMTreeRegressor(**{**PLAIN, "leaf_size": leaf_size, "iterations": 1}).fit(X, X[:, 0] * X[:, 1])
    count = np.bincount(model.apply(X))
    assert count.tolist() == [leaf.size for leaf in model.tree_.leaves] == model._shares.tolist()
    assert count.sum() == n
    assert count.max() <= leaf_size
    assert 2 * count.min() >= leaf_size // 2
    assert len(count) == len(model.leaves_)
    for node in model.tree_.nodes:
        if isinstance(node, Split):
            below = [model.tree_.nodes[child].size for child in (node.left, node.right)]
            assert abs(below[0] - below[1]) <= 1
            assert sum(below) == node.size


def test_weights_of_leaves(problem, trees):
    X, *_ = problem
    for model in trees:
        for temperature in (0.0, 0.05, 0.4):
            soft = clone(model)
            soft.__dict__.update(model.__dict__, temperature_=temperature)
            weights = soft.transform(X)
            np.testing.assert_allclose(weights.sum(1), 1.0, rtol=16 * np.finfo(float).eps)
            assert weights.min() >= 0
            assert (weights[weights > 0] >= splits.FAINT).all()
            if temperature == 0:
                assert (weights == np.eye(len(model.leaves_))[model.apply(X)]).all()
        assert model.get_feature_names_out().shape == (len(model.leaves_),)


def test_softness_is_the_formula():
    """Weights of a tree of two splits, and the mean of the leaves' answers that they make."""
    one = Split(4, torch.tensor([1.0, 0.0]).double(), 0.5, 2.0, 1, 2)
    two = Split(2, torch.tensor([0.0, 1.0]).double(), -1.0, 1.0, 3, 4)
    tree = Tree([one, Leaf(0, 2), two, Leaf(1, 1), Leaf(2, 1)])
    X = torch.tensor([[0.5, -1.0], [0.7, -1.2], [9.0, 3.0]]).double()
    right = 1 / (1 + torch.exp(-(X[:, 0] - 0.5) / (0.25 * 2.0)))
    upper = 1 / (1 + torch.exp(-(X[:, 1] + 1.0) / 0.25))
    expected = torch.stack([1 - right, right * (1 - upper), right * upper], 1)
    expected[expected < splits.FAINT] = 0
    found = torch.zeros(3, 3, dtype=torch.float64)
    for leaf, rows, weights in tree.route(X, 0.25):
        found[rows, leaf] = weights
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    hard = {leaf: rows.tolist() for leaf, rows, _ in tree.route(X, 0.0)}
    assert hard == {0: [0], 1: [1], 2: [2]}  # a row on the threshold goes left
    assert str(tree).splitlines()[1:] == [
        "  4 points: +1.00 x0 <= 0.5",
        "    2 points: leaf 0",
        "    2 points: +1.00 x1 <= -1",
        "      1 points: leaf 1",
        "      1 points: leaf 2",
    ]


def test_no_row_is_left_without_a_leaf():
    """Ten splits at whose middle a row lies leave every leaf a thousandth: somebody answers all the same."""
    nodes = []
    for level in range(10):
        nodes += [
            Split(2, torch.ones(1).double(), 0.0, 1.0, (1 << level) * 2 - 1 + 2 * i, (1 << level) * 2 + 2 * i)
            for i in range(1 << level)
        ]
    nodes += [Leaf(i, 1) for i in range(1 << 10)]
    total = sum(float(weights.sum()) for *_, weights in Tree(nodes).route(torch.zeros(1, 1), 1.0))
    assert total > 0


def test_answers_are_means_of_leaves(problem, trees):
    X, *_ = problem
    regressor, classifier = trees
    for model in trees:
        model.temperature_ = 0.1
    near = torch.from_numpy((X - X.mean(0)) / X.std(0))
    weights = torch.from_numpy(regressor.transform(X))
    answers = torch.stack([torch.from_numpy(leaf.predict(near.numpy())) for leaf in regressor.leaves_], 1)
    np.testing.assert_allclose(regressor.predict(X), (weights * answers).sum(1), rtol=1e-9, atol=1e-9)
    weights, total = torch.from_numpy(classifier.transform(X)), np.zeros((400, 3))
    for share, leaf in zip(weights.T, classifier.leaves_, strict=True):
        outputs = np.full((400, 3), -1.0)
        if isinstance(leaf, Constant):
            outputs[:, classifier.classes_ == leaf.answer] = 1.0
        else:
            own = leaf.decision_function(near.numpy())
            own = np.stack([-own, own], 1) if own.ndim == 1 else own
            outputs[:, np.isin(classifier.classes_, leaf.classes_)] = own
        total += share[:, None].numpy() * outputs
    np.testing.assert_allclose(classifier.decision_function(X), total, rtol=1e-9, atol=1e-9)
    assert (classifier.predict(X) == classifier.classes_[total.argmax(1)]).all()
    np.testing.assert_allclose(classifier.predict_proba(X).sum(1), 1.0, rtol=1e-12)


@pytest.mark.parametrize("parameters", [{}, {"early_stopping": False, "scale": None, "diagonal": True}])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_leaf_is_one_machine(problem, parameters, dtype):
    """Targets are rounded once more on their way to a leaf, which its condition multiplies."""
    X, y, labels = problem
    weights = np.random.default_rng(1).uniform(0.5, 2.0, 400)
    shared = {
        "scale": "standard",
        "early_stopping": True,
        "iterations": 2,
        "random_state": 3,
        "dtype": dtype,
        **parameters,
    }
    tree = RFMTreeClassifier(Laplace(3.0), class_weight="balanced", **shared).fit(X, labels, sample_weight=weights)
    one = RFMClassifier(Laplace(3.0), class_weight="balanced", **shared).fit(X, labels, sample_weight=weights)
    assert len(tree.leaves_) == 1
    assert tree.temperature_ == 0
    assert np.array_equal(tree.decision_function(X), one.decision_function(X))
    assert np.array_equal(tree.predict_proba(X), one.predict_proba(X))
    np.testing.assert_allclose(tree.feature_importances_, one.feature_importances_, rtol=1e-12)
    for targets in (y + 3.0, np.stack([y, -y], 1)):
        tree = RFMTreeRegressor(Laplace(3.0), **shared).fit(X, targets, sample_weight=weights)
        one = RFMRegressor(Laplace(3.0), **shared).fit(X, targets, sample_weight=weights)
        apart = np.abs(tree.predict(X) - one.predict(X)).max()
        assert apart <= 1e3 * np.finfo(dtype).eps * np.abs(targets).max()


def test_order_of_rows(problem):
    """Where nothing is sampled only roundings depend on it."""
    X, y, labels = problem
    order = np.random.default_rng(5).permutation(400)
    for kind, answers in ((RFMTreeRegressor, y), (RFMTreeClassifier, labels)):
        model = kind(dtype="float64", **PLAIN)
        first, second = (clone(model).fit(X[rows], answers[rows]) for rows in (slice(None), order))
        assert np.array_equal(first.apply(X), second.apply(X))
        np.testing.assert_allclose(first._outputs(X), second._outputs(X), rtol=1e-7, atol=1e-7)


def test_a_seed_decides(problem):
    X, y, _ = problem
    model = RFMTreeRegressor(leaf_size=50, split_samples=60, iterations=2, random_state=4)
    first, second = (clone(model).fit(X, y) for _ in range(2))
    assert np.array_equal(first.predict(X), second.predict(X))
    other = clone(model).set_params(random_state=5).fit(X, y)
    assert not np.array_equal(first.predict(X), other.predict(X))


@pytest.mark.parametrize("kind", [RFMTreeRegressor, RFMTreeClassifier])
def test_a_weight_of_two_is_a_row_written_twice(problem, kind):
    """Splits halve distinct rows, so that copies move none of them."""
    X, y, labels = problem
    answers, twice = (y if kind is RFMTreeRegressor else labels), np.arange(0, 400, 3)
    weights = np.ones(400)
    weights[twice] = 2.0
    weights[-1] = 0.0
    weighted = kind(dtype="float64", **PLAIN).fit(X, answers, sample_weight=weights)
    rows = np.concatenate([np.arange(399), twice[twice < 399]])
    written = kind(dtype="float64", **PLAIN).fit(X[rows], answers[rows])
    assert np.array_equal(weighted.apply(X), written.apply(X))
    np.testing.assert_allclose(weighted._outputs(X), written._outputs(X), rtol=1e-7, atol=1e-7)


def test_fits_what_one_metric_cannot():
    """In each of two clusters another direction counts: the leaves find their own."""
    rng = np.random.default_rng(2)

    def drawn(n):
        X = rng.normal(size=(n, 10))
        side = np.sign(X[:, 0])
        X[:, 0] += 4 * side
        return X, np.sin(3 * np.where(side > 0, X[:, 1], X[:, 2])) + side

    (X, y), (Z, z) = drawn(600), drawn(300)
    shared = {"iterations": 3, "scale": "standard", "early_stopping": False}
    one = RFMRegressor(**shared).fit(X, y)
    tree = RFMTreeRegressor(leaf_size=300, soft=False, random_state=0, **shared).fit(X, y)
    assert len(tree.leaves_) == 2
    assert int(tree.tree_.nodes[0].direction.abs().argmax()) == 0
    errors = [np.mean((model.predict(Z) - z) ** 2) for model in (one, tree)]
    assert errors[1] < 0.5 * errors[0]  # a sixth


def test_temperature_is_chosen_on_rows_held_out(problem):
    """A smooth function wants soft splits; where softness gains nothing, splits are hard."""
    X, *_ = problem
    smooth = RFMTreeRegressor(leaf_size=60, iterations=1, random_state=0).fit(X, X[:, 0] + X[:, 1])
    assert smooth.temperature_ > 0
    apart = X + 40.0 * (X[:, :1] > np.median(X[:, 0]))  # nobody lies between the clusters: all temperatures are equal
    hard = RFMTreeRegressor(leaf_size=200, iterations=1, random_state=0).fit(apart, X[:, 1] + 9 * (apart[:, 0] > 20))
    assert hard.temperature_ == 0
    for early in (True, False):
        model = RFMTreeRegressor(
            leaf_size=100, iterations=1, early_stopping=early, validation_fraction=0.2, random_state=0
        )
        model.fit(X, X[:, 0])
        assert [len(leaf._unseen_rows) for leaf in model.leaves_] == [20] * 4  # and the last solve has all
        assert [len(leaf.solution_.alpha) for leaf in model.leaves_] == [100] * 4
    hard = RFMTreeRegressor(leaf_size=100, iterations=1, early_stopping=False, soft=False).fit(X, X[:, 0])
    assert [len(leaf._unseen_rows) for leaf in hard.leaves_] == [0] * 4


def test_scores_that_rows_of_a_leaf_have_none_of(problem):
    """The area under the curve wants both classes, which leaves of one class have not."""
    X, *_ = problem
    labels = (X[:, 0] + 0.1 * X[:, 1] > 0).astype(int)
    model = RFMTreeClassifier(leaf_size=40, iterations=1, scoring="roc_auc", random_state=0).fit(X, labels)
    assert model.score(X, labels) > 0.9
    kinds = {type(leaf) for leaf in model.leaves_}
    assert Constant in kinds
    constant = next(leaf for leaf in model.leaves_ if isinstance(leaf, Constant))
    assert set(constant.predict(X[:3]).tolist()) == {int(constant.answer)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("parameters", [{}, {"soft": False}, {"early_stopping": False}, {"scoring": "r2"}])
@pytest.mark.parametrize("leaf_size", [3, 14])
def test_leaves_of_few_rows_are_scored_without_a_word(problem, leaf_size, parameters):
    """Two rows are held out where R^2 is the default score, of four or more; of one the squared error decides."""
    X, y, _ = problem
    model = RFMTreeRegressor(leaf_size=leaf_size, iterations=1, random_state=0, **parameters).fit(X[:52], y[:52])
    defined = leaf_size == 14 and model.scoring is None
    for leaf in model.leaves_:
        assert len(leaf._unseen_rows) == (2 if defined else 1) or parameters == {"early_stopping": False}
        assert not model.early_stopping or np.isfinite(leaf.validation_score_).all() == defined
    assert model.score(X[:52], y[:52]) > 0.5


def test_nodes_of_one_answer_are_leaves():
    """However many rows they have; a missing class is answered by -1."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 3))
    y = np.where(X[:, 0] < 0.9, "common", np.where(X[:, 1] > 0, "up", "down"))
    model = RFMTreeClassifier(**{**PLAIN, "leaf_size": 40}).fit(X, y)
    outputs = model.decision_function(X)
    pure = [leaf.number for leaf in model.tree_.leaves if isinstance(model.leaves_[leaf.number], Constant)]
    assert pure
    inside = np.isin(model.apply(X), pure)
    assert (outputs[inside] == [1.0, -1.0, -1.0]).all()
    flat = RFMTreeRegressor(**PLAIN).fit(X, np.full(300, 7.0))
    assert len(flat.leaves_) == 1
    assert (flat.predict(X) == 7.0).all()
    assert flat.feature_importances_.sum() == pytest.approx(1.0)


def test_ties_end():
    """A feature of few values, identical rows, and rows with nothing to divide them by."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 3, size=(300, 1)).astype(float)
    model = RFMTreeRegressor(**PLAIN).fit(steps, steps[:, 0] + rng.normal(size=300))
    assert model.tree_.nodes[0].size == 3  # distinct rows
    crowd = np.concatenate([np.zeros((200, 2)), rng.normal(size=(100, 2))])
    model = RFMTreeRegressor(**PLAIN).fit(crowd, rng.normal(size=300))
    assert sum(leaf.size for leaf in model.tree_.leaves) == 101
    binary = np.concatenate([(rng.random((400, 1)) < 0.1) * 1.0, 1e-3 * rng.normal(size=(400, 1))], 1)
    model = RFMTreeRegressor(**PLAIN, scale=None).fit(binary, 5 * binary[:, 0] + rng.normal(size=400))
    assert max(leaf.size for leaf in model.tree_.leaves) <= 50


def test_cut():
    even = torch.tensor([4.0, 1.0, 3.0, 2.0]).double()
    assert splits.cut(even) == (2.5, 0.5)
    assert splits.cut(torch.tensor([0.0, 0.0, 0.0, 1.0]).double()) == (0.5, 0.25)
    assert splits.cut(torch.tensor([1.0, 1.0 + 2.0**-52, 1.0]).double()) is None  # rounding divides nothing
    assert splits.cut(torch.tensor([0.0, 1.0, 1.0]).double()) == (0.5, 1 / 3)


def test_few_rows_and_features():
    X = np.array([[0.0], [1.0], [2.0]])
    model = RFMTreeClassifier(leaf_size=2, iterations=1, random_state=0).fit(X, [0, 1, 1])
    assert model.predict(X).tolist() == [0, 1, 1]
    model = RFMTreeRegressor(leaf_size=2, iterations=0, random_state=0).fit(X, [0.0, 1.0, 5.0])
    assert np.isfinite(model.predict(X)).all()
    wide = np.random.default_rng(0).normal(size=(40, 90))  # more features than rows of a split
    model = RFMTreeRegressor(leaf_size=20, iterations=1, random_state=0).fit(wide, wide[:, 0])
    assert len(model.leaves_) == 2


def test_every_leaf_settles_its_bandwidth(problem):
    X, y, _ = problem
    model = RFMTreeRegressor(Laplace("median"), **PLAIN).fit(X * [1.0, 3.0, 1.0, 1.0, 1.0], y)
    found = {leaf.kernel_.bandwidth for leaf in model.leaves_}
    assert len(found) == len(model.leaves_)
    assert model.kernel == Laplace("median")


def test_tensors(problem):
    X, y, labels = problem
    x = torch.from_numpy(X).float()
    model = RFMTreeClassifier(**PLAIN).fit(x, torch.from_numpy((labels == "high") * 1))
    assert model.predict(x).dtype == torch.int64
    assert model.transform(x).dtype == torch.float32
    assert isinstance(model.apply(x), torch.Tensor)
    assert isinstance(model.leaves_[0].M_, torch.Tensor)
    arrays = RFMTreeRegressor(**PLAIN).fit(X.astype(np.float32), y)
    tensors = RFMTreeRegressor(**PLAIN).fit(x, torch.from_numpy(y))
    assert np.array_equal(arrays.predict(X), tensors.predict(torch.from_numpy(X)).numpy())


def test_time_limit(problem):
    """No time is left: every leaf has the iteration that it began."""
    X, y, _ = problem
    model = RFMTreeRegressor(**{**PLAIN, "iterations": 5}, time_limit=0.0).fit(X, y)
    assert [len(leaf.iterations_) for leaf in model.leaves_] == [1] * 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("leaf_size", 1),
        ("leaf_size", 2.5),
        ("split_samples", 0),
        ("soft", "yes"),
        ("scale", "minmax"),
        ("validation_fraction", 0.0),
        ("early_stopping", 1),
        ("iterations", -1),
        ("diagonal", None),
        ("time_limit", -1.0),
        ("metric_samples", 0),
        ("n_iter_no_change", 0),
        ("random_state", "seed"),
        ("scoring", "no_such_score"),
        ("memory_limit", -1),
        ("kernel", "laplace"),
    ],
)
def test_errors_name_the_parameter(problem, name, value):
    X, y, _ = problem
    with pytest.raises((ValueError, TypeError), match=name):
        RFMTreeRegressor(**{name: value}).fit(X, y)
    with pytest.raises(ValueError, match="validation_fraction"):  # soft routing holds rows out, too
        RFMTreeRegressor(early_stopping=False, validation_fraction=2.0).fit(X, y)


def test_is_saved(problem, tmp_path, trees):
    X, _, labels = problem
    pure = RFMTreeClassifier(**PLAIN).fit(X, np.where(X[:, 0] > 0, "yes", labels))
    for model in (*trees, pure):
        model.save(tmp_path / "tree")
        again = fastagop.load(tmp_path / "tree")
        assert again.get_params() == model.get_params()
        assert np.array_equal(again.predict(X), model.predict(X))
        assert np.array_equal(again.transform(X), model.transform(X))
        assert np.array_equal(again.feature_importances_, model.feature_importances_)
        assert str(again.tree_) == str(model.tree_)
        assert [type(leaf) for leaf in again.leaves_] == [type(leaf) for leaf in model.leaves_]


def test_nodes_that_are_no_tree_are_refused(trees):
    directions, nodes = trees[0].tree_.packed()
    assert str(Tree.unpacked(directions, nodes, 5)) == str(trees[0].tree_)
    circle = [[*nodes[0][:3], 0, nodes[0][4]], *nodes[1:]]
    for wrong, rows, width in (
        (circle, directions, 5),
        (nodes[:-1], directions, 5),
        (nodes, directions[1:], 5),
        (nodes, directions, 4),
        ([], directions[:0], 5),
    ):
        with pytest.raises((ValueError, StopIteration)):
            Tree.unpacked(rows, wrong, width)


def test_plan(problem):
    X, y, _ = problem
    text = fastagop.explain(RFMTreeRegressor(leaf_size=50), X, y)
    assert "7 x split of 400 rows" in text
    assert "8 x leaf of 50 rows" in text
    assert "split" not in fastagop.explain(RFMTreeRegressor(), X, y)
    for changes in ({"early_stopping": True}, {"early_stopping": False, "metric_samples": 90}):
        of_tree, of_machine = (fastagop.explain(make(**changes), X, y) for make in (RFMTreeRegressor, RFMRegressor))
        steps = [line.removeprefix("  1 x leaf of 400 rows, ").strip() for line in of_tree.splitlines()]
        assert set(steps) > {line.strip() for line in of_machine.splitlines() if "iterations, 5 features" in line}


def test_progress_is_logged(problem, caplog):
    X, y, _ = problem
    with caplog.at_level("INFO", "fastagop"):
        RFMTreeRegressor(**PLAIN, verbose=1).fit(X, y)
    assert "RFM tree: leaf 8 of 8, rows 50" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_beyond_the_dtype_go_where_float64_sends_them(dtype):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((600, 5))
    y = X[:, 0] + np.sin(2 * X[:, 1])
    options = {"leaf_size": 150, "iterations": 1, "random_state": 0}
    model = RFMTreeRegressor(dtype=dtype, **options).fit(X, y)
    wide = RFMTreeRegressor(dtype="float64", **options).fit(X, y)
    for far in ([[1e39, -1e39, 0.0, 0.0, 0.0]], [[1e200] * 5], [[-1e308] * 5]):
        for soft in (True, False):
            found, expected = (m.set_params(soft=soft).predict(far) for m in (model, wide))
            np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(np.asarray(model.transform(far)).sum(), 1.0)
        assert np.array_equal(model.apply(far), wide.apply(far))
