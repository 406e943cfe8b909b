"""The KeOps backend against the float64 reference, and what is said where it cannot serve.

Every kernel, dtype, feature count and output count is a formula of its own, which takes seconds to compile where the
cache is cold: all cases share D features and K outputs.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from fastagop.kernels import backends, reference
from fastagop.kernels.keops_backend import backend as keops_door
from fastagop.kernels.keops_backend import pairs as keops_pairs
from fastagop.kernels.keops_backend import reductions
from fastagop.kernels.radial import Radial
from kernel_cases import DEVICES, GAUSSIAN, LAPLACE, cases
from pair_cases import on

import fastagop
from fastagop import BackendUnavailable, ConjugateGradients, Gaussian, Laplace

D, K = 5, 3
KEOPS = {"backend": "keops"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
CLOUDS = [
    "spread",
    "collapsed 1e-2",
    "collapsed 1e-4",  # with exact duplicates; near pairs lose no digits
    "zero-rows",
    "offset",  # norms say nothing about distances
    "identical",  # every pair at distance zero
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
kernels = pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(1.0)], ids=repr)
needs_keops = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None or not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs pykeops and a C++ compiler",
)


def agrees(result, truth, scale=None):
    """Within the dtype's tolerance of the reference, relative to it (or to scale); exactly zero where it is zero."""
    assert result.shape == truth.shape
    assert not result.requires_grad
    size = float(truth.norm()) if scale is None else scale
    assert float((result.double() - truth).norm()) <= TOLERANCE[result.dtype] * size


@needs_keops
@kernels
@dtypes
@pytest.mark.parametrize("name", CLOUDS)
def test_against_the_reference(kernel, dtype, name, cloud, normal):
    X, Z = cloud(name, n=60, d=D, dtype=dtype), cloud(name, n=40, d=D, dtype=dtype, seed=2)
    Z[:3] = X[:3]  # pairs at distance zero that are no self-pairs
    alpha, V = normal(60, K, dtype=dtype), normal(40, K, dtype=dtype)
    agrees(fastagop.kernel_matmul(kernel, X, Z, V, **KEOPS), reference.kernel_matmul(kernel, X, Z, V))
    agrees(fastagop.kernel_matmul(kernel, X, None, alpha, **KEOPS), reference.kernel_matmul(kernel, X, X, alpha))
    for where in (None, Z):
        agrees(fastagop.gradients(kernel, X, alpha, where, **KEOPS), reference.gradients(kernel, X, alpha, where))
        for how in ({"reduction": "sum"}, {"reduction": "mean"}, {"reduction": "sum", "center": True}):
            truth = reference.agop(kernel, X, alpha, where, **how)
            scale = float(reference.agop(kernel, X, alpha, where, reduction=how["reduction"]).norm())
            agrees(fastagop.agop(kernel, X, alpha, where, **how, **KEOPS), truth, scale)


@needs_keops
@pytest.mark.parametrize("case", [case for case in cases(DEVICES, "keops") if case not in (LAPLACE, GAUSSIAN)], ids=str)
def test_further_kernels(case, cloud, normal):
    """In float64 only, where a constant that KeOps keeps in float32 shows: all else is the same for every kernel."""
    kernel, alpha = case.kernel, normal(60, K)
    for name in ("collapsed 1e-4", "identical"):
        X = cloud(name, n=60, d=D)
        agrees(fastagop.kernel_matmul(kernel, X, None, alpha, **KEOPS), reference.kernel_matmul(kernel, X, X, alpha))
        agrees(fastagop.gradients(kernel, X, alpha, **KEOPS), reference.gradients(kernel, X, alpha))
        agrees(fastagop.agop(kernel, X, alpha, **KEOPS), reference.agop(kernel, X, alpha))
    X, narrow = cloud("spread", n=60, d=D), case.at(1e-300).kernel
    assert torch.equal(fastagop.kernel_matmul(narrow, X, None, alpha, **KEOPS), alpha)
    # zero, but for a heavy tail
    assert float(fastagop.gradients(narrow, X, alpha, **KEOPS).abs().max()) <= 1e-280


@needs_keops
@kernels
@dtypes
def test_self_pairs_and_duplicates_contribute_nothing(kernel, dtype, cloud, normal):
    X = cloud("identical", n=30, d=D, dtype=dtype)
    assert not fastagop.gradients(kernel, X, normal(30, K, dtype=dtype), **KEOPS).any()
    assert not fastagop.agop(kernel, X, normal(30, K, dtype=dtype), **KEOPS).any()
    X = cloud("spread", n=30, d=D, dtype=dtype)
    alpha = normal(30, K, dtype=dtype)
    X[11] = X[4]
    alone = alpha.clone()
    alone[4] = alone[11] = 0  # what the pair does to each other and to itself
    got = fastagop.gradients(kernel, X, alpha, X[[4, 11]], **KEOPS)
    assert torch.equal(got, fastagop.gradients(kernel, X, alone, X[[4, 11]], **KEOPS))


@needs_keops
@kernels
@pytest.mark.parametrize("n", [1, 2, D - 1])  # one row; d > n
def test_few_rows(kernel, n, cloud, normal):
    X, alpha = cloud("spread", n=n, d=D, dtype=torch.float64), normal(n, K)
    agrees(fastagop.kernel_matmul(kernel, X, None, alpha, **KEOPS), reference.kernel_matmul(kernel, X, X, alpha))
    agrees(fastagop.gradients(kernel, X, alpha, **KEOPS), reference.gradients(kernel, X, alpha))
    agrees(fastagop.agop(kernel, X, alpha, **KEOPS), reference.agop(kernel, X, alpha))


@needs_keops
def test_outputs_in_chunks(cloud, normal, monkeypatch):
    """More outputs than one reduction takes: chunks of one width, the last padded with zeros."""
    X, alpha = cloud("spread", n=40, d=D, dtype=torch.float64), normal(40, 2 * K + 1)
    monkeypatch.setattr(reductions, "_OUTPUTS", K * D)  # gradients of K outputs a reduction: 7 = 3 + 3 + 1
    agrees(fastagop.gradients(Laplace(2.0), X, alpha, **KEOPS), reference.gradients(Laplace(2.0), X, alpha))
    agrees(fastagop.agop(Laplace(2.0), X, alpha, **KEOPS), reference.agop(Laplace(2.0), X, alpha))
    monkeypatch.setattr(reductions, "_OUTPUTS", K)
    agrees(
        fastagop.kernel_matmul(Laplace(2.0), X, None, alpha, **KEOPS),
        reference.kernel_matmul(Laplace(2.0), X, X, alpha),
    )


@needs_keops
def test_blocks_of_evaluation_points(cloud, normal, least_memory):
    X, alpha = cloud("spread", n=40, d=D, dtype=torch.float64), normal(40, K)
    words = {"center": True, **KEOPS}
    least = least_memory("agop", Laplace(2.0), X, alpha, **words)
    for limit in (least, 3 * least):
        assert "blocks of 40 rows" not in fastagop.explain("agop", Laplace(2.0), X, alpha, memory_limit=least, **words)
        M = fastagop.agop(Laplace(2.0), X, alpha, memory_limit=limit, **words)
        agrees(M, reference.agop(Laplace(2.0), X, alpha, center=True))
    with pytest.raises(MemoryError, match="memory_limit"):
        fastagop.agop(Laplace(2.0), X, alpha, memory_limit=least - 1, **words)


@needs_keops
def test_nothing_to_do(cloud, normal):
    X, alpha = cloud("spread", n=20, d=D), normal(20, K)
    assert torch.equal(
        fastagop.kernel_matmul(Laplace(2.0), X, X[:0], alpha[:0], **KEOPS), torch.zeros(20, K, dtype=X.dtype)
    )
    assert fastagop.kernel_matmul(Laplace(2.0), X, None, alpha[:, :0], **KEOPS).shape == (20, 0)
    assert fastagop.gradients(Laplace(2.0), X, alpha, X[:0], **KEOPS).shape == (0, K, D)
    assert not fastagop.agop(Laplace(2.0), X, alpha[:, :0], **KEOPS).any()


@needs_keops
@kernels
@pytest.mark.parametrize("bandwidth", [1e-40, 1e30])  # 1 / L, or its square, is no float32 number
def test_extreme_bandwidths(kernel, bandwidth, cloud, normal):
    X, alpha = cloud("spread", n=60, d=D, dtype=torch.float32), normal(60, K, dtype=torch.float32)
    X[7] = X[3]
    kernel = type(kernel)(bandwidth)
    K_alpha = fastagop.kernel_matmul(kernel, X, None, alpha, **KEOPS)
    agrees(K_alpha, reference.kernel_matmul(kernel, X, X, alpha))
    assert bool(fastagop.gradients(kernel, X, alpha, **KEOPS).isfinite().all())


@needs_keops
def test_conjugate_gradients(cloud, normal):
    X, Y = cloud("spread", n=60, d=D), normal(60, K)
    for words in ({"method": "cg"}, {"method": ConjugateGradients(rank=5)}):
        assert "backend keops" in fastagop.explain("solve", Laplace(2.0), X, Y, ridge=1e-3, **words, **KEOPS)
        solution = fastagop.solve(Laplace(2.0), X, Y, ridge=1e-3, **words, **KEOPS)
        truth = reference.kernel_matmul(Laplace(2.0), X, X, solution.alpha) + 1e-3 * solution.alpha
        assert float((truth - Y).norm() / Y.norm()) <= 1e-6


# ---- who serves, and what is said


def test_what_it_refuses(cloud, normal):
    X, Y = cloud("spread", n=20, d=D), normal(20, K)
    with pytest.raises(BackendUnavailable, match=r"kernel_matrix: .*KeOps never does"):
        fastagop.kernel_matrix(Laplace(2.0), X, **KEOPS)
    with pytest.raises(BackendUnavailable, match=r"solve: .*method='cg'"):
        fastagop.solve(Laplace(2.0), X, Y, **KEOPS)
    with pytest.raises(BackendUnavailable, match=r"agop with method 'gram'.*method='gradient' or 'auto'"):
        fastagop.agop(Laplace(2.0), X, Y, method="gram", **KEOPS)


def test_without_pykeops(cloud, normal, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pykeops" else find(name, *rest)
    )
    with pytest.raises(BackendUnavailable, match=r"pip install 'fastagop\[keops\]'"):
        fastagop.gradients(Laplace(2.0), cloud("spread", n=9, d=D), normal(9, K), **KEOPS)


def test_without_a_compiler(cloud, normal, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler; install g\+\+, or set CXX"):
        fastagop.gradients(Laplace(2.0), cloud("spread", n=9, d=D), normal(9, K), **KEOPS)


def test_a_kernel_without_a_formula(cloud, normal):
    class Mine(Radial):
        pass

    with pytest.raises(BackendUnavailable, match=r"Mine has no KeOps formula; give its class one"):
        fastagop.gradients(Mine(1.0), cloud("spread", n=9, d=D), normal(9, K), **KEOPS)


@needs_keops
def test_a_compilation_that_fails_says_what_it_needs(monkeypatch):
    class Broken:
        class torch:
            @staticmethod
            def Genred(*args, **kwargs):
                raise ImportError("pykeops_cpp_1234")

    monkeypatch.setattr(reductions, "pykeops_module", lambda: Broken)
    with pytest.raises(BackendUnavailable, match=r"kernel_matmul.*2 features.*pykeops_cpp_1234.*python3-dev"):
        reductions._reduction("kernel_matmul of a test", "no formula", "xz", 2, 1, 1, torch.float32, "cpu")


@needs_keops
def test_compiling_is_said_once_and_prints_nothing(capsys, caplog):
    announcer = reductions._Announcer("something")
    with caplog.at_level(logging.INFO, logger="fastagop"):
        announcer.write("[KeOps] Generating code for ... ")
        announcer.write("[pyKeOps] Compiling ... ")
    assert [r.message for r in caplog.records] == [
        "KeOps compiles something: about 10 s, once; later runs find it in KeOps' folder"
    ]
    assert capsys.readouterr().out == ""


@needs_keops
def test_a_call_prints_nothing(python):
    """Neither the warning about CUDA nor the progress of compilation reaches standard output."""
    code = f"""
import torch, fastagop
X = torch.ones(3, {D})
print(float(fastagop.kernel_matmul(fastagop.Laplace(2.0), X, None, torch.ones(3, {K}), backend="keops").sum()))
"""
    assert python(code).strip() == str(9.0 * K)


def test_auto_leaves_it_to_whoever_asks(cloud, normal):
    """KeOps measured faster nowhere (bench/results/keops_cpu.json), so that "auto" never waits for a compiler."""
    measured = json.loads((Path(__file__).parents[1] / "bench" / "results" / "keops_cpu.json").read_text())
    assert set(measured["crossover"].values()) == {0}
    X = cloud("spread", n=50, d=2)
    for op, further in (
        ("kernel_matmul", (None, normal(50, K))),
        ("gradients", (normal(50, K),)),
        ("agop", (normal(50, K),)),
    ):
        assert "backend torch" in fastagop.explain(op, Laplace(2.0), X, *further)


# ---- Points that a CUDA kernel cannot hold, by KeOps' own account: there is no GPU here

WIDE = [*(case.kernel for case in cases(DEVICES, "keops")), *on("keops").values()]
CUDA = torch.device("cuda")


def held(formula: str, pair: str, d: int, width: int, numbers: int) -> int:
    """Items of shared memory that a thread of KeOps' CUDA kernel takes."""
    from keopscore.config.chunks import dimchunk
    from keopscore.formulas.GetReduction import GetReduction
    from keopscore.mapreduce.Chunk_Mode_Constants import Chunk_Mode_Constants
    from keopscore.utils.code_gen_utils import Var_loader

    aliases = [f"{pair[0]}=Var(0,{d},0)", f"{pair[1]}=Var(1,{d},1)", f"b=Var(2,{width},1)", f"c=Var(3,{numbers},2)"]
    made = GetReduction(f"Sum_Reduction({formula},0)", aliases)
    if len(made.formula.chunked_formulas(dimchunk)) == 1 and not Chunk_Mode_Constants(made).chunk_postchunk_mix:
        return Chunk_Mode_Constants(made).dimy
    return Var_loader(made).dimy


@needs_keops
@pytest.mark.parametrize("kernel", WIDE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_many_columns_as_cuda_holds(kernel, dtype):
    reductions.pykeops_module()
    found, most = reductions._formulas(kernel), 49152 // dtype.itemsize
    numbers = len(reductions._constants(kernel, torch.zeros((), dtype=dtype)))
    for d in (300, 6000, most - 2, most - 1, most, 20_000):
        columns = reductions._most_columns(found.value, d, dtype, CUDA)
        said = reductions.too_wide("kernel_matmul", kernel, d, dtype, CUDA)
        assert (said is None) == (columns > 0)
        assert (held(f"{found.value} * b", "xz", d, max(1, columns), numbers) <= most) == (columns > 0)
        fits = held(f"TensorProd(b, {found.slope})", "zx", d, 1, numbers) <= most
        assert (reductions.too_wide("agop", kernel, d, dtype, CUDA) is None) == fits
        assert reductions.too_wide("agop", kernel, d, dtype, torch.device("cpu")) is None


class OnCuda(torch.Tensor):
    """A tensor without numbers that says it is on CUDA."""

    device = property(lambda self: CUDA)
    is_cuda = True


@pytest.mark.parametrize(
    ("operation", "kernel", "dtype", "served"),
    [
        ("kernel_matmul", Laplace(2.0), torch.float64, True),  # 64 features at a time
        ("kernel_matmul", Gaussian(2.0), torch.float64, False),
        ("kernel_matmul", Gaussian(2.0), torch.float32, True),
        ("gradients", Laplace(2.0), torch.float64, False),
        ("agop", Laplace(2.0), torch.float32, True),
        ("solve with method 'cg'", Gaussian(2.0), torch.float32, False),  # by float64 products
        ("gradients", fastagop.ProductLaplace(2.0), torch.float64, False),
        ("gradients", fastagop.Polynomial(2), torch.float32, False),  # which computes in float64
    ],
)
def test_points_that_cuda_cannot_hold_are_refused(operation, kernel, dtype, served, monkeypatch):
    """KeOps 2.3 would divide by zero, which ends the process."""
    for module in (keops_door, keops_pairs):
        monkeypatch.setattr(module, "unusable", lambda X: None)
    X = torch.empty(30, 10_000, dtype=dtype, device="meta").as_subclass(OnCuda)
    request = backends.Request(operation, kernel, X)
    if served:
        assert backends.choose("keops", request)[0].name == "keops"
        return
    with pytest.raises(
        BackendUnavailable, match=r"on CUDA it holds .* 10000 features in float64 take more; use backend"
    ):
        backends.choose("keops", request)
    assert backends.serving("keops", request) == "auto"


def test_reductions_on_cuda_wait_for_their_points(monkeypatch):
    """KeOps launches on the default stream, whatever the current one is, and leaves its device the current one."""
    log: list = []

    class Device:
        def __init__(self, device):
            log.append(device)

        def __enter__(self):
            log.append("enter")

        def __exit__(self, *raised):
            log.append("exit")

    class Stream:
        def synchronize(self):
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    X = torch.ones(3, 2)
    assert reductions._ordered(lambda a, b: a + b, X, X).sum() == 12
    assert log == []
    on_cuda = torch.empty(3, 2, device="meta").as_subclass(OnCuda)
    assert reductions._ordered(lambda a, b: log.append("sum") or b, on_cuda, X) is X
    assert log == [CUDA, "enter", "wait", "sum", "exit"]


@needs_keops
def test_each_reduction_is_ordered(monkeypatch):
    seen, ordered = [], reductions._ordered
    monkeypatch.setattr(reductions, "_ordered", lambda *given: (seen.append(1), ordered(*given))[1])
    monkeypatch.setattr(reductions, "_reduction", reductions._reduction.__wrapped__)
    X = torch.ones(4, D)
    fastagop.kernel_matmul(Laplace(2.0), X, None, torch.ones(4, K), **KEOPS)
    assert len(seen) == 2  # the compilation's own, and the call's
