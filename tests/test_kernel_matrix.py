"""kernel_matrix against the float64 reference, and the reference's own distances against their definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fastagop.kernels import checks, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CONTRACT, cases

import fastagop
from fastagop import Gaussian, Laplace

# Acceptance: relative Frobenius error on well-spread data.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Per entry: r is off by half of r^2's 4 eps / NEAR (see test_distance), and t exp(-t) <= 1/e, (t/2) exp(-t/2) <= 1/e
# turn that into at most 2 eps / (e NEAR) of k; exp and its argument round to another 2 eps.
ENTRY = {dtype: torch.finfo(dtype).eps * (2 / near / math.e + 2) for dtype, near in
         ((torch.float32, 2.0**-6), (torch.float64, 2.0**-10))}  # fmt: skip
DTYPES = [torch.float32, torch.float64]
KERNELS = [
    Laplace(2.0),  # the paper's
    Gaussian(1.0),  # the paper's other one
    Laplace(0.05),  # narrow: far pairs underflow, within-class distances decide
]
CLOUDS = [  # reasons in test_distance.py
    "spread",
    "collapsed 1",
    "collapsed 1e-2",
    "collapsed 1e-3",
    "collapsed 1e-4",
    "nested",
    "offset",
    "zero-rows",
    "identical",
    "scales",
    "line",
    "pairs",
]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=repr)
every_kernel = pytest.mark.parametrize("kernel", [case.kernel for case in cases(CONTRACT)], ids=repr)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def check(K, true):
    assert K.shape == true.shape
    assert bool(K.isfinite().all())
    error = (K.double() - true).abs()
    assert float(error.max() if error.numel() else 0.0) <= ENTRY[K.dtype]
    assert float(torch.linalg.vector_norm(error)) <= TOLERANCE[K.dtype] * float(torch.linalg.vector_norm(true))


# ---- the reference itself


@kernels
def test_reference_is_the_definition(kernel, cloud):
    X, Z = cloud("collapsed 1e-2", n=20, d=3), cloud("spread", n=7, d=3)
    K = reference.kernel_matrix(kernel, X, Z)
    for i in range(len(X)):
        for j in range(len(Z)):
            r = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(X[i].tolist(), Z[j].tolist(), strict=True)))
            L = kernel.bandwidth
            k = math.exp(-r / L) if isinstance(kernel, Laplace) else math.exp(-r * r / (2 * L * L))
            assert K[i, j] == pytest.approx(k, rel=1e-13, abs=1e-300)


# ---- accuracy


@dtypes
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (2, 1), (7, 200), (3, 1000)])  # one row; d > n
def test_shapes(dtype, n, d, cloud):
    X, Z = cloud("spread", n=n, d=d, dtype=dtype), cloud("spread", n=4, d=d, dtype=dtype, seed=3)
    check(fastagop.kernel_matrix(Laplace(1.0), X), reference.kernel_matrix(Laplace(1.0), X))
    check(fastagop.kernel_matrix(Laplace(1.0), X, Z), reference.kernel_matrix(Laplace(1.0), X, Z))
    check(fastagop.kernel_matrix(Laplace(1.0), X, Z[:1]), reference.kernel_matrix(Laplace(1.0), X, Z[:1]))


# ---- blocks


@kernels
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3", "offset"])
@pytest.mark.parametrize("own", [True, False])
def test_many_blocks(kernel, name, own, cloud, tight_memory):
    X = cloud(name, n=131, dtype=torch.float32)
    Z = None if own else cloud(name, n=90, dtype=torch.float32, seed=4)
    block = tight_memory("kernel_matrix", kernel, X, Z)
    assert 1 <= block < 40
    assert 131 % block  # a last block of its own size
    K = fastagop.kernel_matrix(kernel, X, Z)
    check(K, reference.kernel_matrix(kernel, X, Z))
    if own:
        assert torch.equal(K, K.T)
        assert bool((K.diagonal() == 1).all())


@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3"])
def test_blocks_as_they_come(name, cloud, block_of):
    X = cloud(name, n=1100, d=3, dtype=torch.float32)  # more than two blocks, the last one short
    assert block_of("kernel_matrix", Laplace(2.0), X) < 1100
    K = fastagop.kernel_matrix(Laplace(2.0), X)
    check(K, reference.kernel_matrix(Laplace(2.0), X))
    assert torch.equal(K, K.T)
    check(fastagop.kernel_matrix(Laplace(2.0), X, X[:7].clone()), reference.kernel_matrix(Laplace(2.0), X, X[:7]))


def test_too_little_memory(cloud, little_memory):
    little_memory(100)
    with pytest.raises(MemoryError, match="kernel_matrix"):
        fastagop.kernel_matrix(Laplace(2.0), cloud("spread"))


# ---- arguments as they come


@dtypes
@pytest.mark.parametrize("layout", ["transposed", "every other column", "every other row", "one row repeated"])
def test_layouts(dtype, layout, cloud):
    plain = cloud("collapsed 1e-2", n=80, d=24, dtype=dtype)
    X = {
        "transposed": plain.T.contiguous().T,
        "every other column": plain[:, ::2],
        "every other row": plain[::2],
        "one row repeated": plain[:1].expand(9, 24),
    }[layout]
    assert not X.is_contiguous()
    check(fastagop.kernel_matrix(Laplace(2.0), X), reference.kernel_matrix(Laplace(2.0), X))
    Z = X[3:8]
    check(fastagop.kernel_matrix(Laplace(2.0), X, Z), reference.kernel_matrix(Laplace(2.0), X, Z))


def test_a_transpose_is_not_the_points(normal):
    X = normal(12, 12)  # the same memory and the same shape, seen another way
    check(fastagop.kernel_matrix(Laplace(2.0), X, X.T), reference.kernel_matrix(Laplace(2.0), X, X.T))


@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3"])
@pytest.mark.parametrize("own", [True, False])
def test_out(name, own, cloud):
    X = cloud(name, n=60, dtype=torch.float32)
    Z = None if own else cloud(name, n=33, dtype=torch.float32, seed=2)
    m = 60 if own else 33
    plain = fastagop.kernel_matrix(Laplace(2.0), X, Z)
    out = torch.full((60, m), torch.nan)
    assert fastagop.kernel_matrix(Laplace(2.0), X, Z, out=out) is out
    assert torch.equal(out, plain)
    wide = torch.full((64, m + 9), -7.0)  # a block of a larger matrix
    block = wide[2:62, 5 : 5 + m]
    assert fastagop.kernel_matrix(Laplace(2.0), X, Z, out=block) is block
    assert torch.equal(block, plain)
    wide[2:62, 5 : 5 + m] = -7.0
    assert bool((wide == -7).all())  # nothing beside it was touched
    columns = torch.full((m, 60), torch.nan).T  # column-major
    fastagop.kernel_matrix(Laplace(2.0), X, Z, out=columns)
    check(columns, reference.kernel_matrix(Laplace(2.0), X, Z))
    assert columns.stride() == (1, 60)


def test_out_must_not_be_an_input(cloud):
    # it would be written while it is still read
    large = cloud("spread", n=90, d=100)
    X, Z = large[:, :90], cloud("spread", n=90, d=90, seed=2)
    for out in (X, large[:, 10:], Z, Z.T):
        before = out.clone()
        with pytest.raises(ValueError, match=r"^out shares memory"):
            fastagop.kernel_matrix(Laplace(2.0), X, Z, out=out)
        assert torch.equal(out, before)
    # two parts of one storage that do not meet are fine
    storage = torch.cat([X.flatten(), torch.zeros(90 * 90)])
    X, out = storage[: 90 * 90].view(90, 90), storage[90 * 90 :].view(90, 90)
    check(fastagop.kernel_matrix(Laplace(2.0), X, out=out), reference.kernel_matrix(Laplace(2.0), X))


def test_inputs_are_left_alone_and_no_history_is_kept(cloud):
    X, Z = cloud("collapsed 1e-3", n=40).requires_grad_(), cloud("spread", n=20)
    before = X.detach().clone(), Z.clone()
    K = fastagop.kernel_matrix(Laplace(2.0), X, Z)
    assert not K.requires_grad
    assert K.is_contiguous()
    assert torch.equal(X.detach(), before[0])
    assert torch.equal(Z, before[1])
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("word", ["highest", "high", "medium"])
def test_precision_words(word, cloud):
    X = cloud("collapsed 1e-2", dtype=torch.float32)
    check(fastagop.kernel_matrix(Laplace(2.0), X, precision=word), reference.kernel_matrix(Laplace(2.0), X))


class Spy(Laplace):
    """Notes the precision that is in force while blocks are made."""

    def value_(self, sq):
        newer = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)  # torch >= 2.9
        SEEN.append(newer or torch.get_float32_matmul_precision())
        return super().value_(sq)


SEEN: list[str] = []


def test_process_settings_are_obeyed_by_nobody_and_kept(cloud):
    X = cloud("spread", dtype=torch.float32)
    checks.kernel(Spy(2.0))  # the class is tried once, which is no call
    SEEN.clear()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 on processors that have it
    try:
        check(fastagop.kernel_matrix(Spy(2.0), X), reference.kernel_matrix(Laplace(2.0), X))
        assert torch.get_float32_matmul_precision() == "medium"
        fastagop.kernel_matmul(Spy(2.0), X, None, X, precision="medium")
        assert len(set(SEEN)) == 1
        assert SEEN[0] in ("highest", "ieee")  # on the CPU always
    finally:
        torch.set_float32_matmul_precision(before)


def test_process_settings_survive(python):
    """torch refuses its old switch once its new ones have been used: neither may break a call, or be broken by it."""
    printed = python(
        """
import torch, fastagop
from fastagop.kernels import reference

def state():
    said = []
    for switch in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
        said.append(getattr(switch, "fp32_precision", None))  # torch >= 2.9
    try:
        said += [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32]
    except RuntimeError:
        said.append("mixed")
    return said

X = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) / 17
true = reference.kernel_matrix(fastagop.Laplace(1.0), X)

def check():
    before = state()
    error = fastagop.kernel_matrix(fastagop.Laplace(1.0), X, precision="medium").double() - true
    assert state() == before, (before, state())
    print(float(error.abs().max()))

check()
torch.set_float32_matmul_precision("medium")
check()
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    check()
"""
    )
    assert max(map(float, printed.split())) <= ENTRY[torch.float32]


# ---- laws


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), spread=st.sampled_from(["1", "1e-2", "1e-4"]), kernel=st.sampled_from(KERNELS))
def test_laws(seed, spread, kernel, cloud, normal):
    X = cloud(f"collapsed {spread}", n=40, d=6, seed=seed)
    Z = cloud(f"collapsed {spread}", n=25, d=6, seed=seed + 1)
    K = fastagop.kernel_matrix(kernel, X, Z)
    close = {"rtol": 0.0, "atol": ENTRY[torch.float64] * 2}  # both sides are rounded
    assert torch.allclose(fastagop.kernel_matrix(kernel, Z, X), K.T, **close)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(fastagop.kernel_matrix(kernel, X[order], Z), K[order], **close)
    # Moving or turning the points rounds them by about d eps of their size, whatever their distance: r changes by
    # that, k by that over the bandwidth.
    moved = {"rtol": 0.0, "atol": ENTRY[torch.float64] + 100 * 2.0**-52 * 5 / kernel.bandwidth}
    shift = 3.0 * normal(1, 6, seed=seed)
    assert torch.allclose(fastagop.kernel_matrix(kernel, X + shift, Z + shift), K, **moved)
    turn = torch.linalg.qr(normal(6, 6, seed=seed)).Q
    assert torch.allclose(fastagop.kernel_matrix(kernel, X @ turn, Z @ turn), K, **moved)
    wider = type(kernel)(4.0 * kernel.bandwidth)  # a power of two: exact
    assert torch.allclose(fastagop.kernel_matrix(wider, 4.0 * X, 4.0 * Z), K, **close)
    if isinstance(kernel, Gaussian):
        own = fastagop.kernel_matrix(kernel, X)
        assert float(torch.linalg.eigvalsh(own)[0]) >= -40 * 2.0**-52 * 40


@dtypes
@pytest.mark.parametrize("size", [1e-15, 1e15])  # squares still fit into float32 (1e-38 .. 1e38)
def test_units_do_not_matter(dtype, size, cloud):
    X = cloud("collapsed 1", dtype=dtype) * size
    check(fastagop.kernel_matrix(Laplace(size), X), reference.kernel_matrix(Laplace(size), X))


@every_kernel
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e25, 1e36])  # float32 numbers whose squares are not
def test_extreme_units(kernel, size, cloud, normal, relative):
    X, V = cloud("collapsed 1", dtype=torch.float32) * size, normal(120, 2, dtype=torch.float32)
    Z = cloud("collapsed 1", n=30, dtype=torch.float32, seed=2) * size
    kernel = dataclasses.replace(kernel, bandwidth=kernel.bandwidth * size)
    # the reference squares distances in float64, where that is no trouble
    check(fastagop.kernel_matrix(kernel, X), reference.kernel_matrix(kernel, X))
    check(fastagop.kernel_matrix(kernel, X, Z), reference.kernel_matrix(kernel, X, Z))
    product = fastagop.kernel_matmul(kernel, X, None, V.abs())
    assert relative(product, reference.kernel_matmul(kernel, X, X, V.abs())) <= TOLERANCE[torch.float32]


def test_units_of_very_different_sets(cloud):
    # far points beside near ones: nothing overflows
    X, far = cloud("collapsed 1", dtype=torch.float32), 1e30 * cloud("spread", n=20, dtype=torch.float32, seed=2)
    check(fastagop.kernel_matrix(Laplace(1e30), X, far), reference.kernel_matrix(Laplace(1e30), X, far))
    check(fastagop.kernel_matrix(Laplace(2.0), X, far), reference.kernel_matrix(Laplace(2.0), X, far))
    with pytest.raises(ValueError, match=r"X\[\d+\] has an entry of size .* cannot hold"):  # what is near would vanish
        fastagop.kernel_matrix(Laplace(2.0), torch.cat([X, far]))
    with pytest.raises(ValueError, match=r"Z\[\d+\] has an entry of size .* cannot hold"):
        fastagop.kernel_matrix(Laplace(2.0), X, torch.cat([X, far]))
    wide = fastagop.kernel_matrix(Laplace(2.0), torch.cat([X, far]).double())
    check(wide[: len(X), : len(X)].float(), reference.kernel_matrix(Laplace(2.0), X))
