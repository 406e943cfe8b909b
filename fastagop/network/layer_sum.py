"""The sum of outer products of gradients at one layer, taken where it is cheapest."""

from __future__ import annotations

import math

import torch

from fastagop.kernels.gemm import matmul_nt, symmetrise_
from fastagop.kernels.precision import matmul_precision
from fastagop.network.sites import Kind

_BLOCK = 256  # A symmetric sum is computed in blocks of so many rows, each only up to the diagonal.
_GATHERED = 512  # One product takes so many gradients, since products of fewer run slower.
_ITEMS = 2**18  # Gradients that come in larger numbers are taken in parts of so many items.


class LayerSum:
    """Sum of g g^T over samples and outputs, g being the gradients at one layer of weight W (d_out, d_in).

    The gradient at the layer's input is W^T times that at its output, so the sum may be taken on either side; it
    is taken on the narrower one. Gradients are gathered; products of what was gathered run in the working precision,
    scaled by a power of two so that no square leaves its range, and their sum in float64.

    W is what the layer computes with: where hooks change it, the sum so far moves to the input, and a new one begins.
    A grouped convolution has W (groups, d_out, d_in) and a sum for each group. The gradients at a convolution's patches
    would have to be formed, so its sum is taken at the output; that of an embedding is taken at its vectors.

    Attributes:
        weight: W of the calls whose gradients came last.
        changed: whether there were others.
    """

    def __init__(self, keep_weight: bool = False, kind: Kind = "linear"):
        self.weight: torch.Tensor | None = None
        self.at_input = self.changed = False
        self._keeps, self._kind = keep_weight, kind
        self._rows: torch.Tensor | None = None  # It holds gradients, (_GATHERED, d).
        self._gathered = 0
        self._total: torch.Tensor | None = None
        self._before: torch.Tensor | None = None  # It is the sum of earlier weights, at the input.

    def taken(self, weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The weight as it is now, unless it is one seen before, and whether sums are taken at the input."""
        weight = weight.detach()
        if self.weight is None:
            narrower = weight.shape[-1] < weight.shape[-2]
            self.at_input = narrower if self._kind == "linear" else self._kind == "embedding"
            self._keeps |= not self.at_input
            self.weight = weight.clone() if self._keeps else weight  # A hook may change the weight in place.
        elif self._keeps and not torch.equal(weight, self.weight):
            return weight.clone(), self.at_input
        return self.weight if self._keeps else weight, self.at_input

    def add(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the outer products of rows (m, d); the strict upper triangle is left undone."""
        if self._keeps and weight is not self.weight:
            if self._holds():
                self._move()
            self.weight = weight
        if self._rows is None:
            dtype = torch.promote_types(rows.dtype, torch.float32)
            self._rows = rows.new_empty(_GATHERED, rows.shape[1], dtype=dtype)
        if self._gathered == 0 and len(rows) >= _GATHERED:  # They need no gathering.
            for now in rows.split(max(_GATHERED, _ITEMS // max(1, rows.shape[1]))):
                self._add_columns(self._rows.new_empty(now.shape[1], len(now)).copy_(now.T))
            return
        while len(rows):
            count = _GATHERED - self._gathered
            now, rows = rows[:count], rows[count:]
            self._rows[self._gathered : self._gathered + len(now)] = now
            self._gathered += len(now)
            if self._gathered == _GATHERED:
                self._sum_up()

    def _holds(self) -> bool:
        """Whether anything was summed for the present weight."""
        return self._gathered > 0 or self._total is not None

    def _sum_up(self) -> None:
        if self._rows is None or self._gathered == 0:  # The outputs may not depend on this layer.
            return
        columns, self._gathered = self._rows[: self._gathered].T.contiguous(), 0
        self._add_columns(columns)

    def _add_columns(self, columns: torch.Tensor) -> None:
        """Add the outer products of columns (d, m), which are overwritten."""
        factor = _shrink_(columns)
        if (groups := self._groups()) is not None:
            columns = columns.view(groups, -1, columns.shape[1])
            part = torch.bmm(columns, columns.mT)
            part = part.double() if factor is None else part.double().mul_(factor)
            self._total = part if self._total is None else self._total.add_(part)
            return
        if self._total is None:
            self._total = columns.new_zeros(len(columns), len(columns), dtype=torch.float64)
        for start in range(0, len(columns), _BLOCK):
            block = slice(start, start + _BLOCK)
            part = matmul_nt(columns[block], columns[: block.stop])
            self._total[block, : block.stop] += part if factor is None else part.double().mul_(factor)

    def _move(self) -> None:
        """Begin a new sum, for another weight."""
        self._before, self.changed = self._at_input(), True
        self._total = None

    def _groups(self) -> int | None:
        """How many sums there are; None for the one of a layer without groups."""
        return None if self.weight is None or self.weight.ndim == 2 else len(self.weight)

    def total(self) -> torch.Tensor:
        """The float64 sum for the last weight on its side: (d_in, d_in) where ``at_input``, else (d_out, d_out)."""
        assert self.weight is not None  # The layer was called.
        self._sum_up()
        self._rows = None
        if self._total is None:
            d = self.weight.shape[-1 if self.at_input else -2]
            return self.weight.new_zeros(*self.weight.shape[:-2], d, d, dtype=torch.float64)
        return self._total.tril_().add_(self._total.tril(-1).mT)

    def _at_input(self) -> torch.Tensor:
        """The float64 sum at the layer's input, (d_in, d_in)."""
        total, W = self.total(), self.weight
        assert W is not None
        if not self.at_input:
            total = _between(W, total, torch.float64, 1.0)
        return total if self._before is None else total.add_(self._before)

    def agop(self, divisor: int) -> torch.Tensor:
        """The sum at the layer's input over divisor, (d_in, d_in) of the weight's dtype, float32 for narrower ones."""
        assert self.weight is not None
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with matmul_precision("highest", self.weight.device):
            if self.at_input or self._before is not None:
                return self._at_input().div_(divisor).to(dtype)
            return _between(self.weight, self.total(), dtype, divisor)


def _between(W: torch.Tensor, total: torch.Tensor, dtype: torch.dtype, divisor: float) -> torch.Tensor:
    """W^T total W / divisor for a symmetric float64 total, (d_in, d_in) of the dtype, or so for each group.

    The products run in the weight's dtype, float32 at least, on and below the diagonal.
    """
    if W.ndim > 2:
        found = W.mT.double() @ total @ W.double()
        return found.add_(found.mT.clone()).mul_(0.5 / divisor).to(dtype)
    working = torch.promote_types(W.dtype, torch.float32)
    columns, scale = _scaled(W.T.to(working))
    inner, factor = _scaled(total)
    half, factor = matmul_nt(columns, inner.to(working)), factor * scale * scale / divisor
    narrow = dtype == working and 1e-30 < factor < 1e30  # No product with the factor leaves float32.
    found = columns.new_empty(len(columns), len(columns), dtype=dtype)
    for start in range(0, len(columns), _BLOCK):
        block = slice(start, start + _BLOCK)
        part = matmul_nt(half[block], columns[: block.stop])
        part = (part if narrow else part.double()).mul_(factor)
        symmetrise_(part[:, start:])
        found[block, : block.stop] = part
        found[:start, block] = part[:, :start].T
    return found


def _shrink_(columns: torch.Tensor) -> torch.Tensor | None:
    """Divide by a power of two, where squares might leave the dtype, and return its square, a float64 scalar.

    On a GPU nothing is asked of the numbers: the host would wait for them.
    """
    if not columns.is_cuda and all(end == 0 or 1e-12 < abs(end) < 1e12 for end in map(float, columns.aminmax())):
        return None
    exponent = torch.frexp(columns.abs().amax())[1].double()
    half = torch.floor(exponent / 2)  # The division takes two steps, since the power itself may leave the dtype.
    columns.mul_(torch.exp2(-half)).mul_(torch.exp2(half - exponent))
    return torch.exp2(2 * exponent)


def _scaled(M: torch.Tensor) -> tuple[torch.Tensor, float]:
    """M over a power of two, largest entry about 1, and that power."""
    top = float(M.abs().max()) if M.numel() else 0.0
    scale = 2.0 ** math.frexp(top)[1] if math.isfinite(top) else 1.0
    return (M.double() / scale).to(M.dtype).contiguous(), scale
