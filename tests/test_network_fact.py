"""The FACT matrix against gradients written out, and at a stationary point of training with weight decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fastagop import network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def entropy(out, y):
    return nn.functional.cross_entropy(out, y, reduction="none")


def squares(out, Y):
    return 0.5 * (out - Y).square().sum(1)


def build(n: int = 8):
    """Convolutions with and without groups, Linear layers; inputs and labels."""
    conv = nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2, stride=2), nn.Flatten()
    model = nn.Sequential(*conv, nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(n, 2, 4, 4, dtype=torch.float64), torch.arange(n) % 3


def truth(model, X, y, decay):
    """-(1 / lambda) W^T dL/dW, L the mean of the losses, by torch's own gradients of the weights."""
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    grads = torch.autograd.grad(entropy(model(X), y).mean(), list(weights.values()))
    found = {}
    for (name, W), G in zip(weights.items(), grads, strict=True):
        layer = model.get_submodule(name.removesuffix(".weight"))
        groups = getattr(layer, "groups", 1)
        w, g = (t.detach().flatten(1).reshape(groups, len(W) // groups, -1) for t in (W, G))
        F = -(w.mT @ g) / decay
        found[name.removesuffix(".weight")] = F[0] if groups == 1 else F
    return found


@pytest.mark.parametrize("size", [None, 3, 1])
def test_it_is_that_of_the_gradients(size, relative):
    model, X, y = build()
    found, expected = (
        network.fact(model, X, y, loss=entropy, weight_decay=0.1, batch_size=size),
        truth(model, X, y, 0.1),
    )
    assert list(found) == list(expected)
    for name, F in expected.items():
        assert found[name].shape == F.shape
        assert relative(found[name], F) <= 1e-12, name
    loader = DataLoader(TensorDataset(X, y), batch_size=3)
    for name, F in network.fact(model, loader, layers=["2", "4"], loss=entropy, weight_decay=0.1).items():
        assert relative(F, expected[name]) <= 1e-12
    narrow = network.fact(model.float(), X.float(), y, loss=entropy, weight_decay=0.1)
    for name, F in narrow.items():
        assert F.dtype == torch.float32
        assert relative(F, expected[name]) <= 1e-4  # float32's gradients
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_it_is_the_gradient_at_the_input_times_the_input(relative):
    """The formula of the paper, sample by sample: -(1 / (n lambda)) sum_i (dL_i / dh_i) h_i^T."""
    model, X, y = build()
    h = model[:4](X).detach().requires_grad_()
    (g,) = torch.autograd.grad(entropy(model[4:](h), y).sum(), h)
    expected = -(g.T @ h.detach()) / (len(X) * 0.3)
    assert relative(network.fact(model, X, y, "4", loss=entropy, weight_decay=0.3)["4"], expected) <= 1e-12


def test_it_is_the_gram_matrix_where_training_has_come_to_rest(relative):
    """Ridge regression in closed form; two Linear layers by balanced factors of what is left of the singular values."""
    X, Y, decay = torch.randn(20, 6).double(), torch.randn(20, 3).double(), 0.2
    one = nn.Linear(6, 3, bias=False).double()
    with torch.no_grad():
        one.weight.copy_(torch.linalg.solve(X.T @ X / 20 + decay * torch.eye(6).double(), X.T @ Y / 20).T)
    W = one.weight.detach()
    assert relative(network.fact(one, X, Y, loss=squares, weight_decay=decay)[""], W.T @ W) <= 1e-10
    assert network.fact_correlation(one, X, Y, loss=squares)[""] == pytest.approx(1, abs=1e-10)
    inputs = torch.linalg.qr(X).Q * 20**0.5  # white, so that the product of the layers is a shrunken Y^T X / n
    U, S, Vh = torch.linalg.svd(Y.T @ inputs / 20, full_matrices=False)
    root = (S - decay).clamp(min=0).sqrt()
    two = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        two[0].weight.copy_(root[:, None] * Vh)
        two[1].weight.copy_(U * root)
    found = network.fact(two, inputs, Y, loss=squares, weight_decay=decay)
    for name, F in found.items():
        W = two.get_submodule(name).weight.detach()
        assert float(W.norm()) > 0.1
        assert relative(F, W.T @ W) <= 1e-10, name
    for value in network.fact_correlation(two, inputs, Y, loss=squares).values():
        assert value == pytest.approx(1, abs=1e-10)


def test_the_correlation_is_that_of_the_dense_matrices():
    model, X, y = build()
    found, matrices = network.fact_correlation(model, X, y, loss=entropy), truth(model, X, y, 1.0)
    assert list(found) == list(matrices)
    for name, F in matrices.items():
        W = model.get_submodule(name).weight.detach().flatten(1)
        W = W if F.ndim == 2 else W.reshape(len(F), len(W) // len(F), -1)
        expected = np.corrcoef((W.mT @ W).numpy().ravel(), F.numpy().ravel())[0, 1]
        assert found[name] == pytest.approx(expected, abs=1e-10)


class Attending(nn.Module):
    """Attention, a layer that is called twice and a checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        self.attention, self.twice = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)
        self.out, self.reentrant = nn.Linear(4, 3), reentrant

    def forward(self, x):
        h = self.attention(x, x, x)[0]
        run = lambda h: torch.tanh(self.twice(torch.tanh(self.twice(h))))  # noqa: E731
        h = run(h) if self.reentrant is None else checkpoint(run, h, use_reentrant=self.reentrant)
        return self.out(h.sum(1))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_attention_calls_and_checkpoints(reentrant, relative):
    model, X, y = Attending(reentrant).double(), torch.randn(6, 3, 4).double(), torch.arange(6) % 3
    found = network.fact(model, X, y, loss=entropy, weight_decay=1.0, batch_size=4)
    plain = Attending(None).double()
    plain.load_state_dict(model.state_dict())
    m = plain.attention
    inner = m.in_proj_weight, m.out_proj.weight, plain.twice.weight, plain.out.weight
    G = torch.autograd.grad(entropy(plain(X), y).mean(), inner)
    W = [*inner[0].chunk(3), *inner[1:]]
    expected = [-(w.T @ g).detach() for w, g in zip(W, [*G[0].chunk(3), *G[1:]], strict=True)]
    assert len(found) == 6
    for (name, F), one in zip(found.items(), expected, strict=True):
        assert relative(F, one) <= 1e-12, name


def test_embeddings_have_none_and_are_named():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.table(x).sum(1))

    X, y = torch.randint(0, 5, (6, 2)), torch.arange(6) % 3
    with pytest.warns(UserWarning, match=r"leave out 'table' \(Embedding\)"):
        found = network.fact(Bag(), X, y, loss=entropy, weight_decay=1.0)
    assert list(found) == ["out"]
    assert list(found.skipped) == ["table"]


def half(model, X, y):
    return network.fact(model.half(), X.half(), y, loss=entropy, weight_decay=1.0)


BAD = {
    "no decay": (
        ValueError,
        "weight_decay must be > 0",
        lambda m, X, y: network.fact(m, X, y, loss=entropy, weight_decay=0),
    ),
    "one loss": (
        ValueError,
        "loss must return a row for each sample.*reduction='none'",
        lambda m, X, y: network.fact(m, X, y, loss=nn.functional.cross_entropy, weight_decay=1),
    ),
    "a loss of outputs": (
        ValueError,
        r"loss must return one loss a sample, \(n,\), got shape",
        lambda m, X, y: network.fact_correlation(m, X, y, loss=lambda out, _: out),
    ),
    "no function": (TypeError, "loss must map outputs", lambda m, X, y: network.fact_correlation(m, X, y, loss="mse")),
    "words": (
        TypeError,
        r"^y must be a tensor or numbers, got \['a', ",
        lambda m, X, y: network.fact_correlation(m, X, ["a"] * len(X), loss=entropy),
    ),
    "no labels": (ValueError, "y must be given", lambda m, X, y: network.fact_correlation(m, X, loss=entropy)),
    "few labels": (
        ValueError,
        "y must have one row",
        lambda m, X, y: network.fact_correlation(m, X, y[:3], loss=entropy),
    ),
    "labels twice": (
        ValueError,
        "y must be None for an iterable X",
        lambda m, X, y: network.fact_correlation(m, [(X, y)], y, loss=entropy),
    ),
    "float16": (ValueError, "float16", half),
    "no gradient": (
        ValueError,
        "does not depend on them|constant",
        lambda m, X, y: network.fact_correlation(m, X, y, loss=lambda out, y: 0 * out[:, 0]),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call(*build())
