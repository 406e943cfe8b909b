"""What the estimators take, in words for type checkers.

Answers are arrays or tensors as X is, and DataFrames where ``set_output`` asks for them: they are ``Any``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from typing_extensions import Self
else:
    Self = Any

Rows: TypeAlias = "npt.ArrayLike | torch.Tensor"  # samples, labels, targets or weights; a DataFrame is an ArrayLike
Device: TypeAlias = "str | torch.device"
DType: TypeAlias = "str | torch.dtype | npt.DTypeLike"
Seed: TypeAlias = "int | np.random.RandomState | None"
ClassWeight: TypeAlias = "Mapping[Any, float] | str | None"
Scoring: TypeAlias = "str | Callable[..., float] | None"
Callbacks: TypeAlias = "Sequence[Callable[[Any], object]]"
