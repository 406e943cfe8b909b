"""Network measures in half precision, under autocast, at the ends of a dtype's range; and what they leave out."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from fastagop import network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mlp(scale: float = 1.0) -> nn.Sequential:
    """A widening layer, a narrowing one and a readout."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def exact(model: nn.Module, X: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    return network.agop(copy.deepcopy(model).double(), X.double(), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_sums_beyond_float16(scale, dtype, reduction, relative):
    model, X = mlp(scale).to(dtype), torch.randn(2000, 6).to(dtype)
    for layer, M in network.agop(model, X, reduction=reduction).items():
        assert M.dtype == torch.float32
        assert relative(M, exact(model, X, reduction=reduction)[layer]) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("last", "head"),
    [
        *itertools.product([3e-5, 1e-7, 3e3], [torch.float16, torch.float32]),
        (1e-12, torch.float32),  # outputs that float16 has no numbers for: the pass is scaled beyond float16's range
    ],
)
def test_gradients_at_the_ends_of_float16(last, head, relative):
    """Gradients below 6e-8 vanish in float16 and those above 65504 overflow, unless the pass is scaled."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = mlp().half(), nn.Linear(3, 2).to(head)

        def forward(self, x):
            return self.head(self.body(x).to(head).tanh()) * last * (30 if last > 1 else 1)

    model, X = Mixed(), torch.randn(40, 6).half()
    true = exact(_float64(model, last), X)
    for layer, M in network.agop(model, X).items():
        assert relative(M, true[layer]) <= 3e-2, layer
    assert not any("forward" in vars(module) for module in model.modules())


def _float64(model, last):
    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = copy.deepcopy(model.body).double(), copy.deepcopy(model.head).double()

        def forward(self, x):
            return self.head(self.body(x).tanh()) * last * (30 if last > 1 else 1)

    return Twin()


def test_gradients_out_of_reach_are_refused():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(4, 4).half(), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x).float()
            return self.o(1e-25 * torch.tanh(1e38 * h) + 1e25 * (h - h.detach()))

    with pytest.raises(ValueError, match="leave float16's range"):
        network.agop(Steep(), torch.randn(5, 4).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-50, 50])
def test_squares_beyond_float32(power, dtype, relative):
    """g of 2^50 times its size: squares of single gradients and their sums stay in range up to the end."""
    model, X = mlp(), torch.randn(700, 6)
    plain = {name: M.double() for name, M in network.agop(model, X).items()}
    with torch.no_grad():
        model[4].weight.mul_(2.0**power)
        model[4].bias.mul_(2.0**power)
    for name, M in network.agop(model.to(dtype), X.to(dtype)).items():
        assert relative(M.double() * 2.0 ** (-2 * power), plain[name]) <= 1e-5
    if dtype == torch.float32:
        with torch.no_grad():
            model[4].weight.mul_(2.0 ** (power / 2))
        for value in network.nfa_correlation(model, X, ["0", "2"]).values():
            assert -1 <= value <= 1


def test_sums_at_the_output_beyond_float32(relative):
    """A layer of tiny weights before a readout of huge ones: squares at its output leave float32, M does not."""
    model, X = mlp(), torch.randn(50, 6)
    plain = network.agop(model, X)
    with torch.no_grad():
        for layer, power in ((model[2], -70), (model[4], 70)):
            layer.weight.mul_(2.0**power)
        model[2].bias.mul_(2.0**-70)
    for name, M in network.agop(model, X, ["0", "2"]).items():
        assert relative(M, plain[name]) <= 1e-5


def test_an_agop_that_its_dtype_cannot_hold_is_refused():
    model = mlp()
    with torch.no_grad():
        model[4].weight.mul_(2.0**70)
    with pytest.raises(ValueError, match=r"the AGOP at '0' leaves the range of torch\.float32"):
        network.agop(model, torch.randn(20, 6))


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_the_sums_ignore_the_processs_settings(precision, relative):
    """The model's forward runs as the process has it; what this library computes is float32."""
    model, X = nn.Linear(40, 30), torch.randn(600, 40)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = network.agop(model, X)[""]
    finally:
        torch.set_float32_matmul_precision(before)
    W = model.weight.detach().double()
    assert relative(found, W.T @ W) <= 1e-5


def test_autocast(relative):
    """The model runs as it does under autocast; products of gradients and sums do not."""
    model, X, y = mlp(), torch.randn(300, 6), torch.arange(300) % 3
    true = exact(model, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.agop(model, X)
        network.nfa_correlation(model, X)
        split = network.collapse_split(model, X, y)
    for layer, M in found.items():
        assert M.dtype == torch.float32
        assert relative(M, true[layer]) <= 5e-2  # of activations in bfloat16
    plain = network.collapse_split(model, X, y)
    for name, one in plain.items():
        assert split[name].nc1["features"] == pytest.approx(one.nc1["features"], rel=5e-2)
    layer = nn.Linear(40, 30)
    W, inputs = layer.weight.detach().double(), torch.randn(50, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(network.agop(layer, inputs)[""], W.T @ W) <= 1e-6
        alone = network.split(layer, inputs, y[:50])
    assert alone.nc1["projected"] == pytest.approx(network.split(layer, inputs, y[:50]).nc1["projected"], rel=1e-6)


# ---- What is left out


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight


class Mixture(nn.Module):
    """One module of each kind with weights beside two Linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.own, self.rnn = nn.Conv1d(1, 1, 1), Own(), nn.GRU(4, 4, batch_first=True)
        self.attention, self.table = nn.MultiheadAttention(4, 2, batch_first=True), nn.Embedding(3, 4)
        self.bilinear, self.cell = nn.Bilinear(4, 4, 4), nn.LSTMCell(4, 4)
        self.norm, self.batch, self.act = nn.LayerNorm((1, 4)), nn.BatchNorm1d(1), nn.PReLU(4, 0.0)
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.batch(self.norm(self.conv(x[:, None])))
        h = self.attention(self.rnn(h)[0], h, h)[0][:, 0]
        h = self.own(self.bilinear(h, self.cell(h)[0])) + self.table(torch.zeros(len(x), dtype=torch.long))
        return self.o(self.act(self.a(h)))


MEASURES = {
    "agop": network.agop,
    "nfa": network.nfa_correlation,
    "collapse": lambda model, X, *layers: network.collapse_split(model, X, torch.arange(len(X)) % 3, *layers),
}
NEVER = {"own": "Own", "rnn": "GRU", "bilinear": "Bilinear", "cell": "LSTMCell"}
SERVED = ["conv", *(f"attention.{part}_proj" for part in ("q", "k", "v", "out")), "table", "a", "o"]
QUERIES = {f"attention.{part}_proj": "MultiheadAttention" for part in "qk"}
LEFT_OUT = {  # by measure; the conv has one weight, so that its W^T W is constant, and one token needs no query
    "agop": NEVER,
    "nfa": {"conv": "Conv1d", **QUERIES, "table": "Embedding", **NEVER},
    "collapse": {"conv": "Conv1d", "attention": "MultiheadAttention", "table": "Embedding", **NEVER},
}


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_that_are_left_out_are_named(measure):
    model, X = Mixture(), torch.randn(30, 4)
    with pytest.warns(UserWarning, match=r"network measures .*leave out") as caught:
        found = MEASURES[measure](model, X)
    names = [name for name in SERVED if not {name, name.split(".")[0]} & set(LEFT_OUT[measure])]
    assert sorted(found) == sorted(names)
    assert measure == "collapse" or sorted(found.skipped) == sorted(LEFT_OUT[measure])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    for name, kind in LEFT_OUT[measure].items():
        assert f"'{name}' ({kind})" in text
    for name in ("'norm'", "'batch'", "'act'", "'a'", "out_proj"):
        assert name not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(MEASURES[measure](model, X, ["a"])) == ["a"]
        MEASURES[measure](mlp(), torch.randn(30, 6))


@pytest.mark.parametrize("name", NEVER)
def test_layers_of_other_kinds_are_refused_by_name(name):
    with pytest.raises(TypeError, match=rf"'{name}' must be a torch\.nn\.Linear, .*the kinds that are served, got "):
        network.agop(Mixture(), torch.randn(5, 4), ["a", name])


@pytest.mark.parametrize("name", LEFT_OUT["collapse"])
def test_layers_of_which_collapse_is_not_measured(name):
    with pytest.raises(TypeError, match=rf"'{name}' must be a torch\.nn\.Linear, the kind that is served, got "):
        network.collapse_split(Mixture(), torch.randn(6, 4), torch.arange(6) % 3, ["a", name])


def test_an_embedding_has_no_ansatz():
    with pytest.raises(TypeError, match="'table' is an Embedding"):
        network.nfa_correlation(Mixture(), torch.randn(5, 4), ["a", "table"])


def test_many_left_out_layers_are_counted():
    convolutions = [nn.ConvTranspose1d(1, 1, 1) for _ in range(20)]
    with pytest.warns(UserWarning, match=r"'7' \(ConvTranspose1d\): .*; and 12 more"):
        network.agop(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4, 2)), torch.randn(5, 1, 4))
