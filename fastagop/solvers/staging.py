"""Blocks on their way to a CUDA device that computes: the next one comes while this one is worked on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

Shape = tuple[int, int]
# (which block, where its first columns go, room for a tile of it): enqueues the copy, or makes it.
Read = Callable[[int, torch.Tensor, torch.Tensor], None]


class Staging:
    """Two buffers on a device and room for a tile: all that is held there of blocks, however far ahead the host is.

    It is memory of the stream that works, since another stream's would be of no use to it. A buffer is written to when
    the work on what it held has ended, and given up when what is on its way has come.

    Args:
        block: items of a buffer, the largest block's.
        tile: room for a tile, of the blocks' dtype and on the device; of no items where blocks do not come by tiles.
    """

    def __init__(self, block: int, tile: torch.Tensor) -> None:
        self.buffers, self.tile = (tile.new_empty(block), tile.new_empty(block)), tile

    def through(self, coming: Sequence[tuple[int, Shape]], read: Read) -> Iterator[tuple[int, torch.Tensor]]:
        """(which, block) of blocks of given shapes, each good until the next one is asked for.

        The next block is fetched when the work on this one has been enqueued: from a file the host copies it.
        """
        device = self.tile.device
        stream, side = torch.cuda.current_stream(device), _side(device)
        free = [stream.record_event()] * 2  # blocks have been written by now, too

        def fetch(place: int) -> tuple[torch.Tensor, torch.Event]:
            which, (rows, columns) = coming[place]
            block = self.buffers[place % 2][: rows * columns].view(rows, columns)
            with torch.cuda.stream(side):
                side.wait_event(free[place % 2])
                read(which, block, self.tile)
                return block, side.record_event()

        try:
            ahead = fetch(0) if coming else None
            for place, (which, _) in enumerate(coming):
                assert ahead is not None
                block, came = ahead
                stream.wait_event(came)
                yield which, block
                free[place % 2] = stream.record_event()
                ahead = fetch(place + 1) if place + 1 < len(coming) else None
        finally:  # a pass may be given up while a block is on its way
            stream.wait_stream(side)


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream on which blocks come to a device."""
    return torch.cuda.Stream(device)
