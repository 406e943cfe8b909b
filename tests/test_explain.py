"""explain says what would run, refuses what the call would refuse, and computes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastagop
from fastagop import Laplace

N, M, D, K = 90, 40, 7, 3
OPS = ["kernel_matrix", "kernel_matmul", "gradients", "agop", "solve"]
ops = pytest.mark.parametrize("op", OPS)

# What the operations are made of. Reading the input over for NaN needs none of these.
HEAVY = re.compile(r"\b(mm|addmm|bmm|baddbmm|mv|dot|einsum|exp|sqrt|linalg_\w+|cholesky\w*|eigh|cdist|triu|tril)\b")


class NothingHeavy(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0].strip("_")
        if HEAVY.fullmatch(name):
            raise AssertionError(f"explain ran {func.name()}")
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() > N * max(D, M):
            raise AssertionError(f"explain made a tensor of shape {tuple(out.shape)}")
        return out


@pytest.fixture
def arguments(cloud, normal):
    """arguments(op, dtype): a valid call, positional arguments only."""

    def build(op, dtype=torch.float32):
        X, Z = cloud("spread", n=N, d=D, dtype=dtype), cloud("spread", n=M, d=D, dtype=dtype, seed=2)
        alpha, V = normal(N, K, dtype=dtype), normal(M, K, dtype=dtype)
        return {
            "kernel_matrix": (Laplace(2.0), X, Z),
            "kernel_matmul": (Laplace(2.0), X, Z, V),
            "gradients": (Laplace(2.0), X, alpha, Z),
            "agop": (Laplace(2.0), X, alpha, Z),
            "solve": (Laplace(2.0), X, alpha),
        }[op]

    return build


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_text(op, dtype, arguments):
    text = fastagop.explain(op, *arguments(op, dtype))
    assert isinstance(text, str)
    assert text.startswith(f"{op}: backend torch, method ")
    for word in ("why", "precision", "floating-point operations", "memory", "blocks of"):
        assert word in text
    assert str(dtype).removeprefix("torch.") in text
    work = float(re.search(r"([\d.e+]+) floating-point operations", text)[1])
    # every one of these calls at least visits all pairs, and does no more than cubic work on them
    pairs = N * (N if op == "solve" else M)
    assert pairs * D / 2 <= work <= 20 * pairs * D * max(N, K)
    number, unit = re.search(r"memory\s+([\d.]+) ([kMG]?B)", text).groups()
    count = float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert D * 4 <= count <= 20 * N * N * 8


@ops
def test_name_or_function(op, arguments):
    assert fastagop.explain(op, *arguments(op)) == fastagop.explain(getattr(fastagop, op), *arguments(op))


@ops
def test_runs_nothing(op, arguments, monkeypatch):
    call = arguments(op)

    def refuse(*args, **kwargs):
        raise AssertionError("explain ran the kernel")

    for method in ("value_", "weight_", "weight_from_value_"):
        monkeypatch.setattr(Laplace, method, refuse)
    with NothingHeavy():
        assert fastagop.explain(op, *call)
    with pytest.raises(AssertionError), NothingHeavy():  # the trap is sharp: the call itself steps into it
        getattr(fastagop, op)(*call)


@pytest.mark.parametrize("op", ["kernel_matrix", "gradients", "agop"])
def test_a_view_of_the_points_is_the_points(op, arguments):
    kernel, X, *alpha = arguments(op)[: 2 if op == "kernel_matrix" else 3]
    assert fastagop.explain(op, kernel, X, *alpha, X[:]) == fastagop.explain(op, kernel, X, *alpha)


def test_out_is_not_written(arguments):
    out = torch.full((N, M), -7.0)
    fastagop.explain("kernel_matrix", *arguments("kernel_matrix"), out=out)
    assert bool((out == -7).all())


@ops
def test_refuses_what_the_call_refuses(op, arguments):
    kernel, X, *rest = arguments(op)
    bad = [
        ((None, X, *rest), {}),
        ((kernel, X.int(), *rest), {}),
        ((kernel, X * torch.nan, *rest), {}),
        ((kernel, X, *rest), {"precision": "double"}),
        ((kernel, X, *rest), {"backend": "triton"}),
        ((kernel, X, *rest), {"backend": "abacus"}),
    ]
    if op in ("agop", "solve"):
        bad += [((kernel, X, *rest), {"memory_limit": 1}), ((kernel, X, *rest), {"method": "magic"})]
    for args, words in bad:
        with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever the call itself raises
            getattr(fastagop, op)(*args, **words)
        with pytest.raises(type(theirs.value)) as ours:
            fastagop.explain(op, *args, **words)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("op", ["matmul", "", None, 3, len, ["agop"]])
def test_unknown_op(op):
    with pytest.raises(ValueError, match=r"op must be one of 'kernel_matrix', .*'solve'"):
        fastagop.explain(op)


def test_a_method_that_was_asked_for(arguments):
    for method in ("gradient", "gram"):
        text = fastagop.explain("agop", *arguments("agop"), method=method)
        assert f"method {method}" in text
        assert "asked for" in text
    assert "method eigh" in fastagop.explain("solve", *arguments("solve"), method="eigh")


def test_auto_goes_by_cost(cloud, normal):
    X = cloud("spread", n=N, d=D)

    def method(outputs):
        return re.search(r"method (\w+)", fastagop.explain("agop", Laplace(2.0), X, normal(N, outputs)))[1]

    # 2 n^2 K d + 2 n K d^2 against n^3 and change: one output of 7 dimensions, and a hundred of them
    assert method(1) == "gradient"
    assert method(100) == "gram"


def test_solve_says_which_dtype_factors(arguments):
    kernel, X, Y = arguments("solve")
    assert "float64 factorisation" in fastagop.explain("solve", kernel, X, Y)
    assert "few rows: float64 takes about as long" in fastagop.explain("solve", kernel, X, Y, ridge=1e-3)
    more = X.repeat(5, 1), Y.repeat(5, 1)
    text = fastagop.explain("solve", kernel, *more, ridge=1e-3)
    assert "float32" in text
    assert "float64 refinement" in text
    assert "float64 factorisation" in fastagop.explain("solve", kernel, X.double(), Y.double(), ridge=1e-3)


def test_precision_in_words(arguments):
    call = arguments("agop")
    assert "float32, highest" in fastagop.explain("agop", *call)
    assert "'medium' asked for" in fastagop.explain("agop", *call, precision="medium")
    text = fastagop.explain("agop", *arguments("agop", torch.float64), precision="medium")
    assert "float64 tensors always compute in float64" in text


def test_other_functions_of_the_same_name(arguments):
    from fastagop import distributed, network

    for op in (network.agop, distributed.agop):
        with pytest.raises(ValueError, match="or that function"):
            fastagop.explain(op, *arguments("agop"))
    with pytest.raises(TypeError, match=r"^agop\(\) "):
        fastagop.explain("agop", Laplace(1.0), torch.ones(2, 2))


def test_a_pipeline_is_told_to_give_its_last_step():
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), fastagop.RFMRegressor())
    with pytest.raises(
        ValueError, match=r"got a Pipeline; explain\(pipeline\[-1\], pipeline\[:-1\].fit_transform\(X\), y\)"
    ):
        fastagop.explain(pipeline, torch.zeros(9, 2), torch.zeros(9))
