"""Shared by the ranks of a group: the single-process results, the same bits everywhere, and errors instead of hangs."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sklearn.base import clone

import fastagop
from fastagop import DeepRFMClassifier, Laplace, distributed
from fastagop.distributed.communicator import Communicator, RankLost, _portable

CASES = Path(__file__).with_name("rank_cases.py")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def run(*words):
    """What a command prints, on one thread a process."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_two_ranks(tmp_path):
    """Under torchrun, and one start for all cases: it costs more than they do."""
    folder = tmp_path / "checkpoint"
    deep = (f"deep_rfm={folder}", "deep_rfm_float32")
    cases = (
        "functions",
        "empty_shares",
        "weighted",
        "unequal_memory",
        "guards",
        "solving",
        "shared_factors",
        *deep,
        "rfm",
        "copies_of_rows",
        "disagreement",
    )
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, CASES, *cases)


def test_shares_of_nothing_and_lost_ranks():
    """Three ranks for one row; a dead rank is noticed at once, a hung one in time.

    Without torchrun, which would end the other ranks by itself.
    """
    said, errors = run(CASES, "3:functions", "3:empty_shares", "2:lost=SIGKILL", "2:lost=SIGSTOP")
    assert "3:functions ended with 0" in said, errors
    assert "3:empty_shares ended with 0" in said, errors
    for case, seconds in (("SIGKILL", 3), ("SIGSTOP", 7)):
        report, said = said.split(f"2:lost={case} ended with 3", 1)
        report = report[report.index("after") :]
        assert "distributed.solve: rank 0 of 2 lost another rank" in report
        assert "Start all ranks again" in report
        assert float(report.split()[1]) < seconds


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_rank_is_the_plain_call(alone, cloud, normal):
    X, alpha = cloud("spread", 50, 4), normal(50, 2)
    assert torch.equal(distributed.agop(Laplace(2.0), X, alpha), fastagop.agop(Laplace(2.0), X, alpha))
    for outputs in (2, 40):  # with many, the gram form
        many = normal(50, outputs)
        plain = fastagop.agop(Laplace(2.0), X, many, center=True)
        assert torch.equal(distributed.agop(Laplace(2.0), X, many, center=True), plain)
    assert torch.equal(distributed.gradients(Laplace(2.0), X, alpha), fastagop.gradients(Laplace(2.0), X, alpha))
    shared, plain = (module.solve(Laplace(2.0), X, alpha, ridge=1e-3) for module in (distributed, fastagop))
    assert torch.equal(shared.alpha, plain.alpha)
    assert shared.residual == plain.residual


@pytest.mark.parametrize(("length", "size"), [(1e25, 1e25), (1e-18, 1e-10), (1.0, 1e-18)])
def test_points_and_coefficients_of_any_size(length, size, alone, cloud, normal, relative):
    """Numbers whose squares leave float32 where those of the result do not."""
    X, alpha = cloud("spread", 50, 6, dtype=torch.float32) * length, normal(50, 2, dtype=torch.float32) * size
    kernel = Laplace(2.0 * length)
    assert relative(distributed.agop(kernel, X, alpha), fastagop.agop(kernel, X, alpha)) <= 1e-6


def test_a_result_beyond_the_dtype_is_refused(alone, cloud, normal):
    X, alpha = cloud("spread", 50, 6, dtype=torch.float32) * 1e-25, normal(50, 2, dtype=torch.float32)
    for module in (fastagop, distributed):
        with pytest.raises(ValueError, match=r"alpha is so large that the AGOP leaves torch\.float32"):
            module.agop(Laplace(2e-25), X, alpha)


class Unrepeatable(Exception):
    """An error whose class takes other arguments than its text."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize("error", [ValueError("X is wrong"), Unrepeatable("one", "two")], ids=["plain", "own"])
def test_errors_arrive_at_other_ranks(error):
    arrived = pickle.loads(pickle.dumps(_portable(error)))
    assert isinstance(arrived, type(error) if isinstance(error, ValueError) else RuntimeError)
    assert str(error) in str(arrived)


def test_other_ranks_do_not_wait_for_a_product_that_fails_on_the_first(alone, monkeypatch):
    """They have made their parts and give them to it; then they hear of its error."""
    took, plain = [], dist.reduce

    def reduce(part, *args, **how):
        took.append(part.clone())
        return plain(part, *args, **how)

    def handle(V, number):
        raise MemoryError("no room for a block")

    monkeypatch.setattr(dist, "reduce", reduce)
    V = torch.ones(5, 2, dtype=torch.float64)
    with pytest.raises(MemoryError, match="no room for a block"):
        Communicator(alone, "solve", V.device).run_on_root(lambda request: request(V, 7), handle)
    (part,) = took
    assert part.tolist() == [0.0] * 10 + [1.0]  # and a mark in the place of this rank


def test_an_error_of_the_first_rank_is_shown_where_others_are_lost_too(alone, monkeypatch):
    """Its own memory runs out while others wait for its part, say, which do not hear of it then."""

    def lost(order):
        raise RankLost("rank 0 of 2 lost another rank")

    def job(request):
        raise MemoryError("no more")

    ranks = Communicator(alone, "solve", torch.device("cpu"))
    monkeypatch.setattr(ranks, "_order", lost)
    with pytest.raises(RankLost) as error:
        ranks.run_on_root(job)
    assert isinstance(error.value.__context__, MemoryError)


@pytest.mark.parametrize("name", ["agop", "gradients", "kernel_matmul", "solve"])
def test_signatures(name):
    """The plain call's arguments, and the group."""
    plain, shared = (inspect.signature(getattr(module, name)).parameters for module in (fastagop, distributed))
    assert [(p.name, p.kind, p.default) for p in plain.values()] == [
        (p.name, p.kind, p.default) for p in list(shared.values())[:-1]
    ]
    assert list(shared)[-1] == "group"
    assert shared["group"].default is None


def test_without_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.agop(Laplace(2.0), torch.zeros(3, 2), torch.zeros(3, 1))


def test_groups_survive_clone_and_stay_out_of_copies(alone):
    model = DeepRFMClassifier(process_group=alone)
    assert clone(model).process_group is alone
    assert clone(model).get_params() == model.get_params()
    assert model.process_group is alone  # cloning has put it back


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 64, 1000])
def test_shares(size, count, alone):
    """Rows and blocks are dealt out once each, and the triangle's area evenly."""
    ranks = Communicator(alone, "agop", torch.device("cpu"))
    ranks.size, rows, starts, area = size, [], [], []
    for ranks.rank in range(size):
        rows += range(*ranks.rows(count))
        block, mine = ranks.blocks(count, 512)
        starts += mine
        area.append(sum(min(count, start + block) ** 2 - start**2 for start in mine))
    assert rows == list(range(count))
    assert sorted(starts) == list(range(0, count, block))
    if count >= 20 * size:
        assert max(area) < 1.2 * count**2 / size
