"""Where the tile of a program is: its place in the order of programs, and its rows in memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def along(rows, stride):
    """rows * stride in 64 bits: from strides of 2^24 on, even the offsets inside a tile of 128 rows leave 32."""
    return tl.cast(rows, tl.int64) * stride


@triton.jit
def origin(pointer, row, stride):
    """Pointer to the first number of a row."""
    return pointer + along(row, stride)


@triton.jit
def tile_of(program, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program's tile in a grid of tiles: GROUP rows of tiles at a time, down each column of them.

    Programs run about in their order. Those that run at once then share few rows and few columns of tiles, which stay
    in the cache; in the order of rows alone they would share a column only, and read all rows anew for each column.
    """
    group = program // (GROUP * columns)
    first, within = group * GROUP, program % (GROUP * columns)
    height = tl.minimum(rows - first, GROUP)
    return first + within % height, within // height
