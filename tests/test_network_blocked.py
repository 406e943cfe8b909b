"""Layers whose gradient a model blocks: the right AGOP, or an error that names the layer; zero where it is zero."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastagop import network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Wrapped(nn.Module):
    """Layers a (4, 6), b (6, 6), c (6, 5), o (5, 3) and a function of them and the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b, self.c, self.o = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.function(self, x)


def again(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def block(m, h):
    return torch.tanh(m.b(torch.tanh(h)))


CHECKPOINTED = {
    "first": lambda m, x: m.o(torch.tanh(m.c(m.b(again(lambda x: torch.tanh(m.a(x)), x))))),
    "middle": lambda m, x: m.o(torch.tanh(m.c(again(lambda h: block(m, h), m.a(x))))),
    "all": lambda m, x: again(lambda x: m.o(torch.tanh(m.c(block(m, m.a(x))))), x),
    "twice": lambda m, x: m.o(m.c(again(lambda h: block(m, h), again(lambda h: block(m, h), m.a(x))))),
    "nested": lambda m, x: m.o(again(lambda h: torch.tanh(m.c(again(lambda g: block(m, g), h))), m.a(x))),
    "two inputs": lambda m, x: m.o(m.c(again(lambda g, h: torch.tanh(m.b(g)) * h, *2 * (m.a(x),)))),
    "beside": lambda m, x: m.o(torch.tanh(m.c(again(lambda h: block(m, h), m.a(x)) + m.b(m.a(x))))),
}


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_reentrant_checkpoints(name, size, differences, relative):
    model, X = Wrapped(CHECKPOINTED[name]).double(), torch.randn(7, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        if size > 1:  # a model of which no batch has two samples is run as it comes, and torch warns
            warnings.simplefilter("error")  # torch's own, of checkpoints whose inputs ask for no gradients
        else:
            warnings.simplefilter("ignore")
        found = network.agop(model, X, reduction="sum", batch_size=size)
    assert list(found) == ["a", "b", "c", "o"]
    for layer, M in found.items():
        assert relative(M, differences(model, X, layer)) <= 1e-7, layer
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def quiet(function, mode):
    def run(*args):
        with mode():
            return function(*args)

    return run


def frozen(m, x):
    return m.o(torch.tanh(m.c(quiet(lambda x: torch.tanh(m.b(torch.tanh(m.a(x)))), torch.no_grad)(x))))


def inference(m, x):
    h = quiet(lambda x: torch.tanh(m.a(x)), lambda: torch.inference_mode(True))(x)
    return m.o(m.c(torch.tanh(m.b(h.clone()))))


def through_numpy(m, x):
    return m.o(m.c(torch.tanh(m.b(torch.from_numpy(m.a(x).detach().numpy())))))


# name: (forward, the layers that are blocked, what the message says)
DETACHED, QUIET = "detaches it", "without gradients"
BLOCKED = {
    "no_grad": (frozen, "ab", QUIET),
    "inference_mode": (inference, "a", QUIET),
    "detach": (lambda m, x: m.o(m.c(torch.tanh(m.b(torch.tanh(m.a(x)).detach())))), "a", DETACHED),
    "data": (lambda m, x: m.o(m.c(torch.tanh(m.b(torch.tanh(m.a(x)).data)))), "a", DETACHED),
    "numpy": (through_numpy, "a", DETACHED),
    "integers": (lambda m, x: m.o(m.c(m.b((9 * m.a(x)).int().double()))), "a", DETACHED),
    "comparison": (lambda m, x: m.o(m.c(m.b((m.a(x) > 0).double()))), "a", DETACHED),
    "one call of two": (
        lambda m, x: m.o(m.c(torch.tanh(m.b(m.a(x))) + torch.tanh(m.b(2 * m.a(x))).detach())),
        "ab",
        DETACHED,
    ),
    "first call of two": (
        lambda m, x: m.o(m.c(torch.tanh(m.b(torch.tanh(m.b(m.a(x)).detach()) + m.a(x))))),
        "ab",
        DETACHED,
    ),
    "before a no_grad part": (
        lambda m, x: m.o(quiet(m.c, torch.no_grad)(torch.tanh(m.b(m.a(x))))),
        "abc",
        "detaches it|without gradients",
    ),
    "in a checkpoint": (
        lambda m, x: m.o(m.c(again(lambda h: torch.tanh(m.b(h).detach()) + h, m.a(x)))),
        "b",
        "without gradients",
    ),
    "everything": (lambda m, x: m.o(m.c(m.b(m.a(x)))).detach(), "abco", DETACHED),
}


@pytest.mark.parametrize("size", [1, 256])
@pytest.mark.parametrize("name", BLOCKED)
def test_blocked_gradients_are_refused_by_name(name, size, differences, relative):
    function, layers, message = BLOCKED[name]
    model, X = Wrapped(function).double(), torch.randn(6, 4, dtype=torch.float64)
    rest = ", ".join(repr(layer) for layer in "abco" if layer not in layers)
    with pytest.raises(ValueError, match=f"depend on '{layers[0]}', but its forward.*({message})") as caught:
        network.agop(model, X, batch_size=size)
    assert (f"layers=[{rest}]" in str(caught.value)) == bool(rest)
    for layer in layers:
        with pytest.raises(ValueError, match=f"depend on '{layer}'"):
            network.nfa_correlation(model, X, layer, batch_size=size)
    if rest:
        for layer, M in network.agop(model, X, rest.replace("'", "").split(", "), reduction="sum").items():
            if (name, layer) != ("in a checkpoint", "a"):  # one of its two ways is detached, as autograd sees it
                assert relative(M, differences(model, X, layer)) <= 1e-6, layer


ZERO = {
    "dead ReLU": (lambda m, x: m.o(m.c(torch.relu(m.b(m.a(x)) - 1e3))), "ab"),
    "sign": (lambda m, x: m.o(m.c(torch.sign(m.b(m.a(x))))), "ab"),
    "round": (lambda m, x: m.o(m.c(torch.round(m.b(m.a(x))))), "ab"),
    "times zero": (lambda m, x: m.o(m.c(m.a(x) + 0 * m.b(m.a(x)))), "b"),
    "detached times zero": (lambda m, x: m.o(m.c(m.a(x) + 0 * m.b(m.a(x)).detach())), "b"),
    "result unused": (lambda m, x: (m.b(m.a(x)), m.o(m.c(m.a(x))))[1], "b"),
    "unused under no_grad": (lambda m, x: (quiet(m.b, torch.no_grad)(m.a(x)), m.o(m.c(m.a(x))))[1], "b"),
    "only its shape": (lambda m, x: m.o(m.c(m.a(x)))[:, : m.b(m.a(x)).shape[1]], "b"),
}


@pytest.mark.parametrize("size", [1, 256])
@pytest.mark.parametrize("name", ZERO)
def test_zero_where_it_is_zero(name, size, differences):
    function, layers = ZERO[name]
    model, X = Wrapped(function).double(), torch.randn(6, 4, dtype=torch.float64)
    found = network.agop(model, X, reduction="sum", batch_size=size)
    for layer, M in found.items():
        assert bool((M == 0).all()) == (layer in layers), layer
        torch.testing.assert_close(M, differences(model, X, layer), rtol=1e-6, atol=1e-6)


def test_an_implicit_layer_is_refused():
    """Its backward pass goes through one call many times: the sum of these is no gradient."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            z = torch.tanh(self.a(x))
            inner = z.detach().requires_grad_()
            if not torch.is_grad_enabled():
                return self.o(z)
            again = torch.tanh(self.a(inner))

            def solve(g):
                total = g
                for _ in range(3):
                    total = g + torch.autograd.grad(again, inner, total, retain_graph=True)[0]
                return total

            if z.requires_grad:
                z.register_hook(solve)
            return self.o(z)

    with pytest.raises(ValueError, match="no one gradient"):
        network.agop(Fixed(), torch.randn(5, 4), ["a"])
    assert list(network.agop(Fixed(), torch.randn(5, 4), ["o"])) == ["o"]
