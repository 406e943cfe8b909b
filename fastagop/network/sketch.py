"""Random combinations of a model's outputs in place of all of them, and how far the result may be off."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastagop.kernels import checks
from fastagop.network.gradient_hooks import Taps
from fastagop.network.layer_sum import LayerSum
from fastagop.network.sites import Kind

_BITS = 32  # So many signs are read off one random number.


class SketchedSum(LayerSum):
    """s times the mean of g g^T over s random combinations of the outputs, and the squared error to expect of it.

    The sums T_1, ..., T_s of a batch, one a combination, are independent and alike, so T_1 + ... + T_s has the error
    s / (s - 1) sum_t |T_t - mean|^2, Frobenius norms at the layer's input; batches are independent and add up.
    Sums are kept where ``LayerSum`` takes them, until a weight changes: then they move to the input.
    """

    def __init__(self, keep_weight: bool = False, kind: Kind = "linear"):
        super().__init__(keep_weight, kind)
        self.square_error = 0.0
        self._whole: torch.Tensor | None = None
        self._batch: torch.Tensor | None = None
        self._squares = 0.0

    def end_pull(self) -> None:
        """One combination of a batch is complete."""
        if not self._holds() and self._before is None:
            return
        part = self._at_input() if self.changed else self.total()
        self._total = self._before = None
        self._squares += self._norm2(part)
        self._batch = part if self._batch is None else self._batch.add_(part)

    def end_batch(self, s: int) -> None:
        """All s combinations of a batch are complete."""
        if self._batch is not None:
            self.square_error += max(0.0, self._squares - self._norm2(self._batch) / s) * s / (s - 1)
            self._whole = self._batch if self._whole is None else self._whole.add_(self._batch)
        self._batch, self._squares = None, 0.0

    def finish(self) -> None:
        """The whole sum takes the place of that of a combination."""
        if self.changed:
            self._before = self._whole
        else:
            self._total = self._whole
        self._whole = None

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
        """|W^T T W|^2, or |T|^2 where the sum is one at the input."""
        if self.at_input or self.changed:
            return float(total.square().sum())
        assert self.weight is not None
        W = self.weight.double()
        product = (W @ W.mT) @ total
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
            self._generator = torch.Generator().manual_seed(checks.integer("seed", seed, 0))

    def pull(self, taps: Taps, out: torch.Tensor, sums: Sequence[SketchedSum]) -> None:
        """One vector-Jacobian product for each combination of the outputs (m, K)."""
        words = -(-self.s // _BITS)
        numbers = torch.empty(*out.shape, words, dtype=torch.int64)
        numbers = numbers.random_(0, 2**_BITS, generator=self._generator).to(out.device)
        for t in range(self.s):
            bits = (numbers[..., t // _BITS] >> (t % _BITS)) & 1
            taps.pull_back(out, bits.to(out.dtype).mul_(2).sub_(1), keep=t + 1 < self.s)
            for layer_sum in sums:
                layer_sum.end_pull()
        for layer_sum in sums:
            layer_sum.end_batch(self.s)
