"""torch.set_default_device: what is public computes where its tensors are, whatever device the process has set."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastagop
from fastagop import (
    DeepRFMClassifier,
    DeepRFMRegressor,
    Gaussian,
    Laplace,
    Polynomial,
    ProductLaplace,
    RFMClassifier,
    RFMClassifierCV,
    RFMRegressor,
    RFMTreeClassifier,
    autograd,
    collapse,
    network,
    probes,
)
from fastagop.collapse import Accumulator
from fastagop.convolution import ConvLayerSettings, PatchMachine, Window, fit_layer

ROOT = Path(__file__).resolve().parents[1]
# What torch puts on the default device where no device is named.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "nested_tensor", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
    *("sparse_coo_tensor", "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
K, PRODUCT, RIDGE = Laplace(2.0), ProductLaplace(1.0), 1e-2


def factories(path: Path) -> list[str]:
    """The calls of a file that make tensors on the default device."""
    return [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and not any(keyword.arg in ("device", "out") for keyword in node.keywords)
    ]


def test_every_new_tensor_names_its_device():
    """Say device=, or use new_zeros and its like, or ``checks.tensor`` for what callers pass."""
    found = [
        call for folder in ("fastagop", "kernels") for path in (ROOT / folder).rglob("*.py") for call in factories(path)
    ]
    assert found == []


def test_what_that_test_sees(tmp_path):
    (tmp_path / "a.py").write_text("torch.zeros(3)\ntorch.zeros(3, device=d)\nx.new_zeros(3)\ntorch.as_tensor(y)\n")
    assert factories(tmp_path / "a.py") == ["a.py:1 torch.zeros(3)", "a.py:4 torch.as_tensor(y)"]


@pytest.fixture(scope="module")
def at():
    """Data on the CPU, made before another device is the default."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(24, 6, generator=generator)
    y = torch.arange(24) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    alpha = torch.randn(24, 3, generator=generator)
    return SimpleNamespace(
        X=X,
        y=y,
        n=X.numpy(),
        codes=y.numpy(),
        Y=nn.functional.one_hot(y).double(),
        alpha=alpha,
        A=alpha.clone().requires_grad_(),
        W=torch.randn(3, 6, generator=generator),
        weights=X[:, 0].abs(),
        twice=torch.cat([X, X]),
        many=torch.randn(1100, 2, generator=generator),
        images=X.view(24, 1, 2, 3),
        model=model,
    )


def fitted(estimator, at, *more):
    """What a small estimator gives for numbers of NumPy and torch: both must be served where their data are."""
    estimator.fit(at.n, at.codes)
    estimator.fit(at.X, at.y)
    found = [getattr(estimator, name) if name.endswith("_") else getattr(estimator, name)(at.X) for name in more]
    return [estimator.predict(at.X), *found]


def measured(splits):
    return [value for split in splits.values() for value in split.nc1.values()]


def of_patches(machine):
    return [machine.predict(machine.patches), machine.agop()]


def probed(at):
    few = {"bandwidths": ("median",), "centers": (False,), "iterations": 1, "random_state": 0}
    return probes.fit({"array": at.n, "tensor": at.X}, at.codes % 2, **few)


def accumulated(at, covariance):
    one, two = (Accumulator(covariance=covariance).update(at.X[part], at.y[part]) for part in (slice(9), slice(9, 24)))
    found = one.merge(two)
    nc4 = found.nc4(at.W, None, [(at.X, at.y)])
    more = [found.nc1(metric="pinv")] if covariance else []
    return [found.nc1(), found.nc2(), found.cdnv(), found.nc3(at.W), nc4, *more]


def backward(at):
    return torch.autograd.grad(autograd.agop(K, at.X, at.A).trace() + autograd.kernel_matrix(K, at.X).sum(), at.A)


def saved(estimator, at, folder):
    estimator.fit(at.n, at.codes).save(folder / "it")
    return fastagop.load(folder / "it").predict(at.n)


def losses(outputs, labels):
    return LOSS(outputs, labels)


SMALL = {"iterations": 2, "random_state": 0}
LOSS = nn.CrossEntropyLoss(reduction="none")
CALLS = {
    "matrix": lambda at: [fastagop.kernel_matrix(k, at.X) for k in (K, PRODUCT, Polynomial(2))],
    "matmul": lambda at: fastagop.kernel_matmul(K, at.X, V=at.alpha),
    "gradients": lambda at: [fastagop.gradients(k, at.X, at.alpha) for k in (K, PRODUCT)],
    "agop": lambda at: [fastagop.agop(k, at.X, at.alpha, center=True) for k in (K, PRODUCT)],
    "agop, gram": lambda at: fastagop.agop(K, at.X, at.alpha, method="gram"),
    "solve": lambda at: fastagop.solve(K, at.X, at.alpha, ridge=RIDGE).alpha,
    "solve, cholesky": lambda at: fastagop.solve(K, at.X, at.alpha, method="cholesky").alpha,
    "solve, weights": lambda at: fastagop.solve(K, at.X, at.alpha, ridge=RIDGE, sample_weight=at.weights).alpha,
    "solve, eigh": lambda at: fastagop.solve(K, at.X, at.alpha, method="eigh").alpha,
    "solve, cg": lambda at: fastagop.solve(K, at.X, at.alpha, ridge=RIDGE, method="cg").alpha,
    "solve, cholesky+cg": lambda at: fastagop.solve(K, at.X, at.alpha, ridge=RIDGE, method="cholesky+cg").alpha,
    "solve, pairs": lambda at: fastagop.solve(PRODUCT, at.X, at.alpha, ridge=RIDGE).alpha,
    "solve, copies": lambda at: fastagop.solve(K, at.twice, at.twice, ridge=RIDGE).alpha,
    "settled": lambda at: fastagop.settled(Laplace("median"), at.X).bandwidth,
    "explain": lambda at: len(fastagop.explain("agop", K, at.X, at.alpha)),
    "explain a fit": lambda at: "blocks" in fastagop.explain(fastagop.RFMClassifier(Laplace("median")), at.X, at.y),
    "explain a search": lambda at: "blocks" in fastagop.explain(fastagop.RFMClassifierCV(2, 2), at.X, at.y),
    "autograd": backward,
    "collapse": lambda at: [f(at.X, at.y) for f in (collapse.nc1, collapse.nc2, collapse.cdnv, collapse.gram)],
    "collapse, pinv": lambda at: collapse.nc1(at.X, at.y, metric="pinv", weighting="classes"),
    "collapse, classifier": lambda at: [collapse.nc3(at.W, at.X, at.y), collapse.nc4(at.W, None, at.X, at.y)],
    "collapse, arrays": lambda at: collapse.nc1(at.n, at.codes),
    "accumulator": lambda at: accumulated(at, covariance=False),
    "accumulator, covariance": lambda at: accumulated(at, covariance=True),
    "network.agop": lambda at: [*network.agop(at.model, at.X).values()],
    "network.agop, sketch": lambda at: [*network.agop(at.model, at.X, sketch=5).values()],
    "network.agop, labels": lambda at: [*network.agop(at.model, [(at.X, at.codes)], outputs=losses).values()],
    "nfa_correlation": lambda at: [*network.nfa_correlation(at.model, at.X).values()],
    "fact": lambda at: [*network.fact(at.model, at.X, at.codes, loss=LOSS, weight_decay=0.1).values()],
    "fact_correlation": lambda at: [*network.fact_correlation(at.model, at.X, at.y, loss=LOSS).values()],
    "collapse_split": lambda at: measured(network.collapse_split(at.model, at.X, at.codes)),
    "collapse_split, batches": lambda at: measured(network.collapse_split(at.model, [(at.X, at.codes)], at.y)),
    "split": lambda at: measured({"": network.split(at.model[0], at.X, at.y)}),
    "patches": lambda at: of_patches(PatchMachine.fit(K, Window(2).patches(at.images), at.Y)),
    "conv layer": lambda at: fit_layer(at.images, at.y, ConvLayerSettings(K, Window(2), width=4), 0)(at.images),
    "spectrum": lambda at: fastagop.spectrum(gradients=at.X, bootstrap=5, random_state=0).intervals,
    "probes": lambda at: list(probed(at).scores.values()),
    "Deep RFM": lambda at: fitted(DeepRFMClassifier(K, 2, width=16, random_state=0), at, "predict_proba", "transform"),
    "Deep RFM, cos": lambda at: fitted(DeepRFMRegressor(K, 1, "cos", 16, 1.0, random_state=0), at, "transform"),
    "Deep RFM, module": lambda at: (
        DeepRFMRegressor(K, 1, random_state=0).fit(at.n, at.codes).to_module()(at.X).detach()
    ),
    "RFM": lambda at: fitted(RFMClassifier(K, **SMALL), at, "predict_proba", "feature_importances_", "transform"),
    "RFM, directions": lambda at: RFMClassifier(K, **SMALL).fit(at.n, at.codes).directions(2).vectors,
    "RFM, diagonal": lambda at: fitted(RFMRegressor(Gaussian("median"), diagonal=True, center=True, **SMALL), at),
    "RFM, pairs": lambda at: fitted(RFMClassifier(ProductLaplace("median"), diagonal=True, **SMALL), at),
    "RFM tree": lambda at: fitted(RFMTreeClassifier(K, leaf_size=12, **SMALL), at, "feature_importances_", "apply"),
    "RFM search": lambda at: fitted(RFMClassifierCV(2, 2, **SMALL), at),
    "mixed fit": lambda at: RFMRegressor(K, **SMALL).fit(at.many, at.many[:, 0]).predict(at.many),
}


def flat(found) -> list[torch.Tensor]:
    """All numbers of a result."""
    if isinstance(found, (list, tuple)):
        return [part for one in found for part in flat(one)]
    return [found if isinstance(found, torch.Tensor) else torch.from_numpy(np.asarray(found))]


@pytest.fixture
def elsewhere():
    """call(function): the same with a default device where no number is held."""

    def call(function, *args):
        torch.set_default_device("meta")
        try:
            return function(*args)
        finally:
            torch.set_default_device(None)

    return call


@pytest.mark.parametrize("name", CALLS)
def test_another_default_device_changes_nothing(name, at, elsewhere):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastagop.NumericalWarning)
        expected, found = (flat(result) for result in (CALLS[name](at), elsewhere(CALLS[name], at)))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("kind", [fastagop.RFMRegressor, fastagop.RFMTreeRegressor, fastagop.DeepRFMRegressor])
def test_files(kind, at, elsewhere, tmp_path):
    size = {"depth": 1, "width": 8} if kind is fastagop.DeepRFMRegressor else {"iterations": 1}
    estimator = kind(K, random_state=0, **size)
    assert np.array_equal(elsewhere(saved, estimator, at, tmp_path), estimator.predict(at.n))
