"""Which layers are measured: what is left out, and modules under several names."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastagop import network
from fastagop.network import sites

LABELS = torch.arange(9) % 3
MEASURES = (network.agop, network.nfa_correlation, lambda model, X: network.collapse_split(model, X, LABELS))


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(2 * input)


def test_layers_with_a_forward_of_their_own_are_left_out():
    """As adapters have it, or as accelerate sets it."""
    hooked = nn.Linear(4, 4)
    hooked.forward = lambda input: 2 * nn.Linear.forward(hooked, input)
    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.ReLU(), hooked, nn.Linear(4, 3))
    X = torch.randn(9, 4)
    for measure in MEASURES:
        with pytest.warns(UserWarning, match=r"leave out '1' \(Own\): it has a forward of its own; '3' \(Linear\)"):
            found = measure(model, X)
        assert list(found) == ["0", "4"]
        assert list(found.skipped) == ["1", "3"]
    with pytest.raises(TypeError, match=r"'1' is a Own .* layers=\['0', '4'\]"):
        network.collapse_split(model, X, LABELS, "*")
    with pytest.raises(TypeError, match=r"'3' is a Linear .*; name other layers"):
        network.collapse_split(model, X, LABELS, "3")
    with pytest.raises(ValueError, match=r"none is left that can be measured\. '0': it has a forward of its own"):
        network.collapse_split(nn.Sequential(Own(4, 3)), X, LABELS)


class Aliases(nn.Module):
    """Two layers, each under two names."""

    def __init__(self):
        super().__init__()
        self.head, self.trunk = nn.Linear(4, 3), nn.Linear(4, 4)
        self.parts = nn.ModuleList([self.trunk, self.head])

    def forward(self, x):
        return self.head(torch.relu(self.trunk(x)))


@pytest.mark.parametrize("function", [network.agop, network.nfa_correlation, network.collapse_split])
def test_a_layer_of_several_names_is_one_layer(function):
    X, rest = torch.randn(9, 4), (LABELS,) if function is network.collapse_split else ()
    for layers, names in (
        (None, ["head", "trunk"]),
        ("*", ["head", "trunk"]),
        ("parts.*", ["parts.0", "parts.1"]),
        (["head", "parts.1"], ["head"]),
        (["parts.1", "trunk"], ["trunk", "parts.1"]),
    ):
        assert list(function(Aliases(), X, *rest, layers=layers)) == names
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    if function is not network.collapse_split:  # which takes layers that are called once
        assert list(function(tied, X, "*")) == ["0", "3"]


class LowRank(nn.Module):
    """A Linear layer whose weight is a product of two factors."""

    def __init__(self, d_in, d_out, rank):
        super().__init__()
        self.weight_up = nn.Parameter(torch.randn(d_out, rank))
        self.weight_down = nn.Parameter(torch.randn(rank, d_in))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return (x @ self.weight_down.T) @ self.weight_up.T + self.bias


def test_an_entry_of_the_table_makes_a_class_of_layers_one_that_is_measured(monkeypatch):
    """It has the AGOP and the correlations of a Linear layer with that product for a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(6, 8, 2), nn.Tanh(), nn.Linear(8, 3)).double()
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), model[2]).double()
    plain[0].weight = nn.Parameter(model[0].weight_up @ model[0].weight_down)
    plain[0].bias = model[0].bias
    X = torch.randn(20, 6).double()
    with pytest.warns(UserWarning, match=r"leave out '0' \(LowRank\): it has a forward of its own"):
        assert list(network.nfa_correlation(model, X)) == ["2"]
    row = sites.LayerKind("linear", weights=lambda module: (module.weight_up @ module.weight_down, module.bias))
    monkeypatch.setitem(sites.LAYERS, LowRank, row)
    for measure in (network.agop, network.nfa_correlation):
        found, wanted = measure(model, X), measure(plain, X)
        assert list(found) == ["0", "2"]
        torch.testing.assert_close(dict(found), dict(wanted))
    found, wanted = (network.collapse_split(each, X, torch.arange(20) % 3)["0"].nc1 for each in (model, plain))
    assert found == pytest.approx(wanted)
    with pytest.raises(ValueError, match="kind must be one of 'linear', 'convolution', 'embedding', got 'conv'"):
        sites.LayerKind("conv")


class Dense(nn.Module):
    """A layer whose weight has another name than torch's; the bias has a row for a whole batch."""

    def __init__(self):
        super().__init__()
        self.W, self.shift = nn.Parameter(torch.eye(4)), nn.Parameter(torch.zeros(1, 4))

    def forward(self, x):
        return x @ self.W.T + self.shift


class Listed(nn.Module):
    """A model that multiplies by matrices of a list, and by one of its own."""

    def __init__(self):
        super().__init__()
        self.A, self.factors, self.o = nn.Parameter(torch.eye(4)), nn.ParameterList([torch.eye(4)]), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(x @ self.A @ self.factors[0]))


class Shifted(nn.Module):
    """A model whose own parameters are no weights: a table of positions, and a scale of channels."""

    def __init__(self):
        super().__init__()
        self.positions, self.scale = nn.Parameter(torch.ones(1, 4, 2)), nn.Parameter(torch.ones(4, 1, 1))
        self.o = parametrizations.orthogonal(nn.Linear(8, 3))

    def forward(self, x):
        return self.o(((x[:, :, None] + self.positions) * self.scale[:, 0]).flatten(1))


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_are_named_whatever_their_weights_are_called(measure):
    X = torch.randn(9, 4)
    for model, skipped in (
        (nn.Sequential(Dense(), nn.Linear(4, 3)), {"0": "it has a forward of its own, with the parameter 'W'"}),
        (
            Listed(),
            {
                "": "it has a forward of its own, with the parameter 'A'",
                "factors": "its parameters are used where nothing is seen of it",
            },
        ),
    ):
        with pytest.warns(UserWarning, match="leave out ('0'|the model itself) ") as caught:
            found = measure(model, X)
        assert found.skipped == skipped
        assert len(found) == len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(Shifted(), X).skipped == {}
    with pytest.raises(ValueError, match=r"must have a layer to measure \(.*has none: '0' \(Dense\): .*parameter 'W'"):
        measure(nn.Sequential(Dense()), X)


def test_a_layer_that_the_model_does_not_call_is_named_by_every_measure():
    for measure in MEASURES:
        model = Aliases()
        model.dead = nn.Linear(4, 4)
        with pytest.warns(UserWarning, match=r"leave out 'dead' \(Linear\): the model's forward does not call it"):
            assert list(measure(model, torch.randn(9, 4))) == ["head", "trunk"]
