"""Chosen outputs, functions of outputs and random combinations of them, against the Jacobians of single samples."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastagop import network

K = 7


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def build(n: int = 6):
    """A convolution with groups, one without, a narrowing layer and a readout; inputs."""
    conv = nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten()
    model = nn.Sequential(*conv, nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, K)).double()
    return model, torch.randn(n, 2, 4, 4, dtype=torch.float64)


LAYERS = ["0", "2", "4", "6"]


def truth(model, X, f, layer):
    """sum of J^T J of f(model(x), sample's index) with respect to what enters a Linear layer."""
    total, index = 0.0, int(layer)
    for i, x in enumerate(X):
        h = model[:index](x[None]).detach()
        J = torch.autograd.functional.jacobian(lambda h, i=i: f(model[index:](h), i).flatten(), h).flatten(1)
        total = total + J.T @ J
    return total


@pytest.mark.parametrize(
    "outputs", [[0, 3], 3, -1, slice(1, None, 2), torch.tensor([6, 0]), np.array([2]), range(3), (np.int64(1),)]
)
def test_chosen_outputs(outputs, relative):
    model, X = build()
    index = list(outputs) if isinstance(outputs, range) else outputs
    found = network.agop(model, X, outputs=outputs, reduction="sum")
    assert list(found) == LAYERS
    for layer in ("4", "6"):
        expected = truth(model, X, lambda out, _: out[0, index].reshape(-1), layer)
        assert relative(found[layer], expected) <= 1e-12


def test_outputs_add_up():
    model, X = build()
    parts = [network.agop(model, X, outputs=c) for c in range(K)]
    for name, M in network.agop(model, X).items():
        torch.testing.assert_close(sum(part[name] for part in parts), M, rtol=1e-12, atol=1e-14)


FUNCTIONS = {
    "log-probability": lambda out: out.log_softmax(1)[:, 2],
    "logit difference": lambda out: out[:, 0] - out[:, 1],
    "several": lambda out: torch.stack([out[:, 0] * out[:, 1], out.exp().sum(1)], 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_outputs(name, relative):
    model, X = build()
    found = network.agop(model, X, outputs=FUNCTIONS[name], reduction="sum", batch_size=4)
    for layer in ("4", "6"):
        assert relative(found[layer], truth(model, X, lambda out, _: FUNCTIONS[name](out), layer)) <= 1e-12
    assert set(network.nfa_correlation(model, X, outputs=FUNCTIONS[name])) == set(LAYERS)


def loss(out, labels):
    return nn.functional.cross_entropy(out, labels, reduction="none")


def test_losses_take_the_labels_of_the_batches(relative):
    model, X = build()
    y = torch.arange(len(X)) % K
    found = network.agop(model, DataLoader(TensorDataset(X, y), batch_size=4), outputs=loss, reduction="sum")
    for layer in ("4", "6"):
        assert relative(found[layer], truth(model, X, lambda out, i: loss(out, y[i : i + 1]), layer)) <= 1e-12
    with pytest.raises(ValueError, match=r"outputs takes labels .* the batches of X bring none"):
        network.agop(model, X, outputs=loss)


class Several(nn.Module):
    """A model that returns more than one tensor."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.body(x), "hidden": x}


def test_models_that_return_more_than_a_tensor():
    model, X = Several(), torch.randn(5, 4)
    W = model.body.weight.detach()
    found = network.agop(model, X, outputs=lambda out: out["logits"])["body"]
    torch.testing.assert_close(found, W.T @ W)


def test_a_loss_may_be_a_module():
    model, X, y = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(6, 4), torch.arange(6) % 3
    expected = network.agop(
        model, [(X, y)], outputs=lambda out, y: nn.functional.cross_entropy(out, y, reduction="none")
    )
    found = network.agop(model, [(X, y)], outputs=nn.CrossEntropyLoss(reduction="none"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    squares = network.agop(model, [(X, y)], outputs=nn.Softmax(1))  # of one argument
    assert torch.equal(squares["0"], network.agop(model, X, outputs=lambda out: out.softmax(1))["0"])


BAD = {
    "scalar": (ValueError, "outputs must return a row for each sample", {"outputs": lambda out: out.mean()}),
    "no tensor": (TypeError, "outputs must return one floating tensor", {"outputs": lambda out: out.argmax(1)}),
    "NaN": (ValueError, "outputs returns NaN", {"outputs": lambda out: out[:, 0] * math.nan}),
    "mixing": (ValueError, "outputs: the function mixes the samples", {"outputs": lambda out: out - out.mean(0)}),
    "outside": (ValueError, "model's 7 outputs: 7 is not", {"outputs": [0, 7]}),
    "twice": (ValueError, "one is given twice", {"outputs": [0, -7]}),
    "none": (ValueError, "at least one", {"outputs": []}),
    "empty slice": (ValueError, "none is chosen", {"outputs": slice(0, 0)}),
    "words": (TypeError, "outputs must be None, a function", {"outputs": "all"}),
    "fractions": (TypeError, "outputs must be None, a function", {"outputs": [0.5]}),
    "mask": (TypeError, "outputs must be None, a function", {"outputs": torch.ones(7, dtype=torch.bool)}),
    "one sign": (ValueError, "sketch must be an integer >= 2", {"sketch": 1}),
    "half a sign": (ValueError, "sketch must be an integer >= 2", {"sketch": 2.5}),
    "seed": (ValueError, "seed must be an integer from 0", {"sketch": 2, "seed": "a"}),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    error, message, options = BAD[name]
    model, X = build()
    with pytest.raises(error, match=message):
        network.agop(model, X, **options)


# ---- Sketches


def test_a_sketch_is_unbiased_and_knows_its_error():
    """200 seeds: the mean is within 4 standard errors of the exact matrix, and reported errors are those that occur."""
    model, X = build(n=4)
    exact = network.agop(model, X)
    draws = [network.agop(model, X, sketch=4, seed=seed, batch_size=3) for seed in range(200)]
    for name, M in exact.items():
        found = torch.stack([draw[name] for draw in draws]).flatten(1)
        reported = torch.tensor([draw.standard_error[name] for draw in draws])
        error = (found - M.flatten()).norm(dim=1)
        spread = float(reported.square().mean().sqrt())
        assert float((found.mean(0) - M.flatten()).norm()) <= 4 * spread / 200**0.5, name
        assert float(error.square().mean().sqrt()) == pytest.approx(spread, rel=0.15), name
        assert float((error <= 2 * reported).double().mean()) >= 0.9, name


def test_a_sketch_of_enough_signs_is_exact_up_to_its_error():
    model, X = build()
    exact, found = network.agop(model, X), network.agop(model, X, sketch=500)
    for name, M in exact.items():
        assert float((found[name] - M).norm()) <= 3 * found.standard_error[name] <= 0.3 * float(M.norm())
        assert torch.equal(found[name], found[name].mT)
    assert exact.standard_error == {}
    assert pickle.loads(pickle.dumps(found)).standard_error == found.standard_error
    close = network.nfa_correlation(model, X, sketch=500)
    for name, value in network.nfa_correlation(model, X).items():
        assert close[name] == pytest.approx(value, abs=0.05)


def test_seeds_and_batches():
    """The same seed gives the same signs to every sample, whatever the batches; another one gives others."""
    model, X = build()
    first = network.agop(model, X, sketch=40, seed=3)
    again = network.agop(model, X, sketch=40, seed=torch.Generator().manual_seed(3))
    other = network.agop(model, X, sketch=40, seed=4)
    parts = network.agop(model, X, sketch=40, seed=3, batch_size=4)
    for name, M in first.items():
        assert torch.equal(M, again[name])
        assert first.standard_error[name] == again.standard_error[name]
        torch.testing.assert_close(M, parts[name], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(M, other[name])
    state = torch.get_rng_state()
    network.agop(model, X, sketch=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sketch_of_one_output_is_exact(relative):
    """A sign times one output: its square is 1."""
    model, X = build()
    exact, found = network.agop(model, X, outputs=2), network.agop(model, X, outputs=2, sketch=2)
    for name, M in exact.items():
        assert relative(found[name], M) <= 1e-12
        assert found.standard_error[name] <= 1e-6 * float(M.norm())


def grow(layer, x):
    layer.weight.data.copy_(layer.clean * (1 + x.abs().mean()))


def test_a_sketch_where_a_weight_changes_with_every_batch():
    """Sums of earlier weights move to the input, those of the error are taken there."""
    model, X = build(n=4)
    for layer in (model[0], model[4]):
        layer.clean = layer.weight.detach().clone()
        layer.register_forward_pre_hook(lambda m, args: grow(m, args[0]))
    exact = network.agop(model, X, batch_size=1)
    draws = [network.agop(model, X, batch_size=1, sketch=10, seed=seed) for seed in range(20)]
    for name, M in exact.items():
        error = sum(float((draw[name] - M).norm()) ** 2 for draw in draws) / 20
        reported = sum(draw.standard_error[name] ** 2 for draw in draws) / 20
        assert 0.4 <= error / reported <= 2.5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sketches_in_narrower_dtypes(dtype):
    model, X = build(n=30)
    exact = network.agop(model, X)
    found = network.agop(model.to(dtype), X.to(dtype), sketch=100)
    for name, M in exact.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - M).norm()) <= 3 * found.standard_error[name] + 0.02 * float(M.norm())


@pytest.mark.parametrize("mask", [[True, False], [True, False, True], (np.True_,), [torch.tensor(True)], True])
def test_a_mask_is_no_list_of_indices(mask):
    with pytest.raises(TypeError, match=r"^outputs must be None, a function of the model's output, or indices"):
        network.agop(nn.Sequential(nn.Linear(5, 3)), torch.ones(6, 5), outputs=mask)


@pytest.mark.parametrize(
    ("model", "X"),
    [
        (nn.Linear(5, 3), torch.ones(9, 7)),
        (nn.Linear(5, 3), torch.ones(9)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.ones(9, 1, 8, 8)),
        (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), torch.ones(9, 4)),
        (nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)), torch.ones(9, 4)),
    ],
    ids=["Linear", "numbers", "Conv2d", "BatchNorm1d", "LayerNorm"],
)
def test_samples_of_another_shape_are_named(model, X):
    shape = str(tuple(X.shape[1:])).replace("(", r"\(").replace(")", r"\)")
    text = f"^X must have samples of a shape that the model takes, .* it fails on 2 samples of shape {shape} "
    with pytest.raises(ValueError, match=text) as caught:
        network.agop(nn.Sequential(model), X)
    assert isinstance(caught.value, RuntimeError)  # as torch's own is


def test_models_of_several_inputs_are_told_how():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, X, other):
            return self.layer(X) + other

    with pytest.raises(TypeError, match="model must take one tensor, a batch of X; one of several inputs"):
        network.agop(Two(), torch.ones(6, 5))
