"""The processes that share a call: what they must agree on, what they exchange, and what is said when one is lost.

Everything travels by collectives of ``torch.distributed``; nothing here opens a connection.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastagop.kernels import checks
from fastagop.kernels.plan import budget, longest_first

# What travels while the next rows are computed: bytes worth sending, in as many rows as a matrix product needs.
_PIECE, _PIECE_ROWS = 2**22, 256
_HASHED = 2**22  # bytes hashed at once
_COMPARED = 6  # tensors that one call compares, at most
_ASK, _DONE = 1, 0
MEETING = (-11, -12)  # numbers of requests within which ranks wait for each other


class RankLost(RuntimeError):
    """Another process of the group died, or did not answer within the group's timeout."""


class RankFailed(RuntimeError):
    """Something failed on another process of the group, whose own error says what."""


class Communicator:
    """This process among those of a group, for one operation.

    Args:
        group: a ``torch.distributed`` process group, or None for all processes.
        op: the operation, for messages.
        device: of the tensors that will be passed.
    """

    def __init__(self, group, op: str, device: torch.device):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"distributed.{op} needs a process group: start the script with torchrun, and call "
                "torch.distributed.init_process_group() first"
            )
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if group == dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError(f"distributed.{op} was called by a process that is not in the group")
            raise TypeError(f"the group must be a torch.distributed process group or None, got {group!r}")
        self.group, self.op, self.device = group, op, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        backend = dist.get_backend(group)
        if backend == "nccl" and device.type != "cuda":
            raise ValueError(
                f"the group's backend nccl moves CUDA tensors and X is on {device}: move the tensors with .cuda(), "
                "or start the group with backend='gloo'"
            )
        self.wire = torch.device("cpu") if backend in ("gloo", "mpi") else device

    @contextlib.contextmanager
    def collective(self):
        """Say what it means when a collective fails."""
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error)).split(". ")[0]  # without the place in gloo's source
            raise RankLost(
                f"distributed.{self.op}: rank {self.rank} of {self.size} lost another rank ({reason}). That process "
                "died or did not answer within the group's timeout; its own output says why. Start all ranks again: a "
                "Deep RFM with checkpoint_dir goes on after its last layer"
            ) from error

    def agree(self, prepare: Callable, call: str, **tensors: torch.Tensor | None) -> tuple[Any, int]:
        """(prepare(), bytes that every rank may take), once all ranks are known to want the same thing.

        An error of prepare is raised where it happens, and named everywhere else. Inputs are compared by hashes.
        """
        result, error = None, None
        try:
            result = prepare()
        except Exception as raised:  # raised below, after the other ranks were told
            error = raised
        hashes = [0 if error else _hash(value) for value in tensors.values()]
        numbers = [
            int(error is not None),
            _hash_text(f"{self.op} {call}"),
            *hashes,
            *[0] * (_COMPARED - len(hashes)),
        ]
        everyone = self._gather([*numbers, 0 if error else self._room()])
        if error is not None:
            raise error
        failed = [rank for rank, row in enumerate(everyone) if row[0]]
        if failed:
            raise RuntimeError(f"distributed.{self.op}: rank {failed[0]} refused its arguments; its error says why")
        if any(row[:-1] != everyone[0][:-1] for row in everyone):
            self._disagree(call, tensors, everyone)
        return result, min(row[-1] for row in everyone)

    def together(self, work: Callable[[], Any], what: str) -> Any:
        """work(), the same step on every rank; where it fails on one of them, no rank goes on without it.

        Raises:
            BaseException: what work raised here. RankFailed: it failed on another rank, which is named.
        """
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # raised below, after the other ranks were told
            error = raised
        failed = [rank for rank, number in enumerate(self.everyone(int(error is not None))) if number]
        if error is not None:
            raise error
        if failed:
            raise RankFailed(f"distributed.{self.op}: {what} failed on rank {failed[0]}; its error says why")
        return result

    def shared(self, work: Callable[[Callable], Any], what: str) -> Any:
        """work(total), which comes to each ``total`` on every rank; where it fails before one, as ``together``."""

        def total(value: torch.Tensor) -> torch.Tensor:
            self.together(lambda: None, what)
            return self.total(value)

        try:
            return work(total)
        except (RankLost, RankFailed):
            raise
        except Exception as error:
            return self.together(functools.partial(_raised, error), what)

    def _disagree(self, call: str, tensors: dict, everyone: list[list[int]]) -> None:
        """Name what differs; every rank sees the same hashes, so every rank comes here."""
        other = next(rank for rank, row in enumerate(everyone) if row[:-1] != everyone[0][:-1])
        kinds = {
            name: None if value is None else f"{value.dtype} {tuple(value.shape)}" for name, value in tensors.items()
        }
        calls = self._objects((f"{self.op}({call})", kinds))
        first, second = calls[0], calls[other]
        if first[0] != second[0]:
            raise ValueError(f"ranks must make the same call: rank 0 calls {first[0]}, rank {other} {second[0]}")
        name = next(n for i, n in enumerate(tensors) if everyone[0][2 + i] != everyone[other][2 + i])
        pair = f"{first[1][name]} and {second[1][name]}"
        raise ValueError(
            f"distributed.{self.op}: {name} must be the same on every rank, but rank 0 and rank {other} pass "
            f"{'other values' if first[1][name] == second[1][name] else pair}; torch.distributed.broadcast it first"
        )

    def _room(self) -> int:
        """Bytes this rank may take; processes of one machine share its memory."""
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.device.type == "cpu" else 1
        return budget(None, self.device) // sharing

    def rows(self, count: int) -> tuple[int, int]:
        """First and last row (exclusive) of this rank's share of ``count`` rows."""
        share = -(-count // self.size)
        return min(count, self.rank * share), min(count, (self.rank + 1) * share)

    def blocks(self, count: int, max_rows: int) -> tuple[int, list[int]]:
        """(rows of a block, first rows of this rank's blocks) of a triangle, so that every rank has as much area.

        Blocks are dealt out forth and back, 0 1 2 2 1 0 0 1 2 and so on, the longest first: what is left over at the
        end is short.
        """
        rows = max(1, min(max_rows, -(-count // (4 * self.size))))
        turn = 2 * self.size
        numbers = (self.rank, turn - 1 - self.rank)
        return rows, [start for i, start in enumerate(longest_first(count, rows)) if i % turn in numbers]

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of value over ranks, the same bits everywhere."""
        wire = self._copy(value)
        with self.collective():
            dist.all_reduce(wire, group=self.group)
        return wire.to(value.device)

    def concatenate(self, compute: Callable, count: int, tail: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """All rows (count, *tail); compute(first, last) makes this rank's, and they travel while the next are made."""
        share = -(-count // self.size)
        first, last = self.rows(count)
        row = max(1, torch.Size(tail).numel() * like.element_size())
        step = max(1, min(share, max(_PIECE_ROWS, _PIECE // row)))
        everything = torch.empty(self.size, share, *tail, dtype=like.dtype, device=self.wire)
        pending, failed = [], None
        for offset in range(0, share, step):
            width = min(step, share - offset)
            start, stop = min(last, first + offset), min(last, first + offset + width)
            places = [part[offset : offset + width] for part in everything]
            piece = places[self.rank]
            if stop > start and failed is None:
                try:
                    piece[: stop - start] = compute(start, stop)
                except Exception as error:  # raised when the other ranks know
                    failed = error
            with self.collective():
                pending.append(dist.all_gather(places, piece, group=self.group, async_op=True))
        with self.collective():
            for work in pending:
                work.wait()
        self.together(functools.partial(_raised, failed), "its share")
        return everything.flatten(0, 1)[:count].to(like.device)

    def run_on_root(self, job: Callable, handle: Callable | None = None) -> Any:
        """What job(request) returns on the first rank, on every rank; its error too.

        Other ranks wait. request(V, number) makes every rank run handle(V, number) and gives the sum of the answers.
        """
        failed = None
        if self.rank == 0:
            answer = self._run_as_root(job, handle)
        else:
            while (order := self._order(None))[0] == _ASK:
                V = torch.empty(order[1], order[2], dtype=torch.float64, device=self.wire)
                failed = self._handle(V, order[3], handle)[1] or failed
            answer = None
        result, error = self._broadcast(answer)
        if error is not None:
            raise failed or error
        return result

    def _run_as_root(self, job: Callable, handle: Callable | None):
        def request(V: torch.Tensor, number: int) -> torch.Tensor:
            self._order([_ASK, *V.shape, number])
            answer, failed = self._handle(V.to(self.wire).contiguous(), number, handle)
            if failed is not None:
                raise failed
            return answer

        try:
            result = job(request)
        except RankLost:  # nobody is left to be told
            raise
        except Exception as raised:
            self._order([_DONE, 0, 0, 0])  # in here, so that both errors are shown where other ranks are lost, too
            return None, _portable(raised)
        self._order([_DONE, 0, 0, 0])
        return result, None

    def _handle(self, V: torch.Tensor, number: int, handle) -> tuple[torch.Tensor, Exception | None]:
        """One product: V from the first rank to all, the parts of the answer, of V's shape, back to it.

        Returns:
            (the sum of the parts on the first rank, what failed here or, on the first rank, anywhere). A rank that
            fails sends its number with a part of zeros, so that the first one can tell the others.

        Raises:
            Exception: of a request within which ranks wait for each other, numbered ``MEETING``.
        """
        with self.collective():
            dist.broadcast(V, self._first, group=self.group)
        sent, failed = V.new_zeros(V.numel() + self.size), None
        try:
            sent[: V.numel()] = handle(V.to(self.device), number).to(self.wire).flatten()
        except RankLost:
            raise
        except Exception as raised:
            if number in MEETING:
                raise
            sent[: V.numel()], failed = 0.0, raised
            sent[V.numel() + self.rank] = 1.0
        with self.collective():
            dist.reduce(sent, self._first, group=self.group)
        if self.rank == 0 and failed is None and bool((lost := sent[V.numel() :] > 0).any()):
            failed = RuntimeError(f"distributed.{self.op}: rank {int(lost.nonzero()[0])} failed; its error says why")
        return sent[: V.numel()].view_as(V).to(self.device), failed

    def _order(self, order: list[int] | None) -> list[int]:
        """What the first rank wants next."""
        wire = torch.tensor(order or [0] * 4, dtype=torch.int64, device=self.wire)
        with self.collective():
            dist.broadcast(wire, self._first, group=self.group)
        return wire.tolist()

    def _copy(self, value: torch.Tensor) -> torch.Tensor:
        """A copy that can travel: what is sent is memory, which every rank must lay out alike."""
        return value.to(self.wire, copy=True, memory_format=torch.contiguous_format)

    def broadcast(self, value: torch.Tensor, rank: int = 0) -> torch.Tensor:
        """A rank's tensor, the first one's by default, on every rank."""
        wire = self._copy(value)
        with self.collective():
            dist.broadcast(wire, self._global(rank), group=self.group)
        return wire.to(value.device)

    def send(self, wire: torch.Tensor, rank: int):
        """The work of sending a rank's tensor, on the device that collectives move, to all of them; then ``wait``."""
        with self.collective():
            return dist.broadcast(wire, self._global(rank), group=self.group, async_op=True)

    def wait(self, work) -> None:
        """Until what was sent is there."""
        with self.collective():
            work.wait()

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @property
    def _first(self) -> int:
        return self._global(0)

    def everyone(self, number: int) -> list[int]:
        """Every rank's number."""
        return [row[0] for row in self._gather([number])]

    def _gather(self, numbers: list[int]) -> list[list[int]]:
        wire = torch.tensor(numbers, dtype=torch.int64, device=self.wire)
        everyone = [torch.empty_like(wire) for _ in range(self.size)]
        with self.collective():
            dist.all_gather(everyone, wire, group=self.group)
        return [row.tolist() for row in everyone]

    def _objects(self, value) -> list:
        everyone = [None] * self.size
        with self.collective():
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def _broadcast(self, value) -> Any:
        box = [value]
        with self.collective():
            dist.broadcast_object_list(box, self._first, group=self.group)
        return box[0]


def _raised(error: Exception | None) -> None:
    """Raise an error that there is."""
    if error is not None:
        raise error


def other(X, Z):
    """Z where it is not X: ranks must also agree on that, as it decides who does what."""
    return None if isinstance(X, torch.Tensor) and isinstance(Z, torch.Tensor) and checks.same(X, Z) else Z


def _portable(error: Exception) -> Exception:
    """The error as it can be sent: some cannot be pickled, or not be made again, and arrive as their text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _hash(value: torch.Tensor | None) -> int:
    """64 bits of the SHA-256 of shape, dtype and bytes, row by row: storage and device play no part.

    Every byte counts at its place, so rows or labels in another order differ, and so do 0.0 and -0.0.
    """
    if value is None:
        return 0
    digest = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
    row = max(1, value[:1].numel() * value.element_size())
    for block in value.detach().split(max(1, _HASHED // row)):
        digest.update(block.contiguous().cpu().resolve_neg().numpy().data)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
