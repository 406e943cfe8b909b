"""xRFM with fastagop's kernel: the same numbers as with its own, through its own classes."""

from __future__ import annotations

import pytest
import torch

import fastagop
from fastagop import Gaussian, GeneralisedLaplace, Laplace, LpLaplace, Polynomial, ProductLaplace

xrfm = pytest.importorskip("xrfm")
own = pytest.importorskip("xrfm.rfm_src.kernels")

from fastagop.integrations.xrfm import FastKernel  # noqa: E402 (imports xrfm)

PAIRS = [  # (ours, theirs)
    (Laplace(3.0), own.LaplaceKernel(3.0, 1.0)),
    (GeneralisedLaplace(3.0, 1.3), own.LaplaceKernel(3.0, 1.3)),
]
pairs = pytest.mark.parametrize(
    ("kernel", "theirs"),
    PAIRS,
    ids=lambda v: repr(v) if isinstance(v, (Gaussian, GeneralisedLaplace, Laplace)) else "theirs",
)
# their distances come from torch.cdist, whose product form keeps half of float64's digits of a squared distance
CLOSE = 1e-6


@pytest.fixture
def data(normal):
    """(x, z, coefs, {name: mat})"""
    root = torch.nn.functional.softplus(normal(5, 5, seed=4))
    mats = {"none": None, "vector": normal(5, seed=3).abs() + 0.1, "matrix": 0.5 * (root + root.T)}
    return normal(60, 5), normal(20, 5, seed=2), normal(3, 60, seed=5), mats


@pairs
@pytest.mark.parametrize("mat", ["none", "vector", "matrix"])
@pytest.mark.parametrize("other", ["the same", "a copy", "others"])
def test_same_numbers(kernel, theirs, mat, other, data, relative):
    x, others, coefs, mats = data
    z, mat, ours = {"the same": x, "a copy": x.clone(), "others": others}[other], mats[mat], FastKernel(kernel)
    assert relative(ours.get_kernel_matrix(x, z, mat), theirs.get_kernel_matrix(x, z, mat)) <= CLOSE
    g, true = (k.get_function_grads(x, z, coefs, mat) for k in (ours, theirs))
    assert g.shape == (3, len(z), 5)
    assert relative(g, true) <= CLOSE
    for center in (False, True):
        for f in (coefs, coefs[:1]):
            M = ours.get_agop(x, z, f, mat, center)
            assert relative(M, theirs.get_agop(x, z, f, mat, center)) <= CLOSE
            if mat is None or mat.ndim == 1:
                diagonal = theirs.get_agop_diag(x, z, f, mat, center)
                assert relative(ours.get_agop_diag(x, z, f, mat, center), diagonal) <= CLOSE


@pytest.mark.parametrize("kernel", [Laplace(3.0), ProductLaplace(3.0)], ids=repr)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_the_diagonal_in_blocks(kernel, center, same, data, relative, monkeypatch):
    """Gradients of 3 points at a time, and by a matrix that is not symmetric: the diagonal of the whole AGOP."""
    x, z, coefs, mats = data
    monkeypatch.setattr("fastagop.integrations.xrfm._BLOCK_BYTES", 8 * 3 * 5 * 3)
    for mat in (*mats.values(), mats["matrix"].tril()):
        arguments = x, x if same else z, coefs, mat, center
        found = FastKernel(kernel).get_agop_diag(*arguments)
        assert relative(found, FastKernel(kernel).get_agop(*arguments).diagonal()) <= 1e-12


def test_the_diagonal_makes_no_square_matrix(normal, monkeypatch):
    """A (d, d) matrix of that many features would be 29 GB, more than there is."""
    x, coefs = normal(6, 60_000, dtype=torch.float32), normal(1, 6, dtype=torch.float32)
    found = FastKernel(Laplace(300.0)).get_agop_diag(x, x, coefs, None, True)
    assert found.shape == (60_000,)
    assert found.dtype == torch.float32


def test_the_diagonal_of_gradients_that_nearly_agree(normal, relative):
    """Of a kernel much wider than the points, centred: float32 gradients would lose half of the digits."""
    x, coefs = normal(40, 3, dtype=torch.float32), normal(1, 40, dtype=torch.float32).abs()
    z = 100.0 + 1e-3 * normal(30, 3, seed=2, dtype=torch.float32)
    found = FastKernel(Gaussian(100.0)).get_agop_diag(x, z, coefs, None, True)
    exact = FastKernel(Gaussian(100.0)).get_agop_diag(x.double(), z.double(), coefs.double(), None, True)
    assert relative(found.double(), exact) <= 1e-6


def test_autocast_changes_nothing(data):
    x, z, coefs, mats = (part if isinstance(part, dict) else part.float() for part in data)
    arguments, ours = (x, z, coefs, mats["matrix"].float()), FastKernel(Laplace(3.0))

    def results():
        kernel, slopes = ours.get_kernel_matrix(*arguments[:2], arguments[3]), ours.get_function_grads(*arguments)
        return [kernel, slopes, ours.get_agop(*arguments), ours.get_agop_diag(*arguments)]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(), plain))


L1 = [  # their gradients of several outputs together are wrong with torch 2.14: one at a time
    (ProductLaplace(3.0), own.ProductLaplaceKernel(3.0, 1.0)),
    (LpLaplace(1.5, 0.8, 3.0), own.LpqLaplaceKernel(3.0, 1.5, 0.8)),
]


@pytest.mark.parametrize(("kernel", "theirs"), L1, ids=["l1", "lpq"])
@pytest.mark.parametrize("mat", ["none", "vector", "matrix"])
def test_same_numbers_of_sums_over_features(kernel, theirs, mat, data, relative):
    x, z, coefs, mats = data
    mat, ours = mats[mat], FastKernel(kernel)
    assert relative(ours.get_kernel_matrix(x, z, mat), theirs.get_kernel_matrix(x, z, mat)) <= CLOSE
    for f in coefs.split(1):
        true = theirs.get_function_grads(x, z, f, mat)
        assert relative(ours.get_function_grads(x, z, f, mat), true) <= CLOSE
        for center in (False, True):
            true = theirs.get_agop(x, z, f, mat, center)
            assert relative(ours.get_agop(x, z, f, mat, center), true) <= CLOSE
    g = ours.get_function_grads(x, z, coefs, mat)
    flat = g.reshape(-1, g.shape[-1])
    centred = flat - flat.mean(0)
    assert relative(ours.get_agop(x, z, coefs, mat, True), centred.T @ centred) <= 1e-10


@pytest.mark.parametrize(("kernel", "theirs"), L1, ids=["l1", "lpq"])
def test_rfm_with_sums_over_features(kernel, theirs, normal, relative):
    X, Z = normal(80, 6), normal(20, 6, seed=2)
    y, w = (P[:, :1] * P[:, 1:2] for P in (X, Z))
    answers = []
    for each in (theirs, FastKernel(kernel)):
        model = xrfm.RFM(each, iters=2, bandwidth_mode="adaptive", device="cpu", verbose=False)
        model.fit((X, y), (Z, w), reg=1e-3, return_best_params=False, early_stop_rfm=False)
        answers.append((model.M, model.predict(Z), torch.tensor([model.kernel_obj.bandwidth])))
    for a, b in zip(*answers, strict=True):
        assert relative(b, a) <= 1e-5


def test_kernel_without_a_bandwidth(normal):
    kernel, x = FastKernel(Polynomial(2)), normal(9, 3)
    assert torch.equal(kernel.get_kernel_matrix(x, x), Polynomial(2)(x))
    kernel._reset_adaptive_bandwidth()
    with pytest.raises(ValueError, match="bandwidth_mode must be 'constant'"):
        kernel.get_kernel_matrix(x, x)


@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("mode", ["constant", "adaptive"])
def test_rfm(diag, mode, normal, relative):
    X, Z = normal(80, 6), normal(20, 6, seed=2)
    Y, W = (torch.stack([P[:, 0] * P[:, 1], P[:, 2]], 1) for P in (X, Z))
    answers = []
    for kernel in (own.LaplaceKernel(5.0, 1.0), FastKernel(Laplace(5.0))):
        model = xrfm.RFM(kernel, iters=2, diag=diag, bandwidth_mode=mode, device="cpu", verbose=False)
        model.fit((X, Y), (Z, W), reg=1e-3, return_best_params=False, early_stop_rfm=False)
        answers.append((model.M, model.predict(Z), torch.tensor([model.kernel_obj.bandwidth])))
    for theirs, ours in zip(*answers, strict=True):
        assert relative(ours, theirs) <= 1e-5  # three solves carry CLOSE on


def test_xrfm_with_a_kernel_that_it_has_not(normal, relative):
    """The tree of one leaf, with a Gaussian: what ``fastagop.RFMRegressor`` learns and predicts."""
    X, Z = normal(100, 4, dtype=torch.float32), normal(30, 4, seed=2, dtype=torch.float32)
    y, w = X[:, 0] * X[:, 1], Z[:, 0] * Z[:, 1]
    params = {
        "model": {"kernel": FastKernel(Gaussian(2.0)), "bandwidth_mode": "constant", "diag": False},
        "fit": {"reg": 1e-2, "iters": 2, "early_stop_rfm": False, "return_best_params": False, "verbose": False},
    }
    tree = xrfm.xRFM(params, device="cpu", tuning_metric="mse", verbose=False, n_trees=1)
    tree.fit(X, y, Z, w)
    ours = fastagop.RFMRegressor(Gaussian(2.0), iterations=2, ridge=1e-2).fit(X, y)
    assert relative(ours.M_, tree.trees[0]["model"].M) <= 1e-3  # float32, ridge 1e-2
    assert relative(ours.predict(Z), torch.as_tensor(tree.predict(Z)).reshape(-1)) <= 1e-3


def test_duplicates_have_no_gradient(normal):
    x = normal(30, 4)
    x[7] = x[2]
    g = FastKernel(Laplace(2.0)).get_function_grads(x, x.clone(), torch.eye(30, dtype=x.dtype))
    assert float(g[7, 2].abs().max()) == 0.0
    assert float(g[7, 7].abs().max()) == 0.0


def test_what_it_refuses():
    with pytest.raises(TypeError, match="kernel must be a fastagop kernel"):
        FastKernel("laplace")
    with pytest.raises(ValueError, match=r"got Laplace\(bandwidth='median'\); use fastagop.settled"):
        FastKernel(Laplace("median"))
    codes, vectors = [torch.tensor([1, 2])], [torch.eye(2)]
    for lists in ((codes, vectors), (codes, []), ([], vectors)):
        with pytest.raises(NotImplementedError, match=r"categorical features, got .*fast_categorical=False"):
            FastKernel(Laplace(1.0)).set_categorical_indices(torch.tensor([0]), *lists)


NO_CATEGORIES = {
    "None": (None, None, None),
    "lists": (torch.arange(5), [], []),
    "tuples": (torch.arange(5), (), ()),
    "None beside all columns": (torch.arange(5), None, None),
    "arrays": (torch.arange(5).numpy(), torch.zeros(0).numpy(), torch.zeros(0).numpy()),
    "another order": (torch.tensor([4, 0, 1, 3, 2]), [], []),
}


@pytest.mark.parametrize("lists", NO_CATEGORIES.values(), ids=NO_CATEGORIES.keys())
def test_no_categories_change_nothing(lists, data):
    x, z, coefs, _ = data
    plain, told = FastKernel(Laplace(3.0)), FastKernel(Laplace(3.0))
    told.set_categorical_indices(*lists, device="cpu")
    assert torch.equal(told.get_kernel_matrix(x, z), plain.get_kernel_matrix(x, z))
    assert torch.equal(told.get_agop(x, z, coefs), plain.get_agop(x, z, coefs))
    assert torch.equal(told.get_function_grads(x, z, coefs), plain.get_function_grads(x, z, coefs))


def test_columns_that_are_left_out(data):
    x, z, coefs, _ = data
    kernel = FastKernel(Laplace(3.0))
    kernel.set_categorical_indices(torch.arange(4), [], [])
    for call in (lambda: kernel.get_kernel_matrix(x, z), lambda: kernel.get_agop(x, z, coefs)):
        with pytest.raises(ValueError, match="x must have the 4 columns that numerical_indices names, got 5"):
            call()


@pytest.mark.parametrize("classes", [0, 2, 3])  # regression, binary and multiclass heads
@pytest.mark.parametrize("mode", ["constant", "adaptive"])
def test_xrfm_as_pytabkit_calls_it(classes, mode, normal):
    """A description of columns without categories, diagonal M, both kinds of heads: what xRFM's own kernel gives."""
    X, Z = normal(120, 5, dtype=torch.float32), normal(40, 5, seed=2, dtype=torch.float32)
    y, w = (P[:, 0] * P[:, 1] if not classes else (P[:, 0] * 2).round().long() % classes for P in (X, Z))
    info = {"numerical_indices": torch.arange(5), "categorical_indices": [], "categorical_vectors": []}
    answers = []
    for kernel in ("l2", FastKernel(Laplace(5.0))):
        params = {
            "model": {"kernel": kernel, "bandwidth": 5.0, "exponent": 1.0, "bandwidth_mode": mode, "diag": True},
            "fit": {"reg": 1e-2, "iters": 2, "early_stop_rfm": True, "M_batch_size": 8192, "solver": "solve"},
        }
        params["model"]["fast_categorical"] = True
        metric = "accuracy" if classes else "mse"
        tree = xrfm.xRFM(params, device="cpu", tuning_metric=metric, categorical_info=info, verbose=False, n_trees=1)
        tree.fit(X, y, Z, w)
        answer = tree.predict_proba(Z) if classes else tree.predict(Z)
        answers.append(torch.as_tensor(answer).double().reshape(len(Z), -1))
    assert float((answers[0] - answers[1]).abs().max()) <= 1e-3  # float32, ridge 1e-2


def test_without_xrfm(python):
    printed = python(
        """
import sys
sys.modules["xrfm"] = None
try:
    import fastagop.integrations.xrfm
except ImportError as error:
    print(error)
"""
    )
    assert "pip install 'xrfm" in printed


@pytest.mark.parametrize("best", [False, True])
def test_leaves_of_one_object_have_bandwidths_of_their_own(best, normal, relative):
    """Adapted leaf by leaf, also where xRFM goes back to the best one, and after a tree was stored and loaded."""
    X, Z = normal(240, 4, dtype=torch.float32), normal(60, 4, seed=2, dtype=torch.float32)
    X[:120] *= 5.0  # leaves of other sizes
    y, w = X[:, 0] * X[:, 1], Z[:, 0] * Z[:, 1]
    fit = {"reg": 1e-2, "iters": 1, "verbose": False, "early_stop_rfm": False, "return_best_params": best}

    def tree(kernel):
        torch.manual_seed(0)
        model = {"kernel": kernel, "bandwidth": 5.0, "exponent": 1.0, "bandwidth_mode": "adaptive", "diag": False}
        how = {"device": "cpu", "tuning_metric": "mse", "verbose": False, "n_trees": 1, "max_leaf_size": 100}
        return xrfm.xRFM({"model": model, "fit": fit}, random_state=0, **how)

    answers = []
    for kernel in ("l2", FastKernel(Laplace(5.0))):
        fitted, loaded = tree(kernel).fit(X, y, Z, w), tree(kernel)
        loaded.load_state_dict(fitted.get_state_dict(), X)
        answers.append([torch.as_tensor(model.predict(Z)).double() for model in (fitted, loaded)])
    for theirs, ours in zip(*answers, strict=True):
        assert relative(ours, theirs) <= 1e-3  # float32, ridge 1e-2


def test_a_bandwidth_that_is_set_is_taken(data):
    x, z, coefs, _ = data
    kernel = FastKernel(Laplace(3.0))
    for centers in (x, z):
        kernel._reset_adaptive_bandwidth()
        kernel.get_kernel_matrix(centers, centers)
    first = kernel.get_kernel_matrix(z, x)
    kernel.bandwidth = 0.5  # of the last centers
    assert kernel.kernel == Laplace(0.5)
    assert torch.equal(kernel.get_kernel_matrix(x, z), Laplace(0.5)(x, z))
    assert torch.equal(kernel.get_kernel_matrix(z, x), first)
    assert torch.equal(
        kernel.get_function_grads(z, x, coefs[:, :20]),
        fastagop.gradients(Laplace(0.5), z, coefs[:, :20].T, x).transpose(0, 1),
    )
