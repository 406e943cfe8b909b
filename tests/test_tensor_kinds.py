"""Tensors that are no plain dense ones are refused by name with what to do; those that are none the less, serve."""

from __future__ import annotations

import warnings

import pytest
import torch
from fastagop.kernels import checks
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor

import fastagop
from fastagop import Laplace

N, D, K = 20, 4, 3
KERNEL = Laplace(2.0)
TENSORS = {
    "kernel_matrix": ["X", "Z"],
    "kernel_matmul": ["X", "Z", "V"],
    "gradients": ["X", "alpha", "Z"],
    "agop": ["X", "alpha", "Z", "sample_weight"],
    "solve": ["X", "Y"],
}
EVERY_TENSOR = [(op, name) for op, names in TENSORS.items() for name in names]
every_tensor = pytest.mark.parametrize(("op", "name"), EVERY_TENSOR)


@pytest.fixture
def valid(cloud, normal):
    """valid(op): keyword arguments of a call that works."""
    tensors = {"X": cloud("spread", n=N, d=D), "Z": cloud("spread", n=8, d=D, seed=2), "sample_weight": normal(8).abs()}
    tensors |= {"V": normal(8, K), "alpha": normal(N, K), "Y": normal(N, K)}
    return lambda op: {"kernel": KERNEL, **{name: tensors[name] for name in TENSORS[op]}}


def nested(t):
    return torch.nested.nested_tensor([t, t[:-1]])


KINDS = {
    "sparse": (lambda t: t.to_sparse(), r"got layout torch.sparse_coo; convert it with {}\.to_dense\(\)"),
    "csr": (lambda t: t.view(len(t), -1).to_sparse_csr(), r"got layout torch.sparse_csr; .*to_dense"),
    "mkldnn": (lambda t: t.float().to_mkldnn(), r"got layout torch._mkldnn; convert it with {}\.to_dense\(\)"),
    "nested": (nested, r"got a nested tensor; use torch\.nested\.to_padded_tensor"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        r"got a quantized one .*dequ",
    ),
    "masked": (lambda t: masked_tensor(t, torch.ones_like(t).bool()), r"got a MaskedTensor; pass what it holds"),
    "fake": (lambda t: FakeTensorMode().from_tensor(t), r"got a FakeTensor; pass what it holds"),
}


@every_tensor
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused(op, name, kind, valid):
    make, message = KINDS[kind]
    words = valid(op)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls most of these prototypes
        words[name] = make(words[name])
        with pytest.raises(TypeError, match=rf"^{name} must be a dense torch\.Tensor, {message.format(name)}"):
            getattr(fastagop, op)(**words)


@every_tensor
def test_tensors_without_numbers(op, name, valid):
    words = valid(op)
    words[name] = words[name].to("meta")
    with pytest.raises((TypeError, ValueError), match=rf"^{name} .* on meta"):
        getattr(fastagop, op)(**words)
    everything = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in words.items()}
    with pytest.raises(TypeError, match=r"^X must hold numbers, got a tensor on meta; only fastagop\.explain takes"):
        getattr(fastagop, op)(**everything)


@every_tensor
def test_bfloat16_and_arrays_say_how_to_convert(op, name, valid):
    words = valid(op)
    if name != "sample_weight":  # its dtype is compared with that of X
        with pytest.raises(TypeError, match=rf"^{name} must be float32 or float64, got torch.bfloat16; .*{name}.float"):
            getattr(fastagop, op)(**{**words, name: words[name].bfloat16()})
    with pytest.raises(TypeError, match=rf"got ndarray; use torch\.as_tensor\({name}\)"):
        getattr(fastagop, op)(**{**words, name: words[name].numpy()})


@every_tensor
def test_a_device_without_float64(op, name, valid, monkeypatch):
    """Apple's GPUs: said at the door, not by torch in the middle."""
    monkeypatch.setattr(checks, "has_float64", lambda device: False)
    with pytest.raises(TypeError, match=r"^X must be on a device with float64, got cpu: .*; move it with X\.cpu\(\)"):
        getattr(fastagop, op)(**valid(op))


def test_float64_is_tried_on_unknown_devices(monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    assert checks.has_float64(torch.device("cpu"))
    monkeypatch.setattr(torch, "zeros", refuse)
    assert not checks.has_float64(torch.device("mps"))


class Named(torch.Tensor):
    """What libraries derive to carry a label along."""


HARMLESS = {
    "parameter": torch.nn.Parameter,
    "wants gradients": lambda t: t.clone().requires_grad_(),
    "inside a graph": lambda t: t.clone().requires_grad_() * 1.0,
    "subclass": lambda t: t.as_subclass(Named),
    "negated view": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
}


@pytest.mark.parametrize("op", TENSORS)
@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS.keys())
def test_dense_tensors_of_any_origin_serve(op, make, valid):
    words = valid(op)
    plain = getattr(fastagop, op)(**words)
    made = getattr(fastagop, op)(**{k: make(v) if isinstance(v, torch.Tensor) else v for k, v in words.items()})
    plain, made = (result.alpha if op == "solve" else result for result in (plain, made))
    assert torch.allclose(made.as_subclass(torch.Tensor), plain, rtol=1e-12, atol=1e-14)
    assert not made.requires_grad


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), nested], ids=["sparse", "nested"])
def test_out_of_another_kind(make, valid):
    words = valid("kernel_matrix")
    with pytest.raises(ValueError, match=r"^out must be a dense tensor of shape \(20, 8\), got (layout|a nested)"):
        fastagop.kernel_matrix(**words, out=make(torch.empty(N, 8, dtype=torch.float64)))
