"""Networks whose measures need care: constant matrices, work in place, samples that mix a little."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastagop import collapse, network

N, D = 12, 6


@pytest.fixture
def X(normal) -> torch.Tensor:
    return normal(N, D, dtype=torch.float32)


def linear(normal, rows: int, columns: int, seed: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(normal(rows, columns, seed=seed) / columns**0.5)
        if bias:
            layer.bias.copy_(normal(rows, seed=seed + 50))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("repeated", [1, 12])  # narrower and wider than its input: other sums, other rounding
def test_a_constant_matrix_has_no_correlation(normal, dtype, repeated):
    """Rows of W that are constant: every entry of W^T W is the same number, but for rounding."""
    rows = torch.tensor([0.1, 0.3, 0.7]).repeat(repeated)
    for d in range(6, 25):  # what rounding leaves of the variance has either sign
        first = nn.Linear(d, len(rows), bias=False)
        with torch.no_grad():
            first.weight.copy_(rows[:, None].expand(-1, d))
        model = nn.Sequential(first, nn.Tanh(), linear(normal, 3, len(rows), 1)).to(dtype)
        X = normal(5, d, dtype=dtype)
        with pytest.raises(network.ConstantMatrixError, match="'0' has no NFA correlation"):
            network.nfa_correlation(model, X)
        assert list(network.nfa_correlation(model, X, "2")) == ["2"]


def of_stages(split) -> list[float]:
    return [*split.nc1.values(), *split.nc2.values()]


@pytest.mark.parametrize("bias", [False, True])
def test_a_nonlinearity_in_place_changes_no_measure(normal, X, bias):
    layer, y, before = linear(normal, 8, D, 2, bias), torch.arange(N) % 3, X.clone()
    plain = network.split(layer, X, y, torch.relu)
    assert of_stages(network.split(layer, X, y, torch.relu_)) == of_stages(plain)
    assert plain.nc1["projected"] != plain.nc1["features"]
    assert torch.equal(X, before)


class Skip(nn.Module):
    """h + relu(b(h)), in place or not."""

    def __init__(self, normal, in_place: bool):
        super().__init__()
        self.a, self.b, self.c = linear(normal, 5, D, 3), linear(normal, 5, 5, 4), linear(normal, 3, 5, 5)
        self.in_place = in_place

    def forward(self, x):
        h = self.a(x)
        if self.in_place:
            h += torch.relu(self.b(h))
        else:
            h = h + torch.relu(self.b(h))
        return self.c(h)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_skip_connection_in_place_changes_no_measure(normal, X, batch_size):
    """What enters a layer is what entered it, whatever the model does with that tensor later."""
    y = torch.arange(N) % 3
    plain, found = (network.collapse_split(Skip(normal, how), X, y, batch_size=batch_size) for how in (False, True))
    assert list(plain) == list(found) == ["a", "b", "c"]
    for name in plain:
        assert of_stages(found[name]) == pytest.approx(of_stages(plain[name]), rel=1e-5), name
    assert plain["b"].nc1["input"] != pytest.approx(plain["c"].nc1["input"], rel=1e-2)


class Normalised(nn.Module):
    """The input is brought to another scale in place."""

    def __init__(self, normal, in_place: bool):
        super().__init__()
        self.a, self.b, self.in_place = linear(normal, 5, D, 3), linear(normal, 3, 5, 4), in_place

    def forward(self, x):
        x = x.sub_(1).div_(2) if self.in_place else (x - 1) / 2
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("batches", [lambda X: X, lambda X: [X[:5], X[5:]], lambda X: X[:1].expand(6, D)])
def test_a_model_that_normalises_in_place_leaves_X_as_it_is(normal, X, batches):
    y, before, loss = torch.arange(N) % 3, X.clone(), lambda out, y: out[:, 0] * y
    source = batches(X)
    n = len(source) if isinstance(source, torch.Tensor) else N
    labelled = source if isinstance(source, torch.Tensor) else [(X[:5], y[:5]), (X[5:], y[5:])]
    measures = (
        lambda model: network.agop(model, source),
        lambda model: network.nfa_correlation(model, source, sketch=2),
        lambda model: network.fact(model, labelled, y[:n] if labelled is source else None, loss=loss, weight_decay=1.0),
        lambda model: {k: torch.tensor(of_stages(v)) for k, v in network.collapse_split(model, source, y[:n]).items()},
    )
    for measure in measures:
        found, plain = (measure(Normalised(normal, in_place)) for in_place in (True, False))
        assert torch.equal(X, before)
        for name in plain:
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(plain[name])), name


def test_features_in_place_leave_X_as_it_is(X):
    y, before = torch.arange(N) % 3, X.clone()
    for batch in (X, X.numpy()):
        found = collapse.Accumulator().extend([(batch, y)], lambda x: x.__isub__(1))
        assert torch.equal(X, before)
        assert found.nc1() == collapse.Accumulator().update(X - 1, y).nc1()


class Mixing(nn.Module):
    """Some of the batch's mean is added to every sample."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x):
        return x + self.share * x.mean(0)


def measures(model, X):
    """Every measure of a model, ready to be called."""
    y = torch.arange(len(X)) % 2
    yield lambda: network.agop(model, X)
    yield lambda: network.nfa_correlation(model, X)
    yield lambda: network.collapse_split(model, X, y)


@pytest.mark.parametrize("n", [2, 3, N])
@pytest.mark.parametrize("share", [1.0, 1e-2])
def test_samples_that_mix_a_little_are_refused(normal, X, n, share):
    """A hundredth of the mean is far above float32's rounding; two samples are enough to see it."""
    model = nn.Sequential(linear(normal, 5, D, 6), Mixing(share), nn.Tanh(), linear(normal, 3, 5, 7))
    for measure in measures(model, X[:n]):
        with pytest.raises(ValueError, match="mixes the samples of a batch"):
            measure()


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("centred", [False, True])  # outputs that always sum to zero: no sum of them has a gradient
def test_gradients_that_mix_are_refused(normal, n, centred):
    """Outputs keep to their samples, but the layer's input is shared: its gradients belong to all of them."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = linear(normal, 4, 4, 8), linear(normal, 3, D, 9)

        def forward(self, x):
            table = self.embed(torch.eye(4))
            out = self.out(x) + table.sum() * x[:, :3]
            return out - out.mean(1, keepdim=True) if centred else out

    with pytest.raises(ValueError, match="gradients at 'embed' mix the samples"):
        network.agop(Shared(), normal(n, D, dtype=torch.float32))


def test_what_does_not_mix_is_not_refused(normal, X):
    model = nn.Sequential(linear(normal, 5, D, 6), nn.LayerNorm(5), nn.Tanh(), linear(normal, 3, 5, 7))
    for samples in (X[:2], X[:1].repeat(2, 1)):
        for measure in measures(model, samples):
            measure()


def test_samples_that_change_each_others_rounding_are_not_refused(normal, X):
    """h s / s with an s of the whole batch: the first sample's last bits depend on the others."""

    class Detour(nn.Module):
        def forward(self, h):
            s = h.detach().square().sum()
            for k in range(1, 20):
                h = h * (s + k) / (s + k)
            return h

    model = nn.Sequential(linear(normal, 5, D, 6), Detour(), nn.Tanh(), linear(normal, 3, 5, 7))
    with torch.no_grad():
        if torch.equal(model(X[[0, 1]])[0], model(X[[0, 0]])[0]):
            pytest.skip("this processor rounds both batches alike")
    for measure in measures(model, X):
        measure()


class Named(nn.Module):
    """A model that returns a dictionary, as transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, X):
        return {"logits": self.layer(X)}


@pytest.mark.parametrize(
    ("model", "batches", "options", "text"),
    [
        (
            nn.Linear(D, 2),
            (torch.ones(N, D), torch.ones(N)),
            {},
            r"\[\(inputs, labels\)\] is one batch with its labels",
        ),
        (
            nn.Linear(D, 2),
            torch.ones(N, D).double(),
            {},
            r"X must have the dtype of the model's parameters, torch.float32",
        ),
        (nn.Linear(D, 2), [{"ids": torch.ones(N, D)}], {}, "a model of several inputs is measured inside a module"),
        (nn.Linear(D, 2), torch.ones(N, D), {"layers": ["", 3]}, r"layers must be names or patterns .* got \['', 3\]"),
        (nn.Linear(D, 2), torch.ones(N, D), {"layers": 3}, "layers must be names or patterns"),
        (
            nn.Linear(D, 2),
            [(torch.ones(N, D), ["a"] * N)],
            {"outputs": lambda out, y: out[:, 0] * y},
            r"the labels of a batch must be a tensor or numbers, got \['a'",
        ),
        (Named(), torch.ones(N, D), {}, r"got dict; outputs=lambda out: \.\.\. of agop takes a tensor out of it"),
    ],
)
def test_what_is_no_batch_or_layer_is_told(model, batches, options, text):
    with pytest.raises(TypeError, match=text):
        network.agop(model, batches, **options)


def test_outputs_take_a_tensor_out_of_what_a_model_returns(X):
    model = Named()
    found = network.agop(model, X, outputs=lambda out: out["logits"])["layer"]
    assert torch.allclose(found, model.layer.weight.T @ model.layer.weight, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.0)),
            "'1' .TransformerEncoderLayer.|self_attn",
        ),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), "MultiheadAttention"),
        (nn.LSTM(4, 3), "LSTM"),
    ],
    ids=["encoder", "attention", "lstm"],
)
def test_modules_that_take_the_batch_second_are_named(model, where, normal):
    """Samples of time steps would be measured if ``batch_size=1`` were followed."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), model

        def forward(self, X):
            X = self.first(X)
            if isinstance(model, nn.LSTM):
                return self.inner(X)[0][-1]
            return self.inner[0](X, X, X)[0] if isinstance(self.inner[0], nn.MultiheadAttention) else self.inner(X)

    with pytest.raises(ValueError, match=r"takes \(sequence, batch, d\); build it with batch_first=True") as error:
        network.agop(Model(), normal(5, 30 * 4, dtype=torch.float32).view(5, 30, 4))
    assert "batch_size" not in str(error.value)
