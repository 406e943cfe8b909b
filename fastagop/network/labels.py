"""Labels that the batches of X bring, beside those that a caller gives."""

from __future__ import annotations

from typing import Any

import torch

from fastagop.kernels import checks


def as_labels(brought: Any, name: str = "X: the labels of a batch") -> torch.Tensor:
    """Labels as a tensor; ``name`` says in errors which they are.

    Raises:
        TypeError: they are no numbers.
    """
    try:
        labels = checks.tensor(brought)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or numbers, got {brought!r:.80}") from error
    if labels.is_meta or labels.layout != torch.strided:
        kind = "a tensor on meta" if labels.is_meta else f"layout {labels.layout}; take .to_dense()"
        raise TypeError(f"{name} must hold numbers, got {kind}")
    return labels


class Labels:
    """The labels y of all samples: those given, or those that the batches bring.

    Where there are both, they have to name the same classes, as far as they can be compared: what batches bring may be
    one label a sample, of any dtype, or rows with one entry above all others (one-hot). The rest, such as texts or
    targets of a regression, is no rival of y.
    """

    def __init__(self, y: Any):
        self._y = y
        self._brought: list[torch.Tensor] = []
        self._alike, self._one_hot = True, False

    def add(self, brought: Any, n: int) -> None:
        """Take what a batch of n samples brings."""
        if self._y is None:
            labels = None if brought is None else as_labels(brought).detach().cpu()
            if labels is not None and labels.ndim == 0:
                raise ValueError(
                    f"X: the labels of a batch must be one for each of its {n} samples, got {brought!r:.80}"
                )
            self._brought += [] if labels is None else [labels]
        elif self._alike:
            numbers = self._numbers(brought, n)
            self._alike = numbers is not None
            self._brought += [] if numbers is None else [numbers.double()]

    def _numbers(self, brought: Any, n: int) -> torch.Tensor | None:
        """One number a sample; None where there is none."""
        try:
            labels = checks.tensor(brought).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            return None
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.ndim == 2 and len(labels) == n and _one_hot(labels):
            self._one_hot = True
            return labels.double().argmax(1)
        return labels if labels.shape == (n,) and not labels.is_complex() else None

    def settle(self) -> Any:
        """The one set of labels there is.

        Raises:
            ValueError: there is none, or two that differ, which means that X comes in another order than y.
        """
        if self._y is None:
            if not self._brought:
                raise ValueError("y must be given where the batches of X bring no labels")
            return torch.cat(self._brought)
        if self._alike and self._differs(torch.cat(self._brought)):
            raise ValueError(
                "y differs from the labels that the batches of X bring (is X shuffled?); pass one of the two"
            )
        return self._y

    def _differs(self, brought: torch.Tensor) -> bool:
        try:
            y = checks.tensor(self._y).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError):
            return False  # What y must be is said elsewhere, as where its shape is another.
        if y.shape != brought.shape:
            return False
        if not self._one_hot:
            return not torch.equal(y, brought)
        # Columns need not be in the order of the labels: there is one for each label, and one label for each.
        pairs = torch.stack([y, brought], 1).unique(dim=0)
        return not len(pairs) == len(y.unique()) == len(brought.unique())


def _one_hot(rows: torch.Tensor) -> bool:
    """Whether rows (n, K) have one value everywhere but in one place each, which has another, larger one."""
    values = rows.unique()
    return len(values) == 2 and bool(((rows == values[1]).sum(1) == 1).all())
