"""What every rank runs in test_distributed.py.

    torchrun --nproc-per-node 2 tests/rank_cases.py functions guards deep_rfm=FOLDER
    python tests/rank_cases.py 3:functions 2:lost=SIGKILL    forks the ranks, without a start of Python for each

A case compares with the single-process result on every rank and raises where they differ.
"""

from __future__ import annotations

import datetime
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fastagop.kernels import plan, reference
from fastagop.kernels.torch_backend import matrix
from sklearn.base import clone

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, Gaussian, Laplace, RFMClassifier, distributed
from fastagop.distributed import communicator
from fastagop.distributed.blocks import SharedBlocks
from fastagop.distributed.communicator import Communicator
from fastagop.estimators import float64_fit
from fastagop.solvers import problem


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def collapsed(n, d, dtype, spread=1e-4):
    """Five tight classes with exact duplicates: what the guards are for."""
    X = torch.nn.functional.normalize(normal(5, d))[torch.arange(n) % 5] + spread * normal(n, d, seed=1)
    X[7], X[12], X[n - 1] = X[2], X[2], X[n - 6]
    return X.to(dtype)


def error(a, b):
    """Relative Frobenius error."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    size = torch.linalg.vector_norm(b)
    return float(torch.linalg.vector_norm(a - b) / (size if size > 0 else 1.0))


def tensor_memory(call):
    """(result, bytes of CPU tensors alive at once beyond those before)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()
    alive = most = 0
    for _, count in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        alive += count
        most = max(most, alive)
    return result, most


def least_room(_):
    """Every rank may take what the poorest one has, and the processes of a machine share that."""
    plain, few = plan.available_bytes, 900_000
    plan.available_bytes = lambda device: few if dist.get_rank() == 1 else plain(device)
    _, room = communicator.Communicator(None, "agop", torch.device("cpu")).agree(lambda: None, "the same")
    plan.available_bytes = plain
    assert 0.5 * few <= room * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= few


def reports(_):
    """Two close points with different targets: what the first rank alters, every rank is told."""
    X, Y = normal(60, 6), normal(60, 2, seed=1)
    X[1], Y[1] = X[0] + 1e-12, Y[0] + 1.0
    with pytest.warns(fastagop.NumericalWarning, match="jitter") as said:
        distributed.solve(Laplace(2.0), X, Y)
    assert len(said) == 1


def same_everywhere(value):
    """Every rank holds the same bits."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, np.asarray(value).tobytes())
    assert len(set(everyone)) == 1


def functions(_):
    """Every function, form and option on data of every shape: n not divisible, m of one row, d > n, K = 1."""
    communicator._PIECE, communicator._PIECE_ROWS = 64, 3  # results travel in many pieces, the last one shorter
    bound = {torch.float64: 1e-11, torch.float32: 1e-5}  # sums in another order; float32's forms differ by 1e-6
    for dtype, most in bound.items():
        for n, d, K, m in ((61, 5, 3, 40), (20, 30, 1, 1), (150, 4, 40, 33)):
            X, alpha, Z = (
                normal(n, d, dtype=dtype),
                normal(n, K, seed=2, dtype=dtype),
                normal(m, d, seed=3, dtype=dtype),
            )
            X, Z = X[:, torch.arange(d)], Z.T.contiguous().T  # Z is not contiguous
            kernel = Laplace(2.0) if n % 2 else Gaussian(2.0)
            for points in (None, Z):
                for method in ("auto", "gradient", "gram"):
                    for center in (False, True):
                        options = {"method": method, "center": center, "reduction": "sum" if center else "mean"}
                        M = distributed.agop(kernel, X, alpha, points, **options)
                        assert error(M, fastagop.agop(kernel, X, alpha, points, **options)) < most, options
                        assert M.dtype == dtype
                        same_everywhere(M)
                G = distributed.gradients(kernel, X, alpha, points)
                assert error(G, fastagop.gradients(kernel, X, alpha, points)) < most
                V = alpha if points is None else normal(m, 2, seed=4, dtype=dtype)
                P = distributed.kernel_matmul(kernel, X, points, V)
                assert error(P, fastagop.kernel_matmul(kernel, X, points, V)) < most
                same_everywhere(P)
                same_everywhere(G)


def empty_shares(_):
    """More ranks than rows, no rows at all, no outputs: what one process gives, for every function and option."""
    kernel = Laplace(2.0)
    for n, d, K, m in ((1, 3, 1, None), (2, 3, 0, None), (2, 3, 2, 0), (7, 3, 0, 0), (2, 3, 2, 1), (5, 3, 0, 2)):
        X, alpha, V = normal(n, d), normal(n, K, seed=2), normal(n if m is None else m, K, seed=4)
        Z = None if m is None else normal(m, d, seed=3)
        calls = [("gradients", (alpha, Z), {}), ("kernel_matmul", (Z, V), {})]
        calls += [("solve", (alpha,), {"ridge": 0.1, "method": how}) for how in ("auto", "cholesky", "eigh", "cg")]
        for method in ("auto", "gradient", "gram"):
            for center in (False, True):
                for reduction in ("sum",) if m == 0 else ("sum", "mean"):
                    options = {"method": method, "center": center, "reduction": reduction}
                    calls.append(("agop", (alpha, Z), options))
        for name, rest, options in calls:
            shared, alone = (getattr(module, name)(kernel, X, *rest, **options) for module in (distributed, fastagop))
            shared, alone = (result.alpha if name == "solve" else result for result in (shared, alone))
            assert bool(shared.isfinite().all()), (name, options, n, d, K, m)
            assert error(shared, alone) < 1e-11, (name, options, n, d, K, m)


def weighted(_):
    """Weights of points are split with the points; a share of weight 0, weights of any size, and disagreement."""
    kernel = Laplace(2.0)
    for dtype, most in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        for n, m in ((61, None), (61, 40), (3, 2), (61, 1)):
            X, alpha = normal(n, 5, dtype=dtype), normal(n, 8, seed=2, dtype=dtype)
            Z = None if m is None else normal(m, 5, seed=3, dtype=dtype)
            w = normal(m or n, seed=4, dtype=dtype).abs()
            first = torch.arange(len(w)) == 0  # the other ranks' shares weigh nothing
            for weights in (w, w * first, 1e-30 * w, 1e30 * w):
                for method in ("auto", "gradient", "gram"):
                    for center, reduction in ((False, "mean"), (True, "mean"), (True, "sum")):
                        how = {"method": method, "center": center, "reduction": reduction, "sample_weight": weights}
                        if reduction == "sum" and float(weights.max()) > 1e6 and dtype == torch.float32:
                            continue
                        M = distributed.agop(kernel, X, alpha, Z, **how)
                        alone = fastagop.agop(kernel, X, alpha, Z, **how)
                        scale = float(fastagop.agop(kernel, X, alpha, Z, **{**how, "center": False}).abs().max())
                        assert float((M - alone).abs().max()) <= most * scale, (n, m, dtype, how)
                        assert torch.equal(M, M.T)
                        same_everywhere(M)
    X, alpha, w = normal(40, 3), normal(40, 2), normal(40, seed=5).abs()
    moved = w.roll(dist.get_rank())
    error_ = "sample_weight must be the same on every rank"
    refused(error_, ValueError, lambda: distributed.agop(kernel, X, alpha, sample_weight=moved))
    zeros = distributed.agop(kernel, X, alpha, sample_weight=0 * w, center=True, reduction="sum")
    assert error(zeros, torch.zeros(3, 3)) == 0
    message = "sample_weight must have a weight above 0"
    refused(message, ValueError, lambda: distributed.agop(kernel, X, alpha, sample_weight=0 * w))


def unequal_memory(_):
    """A rank with little memory makes all cut their work as it must: smaller blocks, or no stored weights."""
    X, V, plain = normal(200, 6), normal(200, 3, seed=3), plan.available_bytes
    for outputs, few in ((400, 900_000), (40, 600_000)):
        alpha = normal(200, outputs, seed=2)
        alone = fastagop.agop(Laplace(2.0), X, alpha), fastagop.kernel_matmul(Laplace(2.0), X, None, V)
        plan.available_bytes = lambda device, few=few: few if dist.get_rank() == 1 else plain(device)
        shared = distributed.agop(Laplace(2.0), X, alpha), distributed.kernel_matmul(Laplace(2.0), X, None, V)
        plan.available_bytes = plain
        for a, b in zip(shared, alone, strict=True):
            assert error(a, b) < 1e-11
    _, free = tensor_memory(lambda: distributed.agop(Laplace(2.0), X, alpha))
    plan.available_bytes = lambda device: 600_000 if dist.get_rank() == 1 else plain(device)
    _, taken = tensor_memory(lambda: distributed.agop(Laplace(2.0), X, alpha))
    plan.available_bytes = plain
    assert taken < 0.75 * free  # on every rank


def guards(_):
    """Collapsed classes with duplicates: the gram form is refused where it is in one process, M is as good."""
    for dtype in (torch.float64, torch.float32):
        X, alpha = collapsed(120, 12, dtype), normal(120, 60, seed=2, dtype=dtype)
        for points in (None, X[:50].clone()):  # a copy: duplicates of centers, not the centers themselves
            truth = reference.agop(Laplace(1.0), X, alpha, points)
            for method in ("auto", "gradient", "gram"):
                here = error(fastagop.agop(Laplace(1.0), X, alpha, points, method=method), truth)
                M = distributed.agop(Laplace(1.0), X, alpha, points, method=method)
                assert error(M, truth) < 2 * here + 4 * torch.finfo(dtype).eps, (dtype, method)
        V = normal(120, 2, dtype=dtype)
        product = reference.kernel_matrix(Laplace(1.0), X) @ V.double()
        here = error(fastagop.kernel_matmul(Laplace(1.0), X, None, V), product)
        # Two orders of one sum: both are a few eps from the truth, and their ratio says nothing.
        there = error(distributed.kernel_matmul(Laplace(1.0), X, None, V), product)
        assert there < 2 * here + 4 * torch.finfo(dtype).eps, (dtype, there, here)


def solving(_):
    X, Y = normal(150, 6, dtype=torch.float32), normal(150, 3, seed=1, dtype=torch.float32)
    for method in ("auto", "eigh", "cg", fastagop.ConjugateGradients(rank=0, max_iterations=400)):
        shared = distributed.solve(Laplace(2.0), X, Y, ridge=0.1, method=method)
        alone = fastagop.solve(Laplace(2.0), X, Y, ridge=0.1, method=method)
        assert error(shared.alpha, alone.alpha) < 1e-5, method
        assert (shared.method, shared.iterations, shared.rank) == (alone.method, alone.iterations, alone.rank)
        same_everywhere(shared.alpha)
    w = normal(150, seed=6, dtype=torch.float32).abs()
    copied = torch.cat([X[:100], X[:50]])  # copies with other targets: merged, whoever solves
    for points in (X, copied):
        for method in ("cholesky", "eigh", "cg"):
            how = {"ridge": 0.1, "method": method, "sample_weight": w}
            shared = distributed.solve(Laplace(2.0), points, Y, **how)
            assert error(shared.alpha, fastagop.solve(Laplace(2.0), points, Y, **how).alpha) < 1e-5, method
            same_everywhere(shared.alpha)
    moved = w.roll(dist.get_rank())
    message = "sample_weight must be the same on every rank"
    refused(message, ValueError, lambda: distributed.solve(Laplace(2.0), X, Y, ridge=0.1, sample_weight=moved))
    far = 2.0**30 * normal(50, 3)  # lengths whose squares need another unit
    shared = distributed.solve(Laplace(2.0**30), far, Y[:50].double(), method="cg", ridge=0.1)
    assert error(shared.alpha, fastagop.solve(Laplace(2.0**30), far, Y[:50].double(), ridge=0.1).alpha) < 1e-5
    with pytest.raises(MemoryError, match="may be used"):
        distributed.solve(Laplace(2.0), X, Y, method="cholesky", memory_limit=1000)


def shared_factors(_):
    """Half of a matrix dealt out to the ranks: one process's answer, and every rank holds its share only."""
    X, Y = normal(333, 6), normal(333, 3, seed=1)
    held, problem.FULL_MATRIX_ROWS, work, float64_fit._WORK = [], 64, float64_fit._WORK, 0.0  # nothing is small
    try:
        for points, how in (
            (X.float(), {"method": "auto"}),  # float64 values and a float32 factor
            (X, {"method": "cholesky"}),  # a float64 factor in place
            (X, {"method": "cholesky", "ridge": 1e-2}),
            (X, {"method": fastagop.CholeskyCG(tolerance=1e-12)}),
        ):
            alone = fastagop.solve(Laplace(2.0), points, Y.to(points), **how)
            shared = distributed.solve(Laplace(2.0), points, Y.to(points), **how)
            assert error(shared.alpha, alone.alpha) < (1e-10 if points is X else 1e-6), how
            assert (shared.method, shared.rank, shared.jitter) == (alone.method, alone.rank, alone.jitter)
            same_everywhere(shared.alpha)
        for kernel, ridge in (
            (Gaussian(30.0), 1e-9),
            (Laplace(2.0), 0.0),
        ):  # a float32 pivot that fails; contradictions
            points = X.float() if ridge else torch.cat([X[:300], X[:33] + 1e-13])
            how = {"method": "cholesky+cg", "ridge": ridge}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                alone = fastagop.solve(kernel, points, Y.to(points), **how)
                shared = distributed.solve(kernel, points, Y.to(points), **how)
            assert shared.method == alone.method == "cholesky"
            assert shared.fallback
            assert 0.5 < shared.jitter / alone.jitter < 2
            same_everywhere(shared.alpha)
        blocks = SharedBlocks(333, torch.float64, Communicator(None, "solve", torch.device("cpu")), rows=32)
        held = sum(block.numel() for block in blocks.blocks)
        assert held < 0.65 * 333**2 / dist.get_world_size() + 32 * 333
        deep = DeepRFMClassifier(Laplace(1.0), depth=2, width=48, ridge=0.0)
        labels = Y[:, 0] > 0
        one = clone(deep).fit(X.float(), labels)
        many = clone(deep).set_params(process_group=dist.group.WORLD).fit(X.float(), labels)
        assert many.layers_[0].solution.method == one.layers_[0].solution.method == "cholesky+cg"
        assert error(many.agops_[0], one.agops_[0]) < 1e-5  # later ones see labels that are noise
    finally:
        problem.FULL_MATRIX_ROWS, float64_fit._WORK = 4096, work


def stop_after_two(event):
    if event.layer == 1:
        raise KeyboardInterrupt


def deep_rfm(folder):
    """Three layers on the group: the single-process features, the same bits on every rank; checkpoint and clone."""
    X, y = normal(120, 12).numpy(), np.arange(120) % 3
    X[:, 0] += y
    group = dist.group.WORLD
    settings = {"depth": 3, "width": 64, "random_state": 0, "dtype": "float64"}
    alone = DeepRFMClassifier(**settings).fit(X, y)
    model = clone(DeepRFMClassifier(**settings, process_group=group, checkpoint_dir=folder))
    assert model.process_group is group
    model.fit(X, y)
    assert error(model.transform(X), alone.transform(X)) < 1e-9
    assert error(model.decision_function(X), alone.decision_function(X)) < 1e-9
    same_everywhere(model.transform(X))
    seen = []
    again = clone(model).set_params(callbacks=[seen.append]).fit(X, y)  # everything is in the checkpoint
    assert seen == []
    assert np.array_equal(again.transform(X), model.transform(X))
    halfway = clone(model).set_params(checkpoint_dir=f"{folder}-halfway", callbacks=[stop_after_two])
    with pytest.raises(KeyboardInterrupt):
        halfway.fit(X, y)
    halfway.set_params(callbacks=[seen.append]).fit(X, y)
    assert [event.layer for event in seen] == [2]
    assert np.array_equal(halfway.transform(X), model.transform(X))
    same_everywhere(halfway.transform(X))
    assert pickle.loads(pickle.dumps(model)).process_group is None
    unseeded = DeepRFMRegressor(depth=1, width=16, process_group=group).fit(X, X[:, :2])
    same_everywhere(unseeded.transform(X))


def deep_rfm_float32(_):
    """Three layers on real data: float32's own rounding, which every layer multiplies, stays below 1e-5."""
    X, y = (part.numpy() for part in fastagop.datasets.load("digits", n=500))
    settings = {"depth": 3, "width": 128, "random_state": 0}
    alone = DeepRFMClassifier(**settings).fit(X, y)
    model = DeepRFMClassifier(**settings, process_group=dist.group.WORLD).fit(X, y)
    for layer in (1, 2, 3):
        assert error(model.transform(X, layer), alone.transform(X, layer)) < 1e-5, layer
    assert error(model.decision_function(X), alone.decision_function(X)) < 1e-5
    same_everywhere(model.transform(X))


def rfm(_):
    """Two iterations on the group: the single-process metric, the same bits on every rank."""
    X, y = normal(90, 8).numpy(), np.arange(90) % 3
    X[:, 0] += y
    for more, weights in (({}, None), ({"diagonal": True}, None), ({}, 1 + y), ({"diagonal": True}, 1 + y)):
        settings = {"iterations": 2, "center": True, "dtype": "float64", **more}
        alone = RFMClassifier(**settings).fit(X, y, weights)
        model = clone(RFMClassifier(**settings, process_group=dist.group.WORLD)).fit(X, y, weights)
        assert error(model.M_, alone.M_) < 1e-9
        assert "ranks      2: each makes its part" in fastagop.explain(model, X, y)
        assert error(model.decision_function(X), alone.decision_function(X)) < 1e-9
        same_everywhere(model.decision_function(X))


def copies_of_rows(_):
    """Copies with other labels, and close pairs whose float32 coefficients would lose M: as one process has it."""
    X, y = normal(90, 8, dtype=torch.float32), torch.arange(90) % 2
    X[80:85], y[80:85] = X[:5], 1 - y[:5]
    X[85:], y[85:] = X[5:10] + 1e-4 * normal(5, 8, seed=3).float(), 1 - y[5:10]
    for center in (False, True):
        settings = {"iterations": 1, "ridge": 0.0, "center": center, "agop_scale": "sum"}
        with pytest.warns(fastagop.NumericalWarning, match="10 rows are copies"):
            alone = RFMClassifier(**settings).fit(X, y)
        with pytest.warns(fastagop.NumericalWarning, match="10 rows are copies"):
            model = RFMClassifier(**settings, process_group=dist.group.WORLD).fit(X, y)
        assert model.iterations_[0].solution.merged == 5
        assert error(model.iterations_[0].solution.alpha, alone.iterations_[0].solution.alpha) < 1e-9
        assert error(model.M_, alone.M_) < 1e-6
        same_everywhere(model.M_)
    Y, w = normal(90, 2, seed=1), (torch.arange(90) % 3).double()
    how = {"ridge": 1e-2, "sample_weight": w}
    for method in ("cholesky", "cg"):
        shared = distributed.solve(Laplace(2.0), X.double(), Y, method=method, **how)
        plain = fastagop.solve(Laplace(2.0), X.double(), Y, method=method, **how)
        assert error(shared.alpha, plain.alpha) < 1e-4
        assert abs(shared.residual - plain.residual) < 1e-5


def refused(message, error_type, call):
    with pytest.raises(error_type, match=re.escape(message)):
        call()


def disagreement(_):
    """Communicator that pass different things are told so, all of them, and can go on."""
    rank, kernel, X, Y = dist.get_rank(), Laplace(2.0), normal(40, 3), normal(40, 2, seed=1)
    other = X.clone()
    other[17, 2] += 1e-15 * rank
    swapped = X[torch.arange(40).roll(1)] if rank else X
    refused("X must be the same on every rank", ValueError, lambda: distributed.agop(kernel, other, Y))
    refused("X must be the same on every rank", ValueError, lambda: distributed.solve(kernel, swapped, Y))
    labels = 2.0 * torch.nn.functional.one_hot(torch.arange(40) % 3).double() - 1.0
    moved = labels.roll(rank, 0)  # every row and every column has the sum it had
    refused("Y must be the same on every rank", ValueError, lambda: distributed.solve(kernel, X, moved))
    refused("alpha must be the same on every rank", ValueError, lambda: distributed.agop(kernel, X, moved))
    y = np.roll(np.arange(40) % 3, rank)
    for model in (DeepRFMClassifier(depth=1, width=8, random_state=0), RFMClassifier(iterations=1)):
        model.set_params(process_group=dist.group.WORLD)
        refused("Y must be the same on every rank", ValueError, lambda model=model: model.fit(X, y))
        refused(
            "classes [0, 1, 2]), rank 1", ValueError, lambda model=model: model.fit(X, np.arange(40) % 3 + 5 * rank)
        )
        damaged = X * float("nan") if rank else X  # the first rank's fit must not wait for the others
        said, kind = ("NaN", ValueError) if rank else ("rank 1 refused its arguments", RuntimeError)
        refused(said, kind, lambda model=model, damaged=damaged: model.fit(damaged, np.arange(40) % 3))
        unlike = clone(model).set_params(ridge=-1.0 if rank else 1.0, process_group=dist.group.WORLD)
        said = "ridge must be" if rank else said
        refused(said, kind, lambda unlike=unlike: unlike.fit(X, np.arange(40) % 3))
    model, y = RFMClassifier(iterations=1, process_group=dist.group.WORLD), np.arange(40) % 3
    for names, rows, labels, mine in (
        ("X_val must be the same on every rank", X[:9] + 1e-15 * rank, y[:9], ""),
        ("y_val must be the same on every rank", X[:9], np.roll(y[:9], rank), ""),
        ("", X[:9] if rank == 0 else X[:9] * float("nan"), y[:9], "X_val: X holds NaN"),
        ("", X[:9], y[:9] + 9 * rank, "y_val holds none of y's labels"),
    ):
        said, kind = (names or mine, ValueError) if rank or names else ("rank 1 refused its arguments", RuntimeError)
        refused(said, kind, lambda rows=rows, labels=labels: model.fit(X, y, X_val=rows, y_val=labels))
    refused("Z must be the same", ValueError, lambda: distributed.gradients(kernel, X, Y, other if rank else X))
    copied = X.clone() if rank else X  # equal numbers, but only one rank knows that the points are the centers
    refused("Z must be the same", ValueError, lambda: distributed.agop(kernel, X, Y, copied, method="gram"))
    distributed.agop(kernel, X, Y, X.view(40, 3) if rank else None)  # the same thing said differently
    shapes = "torch.float64 (40, 2) and torch.float64 (40, 1)"
    refused(shapes, ValueError, lambda: distributed.agop(kernel, X, Y[:, : 2 - rank]))
    options = {"reduction": "sum"} if rank else {}
    refused("must make the same call", ValueError, lambda: distributed.agop(kernel, X, Y, **options))
    refused("must make the same call", ValueError, lambda: distributed.agop(Laplace(2.0 + rank), X, Y))
    call = distributed.agop if rank else distributed.solve
    refused("must make the same call", ValueError, lambda: call(kernel, X, Y))
    wrong = Y[:20] if rank else Y
    said, kind = ("40 rows", ValueError) if rank else ("rank 1 refused its arguments", RuntimeError)
    refused(said, kind, lambda: distributed.agop(kernel, X, wrong))
    model = DeepRFMClassifier(depth=1, width=8, random_state=rank, process_group=dist.group.WORLD)
    refused("must make the same call", ValueError, lambda: model.fit(X, np.arange(40) % 2))
    refused("process group or None", TypeError, lambda: distributed.agop(kernel, X, Y, group="world"))
    mine = dist.new_group([1])
    if rank == 0:
        refused("not in the group", ValueError, lambda: distributed.agop(kernel, X, Y, group=mine))
    else:
        assert error(distributed.agop(kernel, X, Y, group=mine), fastagop.agop(kernel, X, Y)) == 0
        assert error(distributed.solve(kernel, X, Y, group=mine).alpha, fastagop.solve(kernel, X, Y).alpha) == 0


def lost(how):
    """Rank 1 dies or hangs in the middle of an iteration; rank 0 must say so instead of waiting for ever."""
    X, Y = normal(60, 3), normal(60, 2, seed=1)
    steps = 0
    plain = matrix.kernel_matmul

    def dying(*args):
        nonlocal steps
        steps += 1
        if dist.get_rank() == 1 and steps == 3:
            os.kill(os.getpid(), getattr(signal, how))
        return plain(*args)

    matrix.kernel_matmul = dying
    start = time.perf_counter()
    options = fastagop.ConjugateGradients(rank=0)
    try:
        distributed.solve(Laplace(2.0), X, Y, ridge=1e-3, method=options)
    except distributed.RankLost as error_:
        print(f"after {time.perf_counter() - start:.1f} s: {error_}", flush=True)
        os._exit(3)


def join(cases, **where):
    """Join the group and run the cases."""
    torch.set_num_threads(1)
    seconds = 4 if cases[0].startswith("lost") else 60
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds), **where)
    for case in cases:
        name, _, argument = case.partition("=")
        globals()[name](argument or None)
    time.sleep(0.1)  # torch 2.6 deadlocks where gloo's thread still holds the last collective
    dist.destroy_process_group()


def fork(size, case):
    """Run a case on forked ranks; the first one's exit status."""
    store, children = f"file://{tempfile.mktemp()}", []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                join([case], init_method=store, rank=rank, world_size=size)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    if case.startswith("lost"):
        os.kill(children[1], signal.SIGKILL)  # it may be stopped
    others = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children[1:]]
    return status if case.startswith("lost") else max(map(abs, [status, *others]))


if __name__ == "__main__":
    if "RANK" in os.environ:
        join(sys.argv[1:])
    else:
        for word in sys.argv[1:]:
            size, _, case = word.partition(":")
            print(f"{word} ended with {fork(int(size), case)}", flush=True)
