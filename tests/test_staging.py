"""Blocks in pinned memory that a GPU computes with, by a GPU that is not there: order, memory, copies and numbers.

Tensors of the CPU pass for the device's, but for those that are called pinned, and streams keep count. Of every access
it is known what is sure to have come before, by CUDA's rules: a stream does one thing after the other, an event is over
when all is that its stream was told before, and the host goes on at once where a copy does not block.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastagop.solvers import staging
from fastagop.solvers.symmetric_blocks import SymmetricBlocks

SIZES = [(1, 1), (5, 2), (64, 64), (130, 64), (130, 32), (96, 16), (97, 16)]


# ---- the GPU


class Stream:
    """A stream; its clock says how much of what each stream does is over when its next operation begins."""

    def __init__(self, gpu: SimulatedGpu, name: str):
        self.gpu, self.name, self.clock = gpu, name, defaultdict(int)

    def wait_event(self, event: dict) -> None:
        for name, time in event.items():
            self.clock[name] = max(self.clock[name], time)

    def record_event(self) -> dict:
        return dict(self.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.gpu.host.wait_stream(self)


class SimulatedGpu(TorchDispatchMode):
    """Watches operations.

    Attributes:
        races: accesses to the same memory of which one writes, in no certain order.
        copies: of pinned memory: (stream, its clock, "in" or "out", whether the host goes on at once).
        indirect: shapes of copies for which PyTorch takes memory that is not pinned, or the side stream's.
        peak: most bytes of the device that live tensors took.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.host, self.compute, self.side = (Stream(self, name) for name in ("host", "compute", "side"))
        self.current, self.pinned, self.accesses = self.compute, {}, defaultdict(list)
        self.races, self.copies, self.indirect, self.live, self.peak = [], [], [], {}, 0
        plain = torch.empty

        def empty(*size, pin_memory=False, **options):
            found = plain(*size, **options)
            if pin_memory:
                self.pinned[found.untyped_storage().data_ptr()] = found
            return found

        @contextlib.contextmanager
        def on(stream):
            self.current, before = stream, self.current
            try:
                yield
            finally:
                self.current = before

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(staging, "_side", lambda device: self.side)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads, writes = self._touched(func, args, kwargs)
        on_host = bool(reads + writes) and all(self._of_host(tensor) for tensor in reads + writes)
        agent = self.host if on_host else self.current
        if agent is not self.host:
            agent.wait_stream(self.host)  # it is told so now
        agent.clock[agent.name] += 1
        if func is torch.ops.aten.copy_.default and self._of_host(args[0]) != self._of_host(args[1]):
            self._copied(*args[:2], agent, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        else:
            for tensors, write in ((reads, False), (writes, True)):
                for tensor in tensors:
                    self._access(tensor, agent, write)
        out = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            agent.synchronize()
        if not any(argument.alias_info for argument in func._schema.arguments):
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                self._made(tensor, agent)
        return out

    def _touched(self, func, args, kwargs) -> tuple[list, list]:
        """Tensors that an operation reads and writes; a view does neither."""
        reads, writes = [], []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if not isinstance(value, torch.Tensor) or (argument.alias_info and not argument.alias_info.is_write):
                continue
            (writes if argument.alias_info else reads).append(value)
        writes += [value for value in kwargs.values() if isinstance(value, torch.Tensor)]  # out=
        return reads, writes

    def _of_host(self, tensor: torch.Tensor) -> bool:
        return is_number(tensor) or tensor.untyped_storage().data_ptr() in self.pinned

    def _copied(self, to: torch.Tensor, of: torch.Tensor, agent: Stream, at_once: bool) -> None:
        """As in PyTorch's Copy.cu: what has gaps on the device is gathered there if the host goes on, else by the host.

        The host gathers pinned memory, and where it waits it converts to another dtype, too.
        """
        into = self._of_host(to)
        pinned, other = (to, of) if into else (of, to)
        self.copies.append((agent.name, dict(agent.clock), "out" if into else "in", at_once))
        by_host = not pinned.is_contiguous() or (to.dtype != of.dtype and (into or not at_once))
        if by_host or not (other.is_contiguous() or (at_once and agent is not self.side)):
            self.indirect.append(tuple(to.shape))
        self.host.clock["host"] += by_host
        self._access(other, agent, write=not into)
        if into and not at_once:
            agent.synchronize()
        self._access(pinned, self.host if by_host else agent, write=into)
        if not at_once:
            agent.synchronize()

    def _access(self, tensor: torch.Tensor, agent: Stream, write: bool) -> None:
        if not tensor.numel() or is_number(tensor):
            return
        size = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        first, key = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        last = first + size * tensor.element_size()
        for begin, end, name, time, wrote in self.accesses[key]:
            if (write or wrote) and begin < last and first < end and agent.clock[name] < time:
                self.races.append((name, agent.name, "written" if write else "read", tuple(tensor.shape)))
        self.accesses[key].append((first, last, agent.name, agent.clock[agent.name], write))

    def _made(self, tensor, agent: Stream) -> None:
        if not isinstance(tensor, torch.Tensor) or not tensor.numel() or self._of_host(tensor):
            return
        storage = tensor.untyped_storage()
        self.accesses.pop(storage.data_ptr(), None)
        self._access(tensor, agent, write=True)
        self.live[storage.data_ptr()] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))


def is_number(tensor: torch.Tensor) -> bool:
    """Whether it is a vector made of one number, which is the host's."""
    return 0 in tensor.stride() and tensor.untyped_storage().nbytes() == tensor.element_size()


# ---- blocks


def positive(n: int) -> torch.Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    A = A @ A.T / n
    return A.tril() + A.tril(-1).T


def filled(A: torch.Tensor, rows: int, place: str = "host", dtype: torch.dtype = torch.float64) -> SymmetricBlocks:
    blocks = SymmetricBlocks(len(A), dtype, rows=rows, place=place)
    return blocks.fill_(lambda out, start: out.copy_(A[start : start + len(out), : out.shape[1]]))


@pytest.fixture
def gpu(monkeypatch):
    with SimulatedGpu(monkeypatch) as gpu:
        yield gpu
    assert gpu.races == []


@pytest.mark.parametrize(("n", "rows"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_streamed_is_what_lies_on_the_device(n, rows, dtype, gpu):
    A, V = positive(n), torch.randn(n, 3, dtype=dtype)
    found = []
    for place in ("host", "device"):
        half = filled(A, rows, place, dtype).apply_(lambda part: part.mul_(0.5), 0.5)
        parts = [half.full(), half.matmul(V)]
        parts += [tile.clone() for _, tile in half.row_tiles(max(1, rows // 3), torch.float32)]
        narrow = half.to(torch.float32)
        for factor in (narrow, half):
            assert factor.cholesky_(2.0) == 0
            parts += [factor.full().tril(), factor.solve(V.to(factor.dtype))]
        found.append(parts)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * torch.finfo(one.dtype).eps)


@pytest.mark.parametrize(("n", "rows"), [(130, 32), (96, 16)])
def test_the_host_waits_for_no_copy(n, rows, gpu):
    """Nothing goes through pageable memory but a diagonal, and passes are enqueued without a wait."""
    half, V = filled(positive(n), rows), torch.randn(n, 3, dtype=torch.float64)
    assert half.cholesky_(2.0) == 0
    assert all(len(shape) == 1 for shape in gpu.indirect)
    over = gpu.host.clock["compute"]
    half.matmul(V)
    half.solve(V)
    half.apply_(torch.exp_, 0.0)
    assert sum(len(tile) for _, tile in half.row_tiles(10, torch.float32)) == n
    assert gpu.host.clock["compute"] == over


@pytest.mark.parametrize("backwards", [False, True])
def test_the_next_block_comes_while_this_one_is_worked_on(backwards, gpu):
    half, sent, ended = filled(positive(96), 16), [], []
    for _, block in half._streamed(backwards=backwards):
        sent.append(gpu.copies[-1])  # the last tile of this block
        block.sum()
        ended.append(gpu.compute.clock["compute"])
    assert {(stream, way, at_once) for stream, _, way, at_once in sent} == {("side", "in", True)}
    known = [clock["compute"] for _, clock, *_ in sent]
    assert all(work <= when < later for work, when, later in zip(ended, known[2:], ended[1:], strict=False))


def test_a_pass_that_is_broken_off_ends_before_its_memory_is_free(gpu, monkeypatch):
    """Else what is on its way were written over the numbers that take its place."""
    half, read = filled(positive(96), 16), SymmetricBlocks._read

    def interrupted(self, i, *out):
        read(self, i, *out)
        if i == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(SymmetricBlocks, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        half.matmul(torch.ones(96, 1, dtype=torch.float64))
    assert gpu.compute.clock["side"] == gpu.side.clock["side"] > 0


@pytest.mark.parametrize(("n", "rows"), [(320, 32), (330, 32)])
def test_memory_of_the_device(n, rows, gpu, monkeypatch):
    """A pass holds two block rows and a tile; a factorisation a row and a copy of it, and a few tiles, besides."""
    half, V, row, tile = filled(positive(n), rows), torch.ones(n, 1, dtype=torch.float64), 8 * n * rows, 8 * rows**2
    before, gpu.peak = sum(gpu.live.values()), 0
    half.matmul(V)
    assert 2 * row + tile <= gpu.peak - before <= 2 * row + tile + 10 * 8 * n
    gpu.peak, made, staging = 0, [], SymmetricBlocks._staging
    monkeypatch.setattr(SymmetricBlocks, "_staging", lambda self: made.append(1) or staging(self))
    assert half.cholesky_(float(n)) == 0
    assert len(made) == 1
    assert 3 * row <= gpu.peak - before <= 4 * row + 4 * tile


def test_blocks_in_a_file_come_through_the_buffers_too(gpu, tmp_path, monkeypatch):
    A, V = positive(97), torch.randn(97, 3, dtype=torch.float64)
    monkeypatch.setattr(SymmetricBlocks, "_elsewhere", True)  # as where a GPU computes
    half = filled(A, 16, str(tmp_path))
    assert torch.equal(half.full(), A)
    torch.testing.assert_close(half.matmul(V), A @ V, rtol=1e-13, atol=1e-13)
    narrow = half.to(torch.float32)
    assert half.cholesky_(2.0) == narrow.cholesky_(2.0) == 0
    exact = torch.linalg.solve(A - torch.diag(A.diagonal()) + 2.0 * torch.eye(97), V)
    torch.testing.assert_close(half.solve(V), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(narrow.solve(V.float()).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(dtype):
    """Many passes, whose work takes longer than the copies in some and less in others."""
    n, rows = 3001, 256
    A, V = positive(n).to("cuda", dtype), torch.randn(n, 40, dtype=dtype, device="cuda")
    host, device = (SymmetricBlocks(n, dtype, "cuda", rows, place) for place in ("host", "device"))
    for blocks in (host, device):
        blocks.fill_(lambda out, start: out.copy_(A[start : start + len(out), : out.shape[1]]))
    assert torch.equal(host.full(), device.full())
    assert host.cholesky_(2.0) == device.cholesky_(2.0) == 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for p in (1, 40, 1, 40):
        for found, want in ((host.matmul(V[:, :p]), device.matmul(V[:, :p])), (host.solve(V), device.solve(V))):
            torch.testing.assert_close(found, want, rtol=0, atol=100 * torch.finfo(dtype).eps * float(want.abs().max()))
    assert torch.cuda.max_memory_allocated() - before <= (3 * rows + 10 * V.shape[1]) * n * dtype.itemsize
