"""kernel_matmul takes Z or leaves it out, in one process and as its plan; a missing V is named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fastagop
from fastagop import Laplace, distributed

KERNEL = Laplace(2.0)


@pytest.fixture
def data(cloud, normal):
    return cloud("spread", n=30, d=4), cloud("spread", n=12, d=4, seed=2), normal(30, 3), normal(12, 3)


def test_every_way_to_say_it(data):
    X, Z, V, W = data
    own = fastagop.kernel_matmul(KERNEL, X, None, V)
    assert torch.equal(fastagop.kernel_matmul(KERNEL, X, V=V), own)
    assert torch.equal(fastagop.kernel_matmul(KERNEL, X, X, V), own)
    assert torch.equal(fastagop.kernel_matmul(kernel=KERNEL, X=X, V=V), own)
    other = fastagop.kernel_matmul(KERNEL, X, Z, W)
    assert torch.equal(fastagop.kernel_matmul(KERNEL, X, V=W, Z=Z), other)
    assert torch.allclose(other, fastagop.kernel_matrix(KERNEL, X, Z) @ W, rtol=1e-12, atol=0)
    assert fastagop.explain("kernel_matmul", KERNEL, X, V=V) == fastagop.explain("kernel_matmul", KERNEL, X, None, V)


@pytest.mark.parametrize("call", [fastagop.kernel_matmul, lambda *args: fastagop.explain("kernel_matmul", *args)])
def test_a_missing_v_is_named(call, data):
    X, Z, *_ = data
    for points in ((X,), (X, Z), (X, None), (X, Z, None)):
        with pytest.raises(TypeError, match=r"^V must be a torch.Tensor, got none; .*V=V"):
            call(KERNEL, *points)


def test_shared(tmp_path, data):
    X, Z, V, W = data
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert torch.equal(distributed.kernel_matmul(KERNEL, X, V=V), distributed.kernel_matmul(KERNEL, X, None, V))
        assert torch.allclose(distributed.kernel_matmul(KERNEL, X, V=V), fastagop.kernel_matmul(KERNEL, X, V=V))
        assert torch.equal(distributed.kernel_matmul(KERNEL, X, Z, W), fastagop.kernel_matmul(KERNEL, X, Z, W))
        with pytest.raises(TypeError, match=r"^V must be a torch.Tensor, got none"):
            distributed.kernel_matmul(KERNEL, X)
    finally:
        dist.destroy_process_group()
