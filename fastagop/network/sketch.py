"""Random combinations of a model's outputs in place of all of them, and how far the result may be off."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastagop.kernels import checks
from fastagop.network.gradient_hooks import Taps
from fastagop.network.layer_sum import LayerSum
from fastagop.network.sites import Kind

_PARTS = 8  # The combinations are dealt out to so many parts, whose spread is the error: more would cost time.
_BITS = 64  # So many signs are read off one random number.


class SketchedSum(LayerSum):
    """Sum of g g^T over s random combinations of the outputs, s times too large, and the squared error to expect of it.

    The sums T_1, T_2, ... of parts of m_1, m_2, ... combinations of a batch are independent, each m_p times the same
    matrix on average with m_p times the same variance v. Of p parts, v is estimated by (1 / (p - 1)) times
    sum_p |T_p - m_p mean|^2 / m_p, Frobenius norms at the layer's input, and the sum of all s has the error s v;
    batches are independent and add up. Sums are kept where ``LayerSum`` takes them, until a weight changes: then they
    move to the input.
    """

    def __init__(self, keep_weight: bool = False, kind: Kind = "linear"):
        super().__init__(keep_weight, kind)
        self.square_error = 0.0
        self._whole: torch.Tensor | None = None
        self._batch: torch.Tensor | None = None
        self._squares = 0.0
        self._gram: tuple[torch.Tensor, torch.Tensor] | None = None

    def end_part(self, size: int) -> None:
        """A part of so many combinations of a batch is complete."""
        if not self._holds() and self._before is None:
            return
        part = self._at_input() if self.changed else self.total()
        self._total = self._before = None
        self._squares += self._norm2(part) / size
        self._batch = part if self._batch is None else self._batch.add_(part)

    def end_batch(self, s: int, parts: int) -> None:
        """All s combinations of a batch are complete."""
        if self._batch is not None:
            self.square_error += max(0.0, self._squares - self._norm2(self._batch) / s) * s / (parts - 1)
            self._whole = self._batch if self._whole is None else self._whole.add_(self._batch)
        self._batch, self._squares = None, 0.0

    def finish(self) -> None:
        """The whole sum takes the place of that of a part."""
        if self.changed:
            self._before = self._whole
        else:
            self._total = self._whole
        self._whole = self._gram = None

    def _holds(self) -> bool:
        return super()._holds() or self._batch is not None or self._whole is not None

    def _move(self) -> None:
        total, before = self.total(), self._before
        self._before = None
        for name in ("_batch", "_whole"):
            if getattr(self, name) is not None and not self.changed:
                self._total = getattr(self, name)
                setattr(self, name, self._at_input())
        self._total, self._before = total, before
        super()._move()

    def _norm2(self, total: torch.Tensor) -> float:
        """|W^T T W|^2 = tr(W W^T T W W^T T), or |T|^2 where the sum is one at the input."""
        if self.at_input or self.changed:
            return float(total.square().sum())
        assert self.weight is not None
        if self._gram is None or self._gram[0] is not self.weight:
            W = self.weight.double()
            self._gram = self.weight, W @ W.mT
        product = self._gram[1] @ total
        return float((product * product.mT).sum())


class Signs:
    """s vectors of K signs for each sample, fresh for every sample; the same for the same seed, whatever the batches.

    Raises:
        ValueError, TypeError: naming ``sketch`` or ``seed``.
    """

    def __init__(self, s: int, seed: int | torch.Generator):
        self.s = checks.integer("sketch", s, 2)
        if isinstance(seed, torch.Generator):
            if seed.device.type != "cpu":
                raise ValueError(f"seed must be a generator on the CPU, got one on {seed.device}")
            self._generator = seed
        else:
            self._generator = torch.Generator().manual_seed(checks.integer("seed", seed, 0, 2**63 - 1))

    def pull(self, taps: Taps, out: torch.Tensor, sums: Sequence[SketchedSum]) -> None:
        """One vector-Jacobian product for each combination of the outputs (m, K)."""
        numbers = torch.empty(*out.shape, -(-self.s // _BITS), dtype=torch.int64, device="cpu")
        numbers.random_(-(2**63), None, generator=self._generator)  # pyright: ignore[reportArgumentType, reportCallIssue]
        planes = numbers.to(out.device).view(torch.uint8)
        parts = min(self.s, _PARTS)
        ends = [(part + 1) * self.s // parts for part in range(parts)]
        plane, begun = planes[..., 0].contiguous(), 0
        for t in range(self.s):
            if t % 8 == 0:
                plane = planes[..., t // 8].contiguous()
            signs = ((plane >> (t % 8)) & 1).to(out.dtype).mul_(2).sub_(1)
            taps.pull_back(out, signs, keep=t + 1 < self.s)
            if t + 1 in ends:
                for layer_sum in sums:
                    layer_sum.end_part(t + 1 - begun)
                begun = t + 1
        for layer_sum in sums:
            layer_sum.end_batch(self.s, parts)
