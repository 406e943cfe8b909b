"""Network measures of layers whose weights or inputs are made, masked or changed by hooks, against differences."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastagop import collapse, network

LABELS = torch.arange(9) % 3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def old_style(function, *args):
    """torch deprecates its older hooks; models in use still have them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.4)


def masked_twice(layer):
    return prune.random_unstructured(prune.ln_structured(layer, "weight", 0.2, n=2, dim=0), "weight", 0.3)


def doubled_input(layer):
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0] + 1,))
    return layer


def doubled_keyword(layer):
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: ((2 * args[0],) if args else args, {k: 2 * v for k, v in kwargs.items()}),
        with_kwargs=True,
    )
    return layer


def made_weight(layer):
    """The weight is a tensor that a pre-hook makes of two factors."""
    u, v = layer.weight.detach()[:, :2].clone(), layer.weight.detach()[:2].clone()
    del layer._parameters["weight"]
    layer.u, layer.v = nn.Parameter(u), nn.Parameter(v)
    layer.weight = torch.full((len(u), v.shape[1]), 7.0)  # stale until the layer runs
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.u @ m.v))
    return layer


def written_weight(layer):
    """A pre-hook that writes into the weight; ``data`` does it unseen by autograd."""
    clean = layer.weight.detach().clone()

    def hook(m, _):
        m.weight.data.copy_(clean.sign())

    layer.register_forward_pre_hook(hook)
    return layer


def scaled_output(layer):
    layer.register_forward_hook(lambda _, args, out: 3 * out)
    return layer


class Symmetric(nn.Module):
    def forward(self, W):
        return W.tanh()


def cached(layer):
    return parametrize.register_parametrization(layer, "weight", Symmetric())


HOOKED = {
    "weight_norm": lambda layer: old_style(nn.utils.weight_norm, layer),
    "spectral_norm": lambda layer: old_style(nn.utils.spectral_norm, layer),
    "parametrised weight_norm": parametrizations.weight_norm,
    "parametrised spectral_norm": parametrizations.spectral_norm,
    "parametrised": cached,
    "pruned": pruned,
    "pruned twice": masked_twice,
    "input doubled": doubled_input,
    "keyword doubled": doubled_keyword,
    "weight made": made_weight,
    "weight written": written_weight,
    "output scaled": scaled_output,
}


def build(hook) -> nn.Sequential:
    """A wide layer, a narrow one and a readout, all with the hook."""
    layers = [hook(nn.Linear(*shape).double()) for shape in ((4, 7), (7, 5), (5, 3))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def step(model: nn.Module, X: torch.Tensor) -> None:
    """One step of training: weights that hooks made before are those of the past."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    model(X).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", HOOKED)
def test_the_first_call_after_a_step_takes_the_present_weights(name, differences, relative):
    model, X = build(HOOKED[name]), torch.randn(9, 4, dtype=torch.float64)
    step(model, X)
    found = network.agop(model, X, reduction="sum", batch_size=4)
    assert list(found) == ["0", "2", "4"]
    for layer, M in found.items():
        assert relative(M, differences(model, X, layer)) <= 1e-7, layer


@pytest.mark.parametrize("name", HOOKED)
def test_other_measures_take_the_present_weights(name):
    model, X = build(HOOKED[name]), torch.randn(9, 4, dtype=torch.float64)
    step(model, X)
    first = network.nfa_correlation(model, X), network.collapse_split(model, X, LABELS, batch_size=4)
    model.eval()
    model(X)  # now everything is fresh
    again = network.nfa_correlation(model, X), network.collapse_split(model, X, LABELS)
    for layer, value in first[0].items():
        assert value == pytest.approx(again[0][layer], rel=1e-6, abs=1e-7)
        assert first[1][layer].nc1 == pytest.approx(again[1][layer].nc1, rel=1e-9)
    if name != "output scaled":
        assert first[1]["4"].nc1["features"] == pytest.approx(collapse.nc1(model(X).detach(), LABELS), rel=1e-9)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "parametrised", "pruned", "weight made"])
def test_weights_made_in_training_keep_their_graph(name):
    model, X = build(HOOKED[name]), torch.randn(9, 4, dtype=torch.float64)
    model.train()
    out = model(X)
    weight = model[2].weight
    network.agop(model, X)
    assert name == "parametrised" or model[2].weight is weight
    assert model[2].weight.requires_grad
    (out.sum() + model[2].weight.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_inside_cached(differences, relative):
    """What is cached in training mode is neither used nor replaced."""
    model, X = build(cached), torch.randn(5, 4, dtype=torch.float64)
    with parametrize.cached():
        kept = model[2].weight
        found = network.agop(model, X, reduction="sum")
        assert model[2].weight is kept
        assert model[0].weight.requires_grad
    for layer, M in found.items():
        assert relative(M, differences(model, X, layer)) <= 1e-7


def test_a_weight_that_changes_with_every_batch(differences, relative):
    """Each batch counts with its weight; there is no one W for the other measures."""

    def varying(layer):
        clean = layer.weight.detach().clone()

        def hook(m, args):
            m.weight.data.copy_(clean * (1 + args[0].abs().sum(1).mean()))

        layer.register_forward_pre_hook(hook)
        return layer

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), varying(nn.Linear(6, 5)), nn.Tanh(), varying(nn.Linear(5, 8)))
    model, X = model.double(), torch.randn(6, 4, dtype=torch.float64)
    found = network.agop(model, X, reduction="sum", batch_size=1)
    for layer, M in found.items():
        with torch.no_grad():  # the step of the differences must not change the weight of the layer itself
            expected = sum(differences(_frozen(model, x), x[None], layer) for x in X)
        assert relative(M, expected) <= 1e-6, layer
    for measure in (
        lambda: network.nfa_correlation(model, X, batch_size=1),
        lambda: network.collapse_split(model, X, LABELS[:6], batch_size=1),
    ):
        with pytest.raises(ValueError, match="the weight of '2' changes"):
            measure()


def _frozen(model, x):
    """The model with the weights that it has for a sample, and no hooks."""
    model(x[None])
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8)).double()
    plain.load_state_dict(model.state_dict())
    return plain


class Twice(nn.Module):
    """One layer called twice, each time with a weight that its hook makes anew."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(5, 4), nn.Linear(4, 3)
        self.up = nn.Linear(4, 5)
        self.a.register_forward_pre_hook(self.other)

    @staticmethod
    def other(layer, _):
        layer.weight.data.mul_(-0.5 if layer.weight.sum() > 0 else -2.0)

    def forward(self, x):
        return self.o(torch.tanh(self.a(self.up(torch.tanh(self.a(x))))))


def test_one_layer_with_two_weights_in_one_pass(differences, relative):
    model, X = Twice().double(), torch.randn(6, 5, dtype=torch.float64)
    with torch.no_grad():
        model.a.weight.abs_()
    found = network.agop(model, X, reduction="sum", batch_size=2)
    for layer, M in found.items():
        assert relative(M, differences(model, X, layer)) <= 1e-6, layer


class Hyper(nn.Module):
    """A layer whose weight other layers make: gradients of these pass through it."""

    def __init__(self):
        super().__init__()
        self.make, self.fc = nn.Linear(3, 12), nn.Linear(4, 3)
        del self.fc._parameters["weight"]
        self.fc.weight = torch.zeros(3, 4)

    def forward(self, x):
        self.fc.weight = self.make(x[0, :3]).view(3, 4)
        return torch.tanh(self.fc(x))


def test_a_weight_that_a_layer_makes(differences, relative):
    model, X = Hyper().double(), torch.randn(4, 4, dtype=torch.float64)
    found = network.agop(model, X, reduction="sum", batch_size=1)
    for layer in ("make", "fc"):
        assert relative(found[layer], differences(model, X, layer)) <= 1e-6, layer
    with pytest.raises(ValueError, match="mix the samples"):
        network.agop(model, X)


def test_tied_weights(differences, relative):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[2].weight = model[0].weight
    X = torch.randn(5, 4, dtype=torch.float64)
    for layer, M in network.agop(model, X, reduction="sum").items():
        assert relative(M, differences(model, X, layer)) <= 1e-7


def test_lazy_layers(differences, relative):
    model = nn.Sequential(nn.LazyLinear(7), nn.Tanh(), nn.LazyLinear(3)).double()
    X = torch.randn(5, 4, dtype=torch.float64)
    found = network.agop(model, X, reduction="sum")
    for layer, M in found.items():
        assert relative(M, differences(model, X, layer)) <= 1e-7
    assert all(parameter.requires_grad for parameter in model.parameters())
    lazy = nn.Sequential(nn.LazyLinear(7), nn.ReLU(), nn.LazyLinear(3)).double()
    assert list(network.collapse_split(lazy, X, LABELS[:5])) == ["0", "2"]


class Forces(nn.Module):
    """Outputs that are gradients which the model takes in its own forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(torch.tanh(self.a(x)))
            return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates(relative):
    """f = -dE/dx: the gradient of f at a layer's input goes through a derivative; by jacobians of jacobians."""
    model, X = Forces().double(), torch.randn(5, 4, dtype=torch.float64)
    found = network.agop(model, X, "a", reduction="sum")["a"]
    W, b, v = model.a.weight.detach(), model.a.bias.detach(), model.b.weight.detach()[0]
    expected = 0.0
    for x in X:
        t = torch.tanh(W @ x + b)
        J = W.T @ torch.diag(v * (-2 * t * (1 - t * t))) @ W  # of W^T (v (1 - t^2))
        expected = expected + J.T @ J
    assert relative(found, expected) <= 1e-12


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.vmap(torch.func.jacrev(f)), None])
def test_layers_inside_a_transform_are_refused_by_name(transform):
    """A tap cannot work there: torch says so in words of its own."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.c, self.o = nn.Linear(6, 6), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(6, 3)

        def inner(self, x):
            return torch.tanh(self.l(self.c(x[None])[0] if x.ndim == 1 else x))

        def forward(self, x):
            if transform is None:  # A part of the batch goes through a transform as a matrix.
                return self.o(torch.vmap(self.inner)(x.view(2, -1, 6)).view(-1, 6))
            return self.o(transform(self.inner)(x).flatten(1)[:, :6])

    X, y = torch.randn(6, 6), torch.arange(6) % 3
    for measure in (network.agop, network.nfa_correlation):
        with pytest.raises(ValueError, match=r"layers: '[lc]' is called inside a transform of torch\.func"):
            measure(Model(), X)
    with pytest.raises(network.NotAMatrixError, match="'l' is called inside a transform"):
        network.collapse_split(Model(), X, y, "l")
    model = Model()
    assert list(network.agop(model, X, "o")) == list(network.collapse_split(model, X, y, "o")) == ["o"]
