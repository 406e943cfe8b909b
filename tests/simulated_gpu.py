"""A GPU that is not there: tensors of the CPU, of which some are called pinned, and streams that keep count.

What is pinned is the host's memory; all else is the device's, and an operation on it belongs to the current stream. Of
every access it is known what is sure to have come before, by CUDA's rules: a stream does one thing after the other, an
event is over when all is that its stream was told before, and the host goes on at once where a copy does not block.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastagop.solvers import staging


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
        return _is_number(tensor) or tensor.untyped_storage().data_ptr() in self.pinned

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
        if not tensor.numel() or _is_number(tensor):
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


def _is_number(tensor: torch.Tensor) -> bool:
    """Whether it is a vector made of one number, which is the host's."""
    return 0 in tensor.stride() and tensor.untyped_storage().nbytes() == tensor.element_size()
