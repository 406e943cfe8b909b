"""NFA correlation and collapse split of networks, against dense matrices and singular value decompositions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from fastagop import collapse, network

LABELS = torch.tensor([7, -3, 7, 100, -3, 7, 100, 7, -3])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mlp(*widths: int, inplace: bool = False) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=False), nn.ReLU(inplace=inplace))]
    return nn.Sequential(*layers[:-1])


# ---- Neural feature ansatz


@pytest.mark.parametrize("widths", [(12, 5, 7, 3), (3, 8, 2), (5, 5, 1)])  # narrowing, widening, square
def test_nfa_is_the_correlation_of_the_dense_matrices(widths):
    model, X = mlp(*widths).double(), torch.randn(9, widths[0], dtype=torch.float64)
    agops = network.agop(model, X)
    for name, found in network.nfa_correlation(model, X).items():
        W = model.get_submodule(name).weight.detach().numpy()
        values, vectors = np.linalg.eigh(agops[name].numpy())
        root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
        expected = np.corrcoef((W.T @ W).ravel(), root.ravel())[0, 1]
        assert found == pytest.approx(expected, abs=1e-7)  # square roots of eigenvalues that are zero up to rounding


def test_nfa_is_one_where_the_ansatz_holds():
    """f(x) = W x: AGOP and Gram matrix are W^T W; with orthonormal rows the square root is, too."""
    layer = nn.Linear(7, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(7, 3)).Q.T)
    assert network.nfa_correlation(layer, torch.randn(5, 7))[""] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("power", [-450, -200, -60, 60, 200, 450])
@pytest.mark.parametrize("measure", ["NFA", "FACT"])
def test_correlations_know_no_unit(measure, power):
    """Squares of entries of W^T W leave float64 long before weights do; their powers of two change no digit."""

    def correlations(model):
        if measure == "NFA":
            return network.nfa_correlation(model, X)
        return network.fact_correlation(model, X, X[:, 0], loss=lambda out, y: (out.sum(1) - y * unit).square() / unit)

    model, X, unit = mlp(6, 8, 3).double(), torch.randn(9, 6, dtype=torch.float64), 1.0
    plain = correlations(model)
    with torch.no_grad():
        unit = 2.0**power
        model[2].weight.mul_(unit)
    assert correlations(model) == pytest.approx(plain, rel=1e-9)


# ---- Collapse


@pytest.mark.parametrize("widths", [(6, 9), (6, 4), (6, 6)])
def test_split_is_that_of_the_singular_value_decomposition(widths):
    layer, y = nn.Linear(*widths).double(), LABELS
    X = torch.randn(9, 6, dtype=torch.float64) + 2 * torch.randn(104, 6, dtype=torch.float64)[y + 3]
    U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
    projected = X @ (Vh.T * S)
    stages = {"input": X, "projected": projected, "features": torch.tanh(projected @ U.T + layer.bias)}
    found = network.split(layer, X, y, torch.tanh)
    for stage, features in stages.items():
        assert found.nc1[stage] == pytest.approx(collapse.nc1(features.detach(), y), rel=1e-10)
        assert found.nc2[stage] == pytest.approx(collapse.nc2(features.detach(), y), rel=1e-10)


def test_collapse_split_follows_the_features_through_the_model():
    model, X = mlp(4, 6, 5, 3, inplace=True).double(), torch.randn(9, 4, dtype=torch.float64)
    found = network.collapse_split(model, X, LABELS, batch_size=2)
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4)
    assert list(found) == ["0", "2", "4"]
    for name, other in network.collapse_split(model, loader).items():  # other batches round otherwise
        assert other.nc1 == pytest.approx(found[name].nc1, rel=1e-12)
        assert other.nc2 == pytest.approx(found[name].nc2, rel=1e-12)
    with torch.no_grad():
        after = {name: model[: int(name)](X.clone()) for name in found}
        out = model(X.clone())
    for name, split in found.items():
        assert split.nc1["input"] == pytest.approx(collapse.nc1(after[name], LABELS), rel=1e-10)
    assert found["0"].nc1["features"] == pytest.approx(found["2"].nc1["input"], rel=1e-10)
    assert found["2"].nc2["features"] == pytest.approx(found["4"].nc2["input"], rel=1e-10)
    assert found["4"].nc1["features"] == pytest.approx(collapse.nc1(out, LABELS), rel=1e-10)  # no ReLU after a readout


def test_dead_features_are_infinitely_far_from_collapse():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.bias.fill_(-1e3)
    found = network.split(layer, torch.randn(9, 4), LABELS)
    assert found.nc1["features"] == math.inf == found.nc2["features"]
    assert found.nc1["projected"] < math.inf


def weight_norm(layer):
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(layer)
    return lambda: layer.weight_g.mul_(torch.linspace(0.1, 5, 8)[:, None])


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.3)
    return lambda: layer.weight_orig.mul_(torch.linspace(0.1, 5, 8)[:, None])


def spectral(layer):
    torch.nn.utils.parametrizations.spectral_norm(layer)
    return lambda: layer.parametrizations.weight.original.mul_(torch.linspace(0.1, 5, 8)[:, None])


@pytest.mark.parametrize("made", [weight_norm, pruned, spectral])
def test_split_takes_the_weight_that_the_forward_runs_with(made):
    """Weights are made anew by every forward: what the last one left is stale once the parameters have changed."""
    layer, X = nn.Linear(6, 8), torch.randn(9, 6)
    change = made(layer)
    layer(X)
    with torch.no_grad():
        change()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    found = network.split(layer, X, LABELS)
    assert found.nc1 == network.split(layer, X, LABELS).nc1
    assert layer.training
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    through = network.collapse_split(nn.Sequential(layer, nn.ReLU()), X, LABELS)["0"]
    assert found.nc1 == through.nc1
    assert found.nc2 == through.nc2


class Added(nn.Linear):
    """W + A, as low-rank adapters have it."""

    def __init__(self, *widths: int):
        super().__init__(*widths)
        self.A = nn.Parameter(torch.randn(self.weight.shape))

    def forward(self, input):
        return nn.functional.linear(input, self.weight + self.A, self.bias)


def test_split_refuses_a_forward_of_its_own():
    hooked = nn.Linear(4, 3)
    hooked.forward = lambda input: 2 * nn.Linear.forward(hooked, input)
    for layer in (Added(4, 3), hooked):
        with pytest.raises(
            TypeError, match=r"layer must be a plain torch.nn.Linear, got a \w+ with a forward of its own"
        ):
            network.split(layer, torch.randn(9, 4), LABELS)


def test_a_weight_that_changes_with_every_batch_is_refused():
    model, X = mlp(4, 6, 3).double(), torch.randn(9, 4, dtype=torch.float64)

    def grow(layer, _):
        layer.weight.data.mul_(1.5)

    model[0].register_forward_pre_hook(grow)
    with pytest.raises(ValueError, match="weight"):
        network.nfa_correlation(model, X, batch_size=1)
