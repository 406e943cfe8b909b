"""The public functions and estimators as a user with a strict type checker calls them: `make types` checks it.

`tests/test_types.py` runs it, so that what checks is also what works.
"""
# pyright: strict

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastagop
from fastagop import autograd, collapse, convolution, datasets, network, probes


def operations(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    kernel = fastagop.Laplace(2.0)
    bandwidth: float = kernel.bandwidth
    K: torch.Tensor = fastagop.kernel_matrix(kernel, X, ridge=0.1 * bandwidth)
    solution: fastagop.Solution = fastagop.solve(kernel, X, Y, ridge=1e-3, method="cholesky")
    residual: float = solution.residual
    product: torch.Tensor = fastagop.kernel_matmul(kernel, X, V=solution.alpha)
    G: torch.Tensor = fastagop.gradients(kernel, X, solution.alpha)
    M: torch.Tensor = fastagop.agop(kernel, X, solution.alpha, reduction="sum", center=True, memory_limit=1e9)
    text: str = fastagop.explain("agop", kernel, X, solution.alpha)
    assert residual < 1
    assert bool(text)
    assert len(K) == len(product) == len(G)
    return M


def kernels(X: torch.Tensor) -> list[float]:
    mixed = fastagop.Gaussian(1.0) + fastagop.Laplace("median") * 0.5
    settled = fastagop.settled(fastagop.Laplace(("median", 0.5)), X)
    others = [
        fastagop.Matern52(1.0),
        fastagop.GeneralisedLaplace(1.0, 1.2),
        fastagop.ProductLaplace(2.0),
        fastagop.LpLaplace(1.0, 1.0, 2.0),
        fastagop.Polynomial(2),
        fastagop.ArcCosine(1),
        fastagop.NTK(2),
        settled,
    ]
    assert bool(mixed.get_params())
    return [float(kernel(X)[0, 0]) for kernel in others]


def estimators(X: np.ndarray[Any, np.dtype[np.float64]], labels: list[str], folder: Path) -> float:
    deep = fastagop.DeepRFMClassifier(depth=1, width=16, random_state=0, device="cpu").fit(X, labels)
    nc1: float = deep.layers_[0].nc1["projected"]
    deep.save(folder / "deep.safetensors")
    again = fastagop.load(folder / "deep.safetensors", device="cpu")
    rfm = fastagop.RFMRegressor(fastagop.Laplace("median"), iterations=1, dtype=torch.float64).fit(X, X[:, 0])
    tree = fastagop.RFMTreeClassifier(class_weight={"a": 2.0, "b": 1.0}).fit(X, labels, sample_weight=np.ones(len(X)))
    search = fastagop.RFMClassifierCV(n_settings=1, cv="holdout", random_state=0).fit(X, labels)
    best: dict[str, Any] = search.best_params_
    score: float = rfm.score(X, X[:, 0]) + deep.score(X, labels)
    assert bool(best)
    assert nc1 >= 0
    assert len(again.predict(X)) == len(tree.predict(X))
    module: torch.nn.Module = deep.to_module()
    assert module is not None
    return score


def measures(X: torch.Tensor, y: torch.Tensor, M: torch.Tensor) -> float:
    spectrum: fastagop.Spectrum = fastagop.spectrum(M, 2)
    rank: float = spectrum.effective_rank
    values = [collapse.nc1(X, y), collapse.nc2(X, y), collapse.cdnv(X, y)]
    model = torch.nn.Sequential(torch.nn.Linear(X.shape[1], 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    correlations = network.nfa_correlation(model, X)
    layer: float = correlations["0"]
    found: probes.Probes = probes.fit({"first": X, "second": 2 * X}, y, iterations=1, random_state=0)
    assert len(found.scores) == 2
    assert layer <= 1
    return rank + sum(values)


def derivatives(X: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    points = X.clone().requires_grad_()
    autograd.kernel_matmul(fastagop.Gaussian(1.0), points, points, alpha).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert points.grad is not None
    return points.grad


def images() -> torch.Tensor:
    patches = convolution.Window(2).patches(torch.rand(3, 1, 4, 4))
    return convolution.patch_kernel_matrix(fastagop.Laplace(1.0), patches)


def run(folder: Path) -> None:
    X, y = datasets.load("digits", n=60)
    Y = torch.nn.functional.one_hot(y).to(X)
    M = operations(X, Y)
    assert all(np.isfinite(kernels(X)))
    two = X[:, :8].double().numpy()
    assert np.isfinite(estimators(two, ["a" if row > 0 else "b" for row in two[:, 2]], folder))
    assert np.isfinite(measures(X, y % 2, M))
    assert derivatives(X, Y).shape == X.shape
    assert images().shape == (3, 3)
