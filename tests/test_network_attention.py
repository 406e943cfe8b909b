"""AGOP of attention's projections and of embeddings, against attention written out and Jacobians of single samples."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from fastagop import network

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Cross(nn.Module):
    """Attention from x to what is made of it, then a readout of all positions; ``options`` of the attention."""

    def __init__(self, mask=None, hidden=None, sizes=(6, 6), readout=18, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=sizes[0], vdim=sizes[1], **options)
        with torch.no_grad():
            for parameter in self.attention.parameters():  # biases are zero otherwise
                parameter.normal_(0, 0.5)
        self.out = nn.Linear(readout, 2)
        self.mask, self.hidden = mask, hidden

    def tokens(self, x):
        """Queries, keys and values (n, tokens, d) of x (n, 3, 6)."""
        attention = self.attention
        return x, torch.sin(2 * x)[..., : attention.kdim], torch.cos(x)[..., : attention.vdim]

    def forward(self, x):
        turned = (t if self.attention.batch_first else t.transpose(0, 1) for t in self.tokens(x))
        hidden = None if self.hidden is None else self.hidden.expand(len(x), -1)
        h = self.attention(*turned, attn_mask=self.mask, key_padding_mask=hidden)[0]
        return self.out(torch.tanh(h if self.attention.batch_first else h.transpose(0, 1)).flatten(1))

    def written_out(self, x, added):
        """The outputs for one sample (3, 6), with what is added to the inputs of the four projections."""
        m = self.attention
        q, k, v = (t[0] for t in self.tokens(x[None]))
        W = (
            m.in_proj_weight.chunk(3)
            if m.in_proj_weight is not None
            else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        )
        b = m.in_proj_bias.chunk(3) if m.in_proj_bias is not None else (0.0, 0.0, 0.0)
        q, k, v = ((t + d) @ w.T + c for t, d, w, c in zip((q, k, v), added, W, b, strict=False))
        score = torch.zeros(len(q), len(k), dtype=x.dtype) if self.mask is None else self.mask.to(x.dtype)
        if self.mask is not None and self.mask.dtype == torch.bool:
            score = torch.zeros_like(score).masked_fill(self.mask, -math.inf)
        if self.hidden is not None:
            score = score.masked_fill(self.hidden, -math.inf)
        if m.bias_k is not None:
            k, v = torch.cat([k, m.bias_k[0]]), torch.cat([v, m.bias_v[0]])
            score = nn.functional.pad(score, (0, 1))
        if m.add_zero_attn:
            k, v, score = *(nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v)), nn.functional.pad(score, (0, 1))
        heads = []
        for Q, K, V in zip(*(t.chunk(2, 1) for t in (q, k, v)), strict=True):
            heads.append(torch.softmax(Q @ K.T / math.sqrt(3) + score, 1) @ V)
        h = (torch.cat(heads, 1) + added[3]) @ m.out_proj.weight.T
        h = h if m.out_proj.bias is None else h + m.out_proj.bias
        return self.out(torch.tanh(h).flatten())


CASES = {
    "batch first": lambda: Cross(batch_first=True),
    "sequence first": Cross,
    "no bias": lambda: Cross(batch_first=True, bias=False),
    "keys and values of other widths": lambda: Cross(batch_first=True, sizes=(4, 5)),
    "other widths, no bias": lambda: Cross(sizes=(4, 5), bias=False),
    "bias of keys and a zero": lambda: Cross(batch_first=True, add_bias_kv=True, add_zero_attn=True),
    "causal mask": lambda: Cross(batch_first=True, mask=torch.ones(3, 3).triu(1).bool()),
    "added mask": lambda: Cross(mask=torch.randn(3, 3, dtype=torch.float64)),
    "hidden keys": lambda: Cross(batch_first=True, hidden=torch.tensor([False, True, False])),
    "dropout in training": lambda: Cross(batch_first=True, dropout=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_projections_of_attention(name, relative):
    model, X = CASES[name]().double(), torch.randn(4, 3, 6, dtype=torch.float64)
    found = network.agop(model, X, reduction="sum", batch_size=3)
    assert list(found) == [*(f"attention.{part}" for part in PARTS), "out"]
    assert found.skipped == {}
    assert model.training
    model.eval()
    zeros = [torch.zeros(3, d, dtype=X.dtype) for d in (6, model.attention.kdim, model.attention.vdim, 6)]
    torch.testing.assert_close(model.written_out(X[0], zeros), model(X)[0], rtol=1e-12, atol=1e-12)
    expected = dict.fromkeys(PARTS, 0.0)
    for x in X:
        J = torch.autograd.functional.jacobian(lambda *added, x=x: model.written_out(x, added), tuple(zeros))
        for part, j in zip(PARTS, J, strict=True):
            expected[part] = expected[part] + j.flatten(0, 1).T @ j.flatten(0, 1)
    for part in PARTS:
        assert relative(found[f"attention.{part}"], expected[part]) <= 1e-12, part


def test_the_tapped_attention_computes_the_same_numbers():
    """Every option of a call, and attention weights that the model goes on to use."""

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.seen = nn.MultiheadAttention(6, 2, batch_first=True), []

        def forward(self, x):
            causal = torch.ones(3, 3).triu(1).bool()
            a = self.attention(x, x, x, average_attn_weights=False)
            b = self.attention(x, key=x, value=x, need_weights=False, attn_mask=causal, is_causal=True)
            c = self.attention(x[:, 0], x[:, 1], x[:, 2])  # no batch
            out = torch.cat([a[0].flatten(1), a[1].flatten(1), b[0].flatten(1), c[0]], 1)
            self.seen.append(out.detach())
            return out

    model, X = Weights(), torch.randn(4, 3, 6)
    network.agop(model, X, batch_size=1)
    assert model.attention.training
    model.eval()
    model(X[-1:])
    torch.testing.assert_close(model.seen[-2], model.seen[-1], rtol=1e-5, atol=1e-6)


def test_parts_are_chosen_by_name():
    model, X = Cross(batch_first=True), torch.randn(4, 3, 6)
    every = network.agop(model, X)
    for layers, names in (("attention", PARTS), ("*.out_proj", PARTS[3:]), (["attention.[qk]*"], PARTS[:2])):
        found = network.agop(model, X, layers)
        assert list(found) == [f"attention.{part}" for part in names]
        for name, M in found.items():
            torch.testing.assert_close(M, every[name])
    assert all(-1 <= value <= 1 for value in network.nfa_correlation(model, X).values())


def test_attention_in_a_transformer():
    """torch's layer, whose fast path is off while it is measured; nothing is left out, and nothing warns."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = network.agop(model, torch.randn(4, 3, 8))
    assert len(found) == 2 * 6 + 1
    assert all(bool((M != 0).any()) for M in found.values())


def test_an_attention_of_ones_own_is_left_out():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    model = nn.Sequential(Own(6, 2, batch_first=True))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = model, nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.body[0](x)[0].mean(1))

    with pytest.warns(UserWarning, match=r"'body.0' \(Own\): it has a forward of its own"):
        found = network.agop(Whole(), torch.randn(4, 3, 6))
    assert list(found) == ["out"]


# ---- Embeddings


class Words(nn.Module):
    """Words and their places, a table of places for all samples."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4, **options), nn.Embedding(5, 4)
        self.body, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def after(self, h):
        return self.out(torch.tanh(self.body(h)).sum(1))

    def forward(self, x):
        return self.after(torch.tanh(self.words(x) + self.places(torch.arange(x.shape[1]))))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"max_norm": 1.0}, {"num_embeddings": 3}])
def test_the_agop_of_an_embedding_is_that_of_its_vectors(options, relative):
    """Gradients with respect to the vectors that enter the network, all places summed; a table of few rows, too."""
    rows = options.pop("num_embeddings", 9)
    model = Words(**options).double()
    if rows < 9:
        model.words = nn.Embedding(rows, 4, dtype=torch.float64)
    X = torch.randint(0, rows, (6, 5))
    with pytest.warns(UserWarning, match=r"'places' \(Embedding\): its inputs are shared by the samples"):
        found = network.agop(model, X, reduction="sum")
    assert list(found) == ["words", "body", "out"]
    expected = 0.0
    for x in X:
        e = model.words(x).detach()
        places = model.places.weight.detach()
        J = torch.autograd.functional.jacobian(lambda e, p=places: model.after(torch.tanh(e + p)[None])[0], e)
        expected = expected + J.flatten(0, 1).T @ J.flatten(0, 1)
    assert found["words"].shape == (4, 4)
    assert relative(found["words"], expected) <= 1e-12
    with pytest.raises(ValueError, match="gradients at 'places' mix"):
        network.agop(model, X, "places")
    one = network.agop(model, X, ["places"], batch_size=1, reduction="sum")["places"]
    assert relative(one, expected) <= 1e-12  # the places are added to the words
