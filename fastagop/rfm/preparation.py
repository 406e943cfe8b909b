"""How features become what the kernel sees: offsets subtracted and, where asked for, each divided by its spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastagop.estimators import inputs
from fastagop.kernels import checks
from fastagop.kernels.errors import warn
from fastagop.kernels.profile import Kernel
from fastagop.solvers.bandwidth import faint

_SORTED = 2**22  # Columns are sorted together up to this many items.
_CONSTANT = 16.0  # roundings of a mean that the spread of a constant feature may come to


def check_scale(value) -> None:
    """Refuse a ``scale`` that is neither None nor "standard"."""
    if value is not None and not (isinstance(value, str) and value == "standard"):
        raise ValueError(f"scale must be None or 'standard', got {value!r}")


def warn_of_faint_kernel(model, first: torch.Tensor, weights: torch.Tensor | None, reported: set[str]) -> None:
    """Say where the outputs of a machine for new rows are all but constant, and which parameters change that.

    Args:
        model: fitted.
        first: points as the kernel has them before there is a metric.
        weights: of the rows, or None.
        reported: what the fit has warned of.
    """
    if "bandwidth" in reported:
        return
    ridge = float(model.ridge) if weights is None else 0.0  # The ridge of a row is over its weight.
    if not (finding := faint(model.kernel_, model._centers, ridge)):
        return
    earlier = faint(model.kernel_, first, ridge)  # Where the first metric shows it already, distances in it say more.
    where = "" if earlier or model._metric.root is None else " in the learned metric"
    more = "" if model.scale else ", or scale='standard'"
    warn(
        f"{type(model).__name__}: {earlier or finding}{where}, and outputs for new rows are all but constant: take a "
        f"bandwidth of that size, such as kernel={type(model.kernel_).__name__}('median') has{more}"
    )


@dataclass(frozen=True)
class Preparation:
    """(x - offset) / unit for every row x.

    Attributes:
        offset: of each feature (d,), float64.
        unit: of each feature (d,), float64; None where all are 1.
    """

    offset: torch.Tensor
    unit: torch.Tensor | None = None

    @classmethod
    def of(cls, X: torch.Tensor, weights: torch.Tensor | None, scale: str | None, kernel: Kernel) -> Preparation:
        """What training rows X (n, d) ask for: "standard" is their (weighted) mean and standard deviation.

        Without a scale only offsets are subtracted that lie far from zero in every row, and only where the kernel
        sees differences.

        Raises:
            ValueError: differences leave float64.
        """
        if scale is not None:
            offset, unit = _moments(X.double(), weights)
            if not (checks.finite(offset) and checks.finite(unit)):
                raise ValueError("X is so large that differences of its rows leave float64; divide X by a constant")
            return cls(offset, unit)
        return cls(offsets(X) if kernel.shift_invariant else X.new_zeros(X.shape[1], dtype=torch.float64))

    def near(self, X: torch.Tensor) -> torch.Tensor:
        """Rows X (m, d) as the kernel sees them; float64 where something is subtracted."""
        if self.unit is None and not bool(self.offset.any()):
            return X
        X = X.double() - self.offset
        return X if self.unit is None else X.div_(self.unit)

    def original(self, X: torch.Tensor) -> torch.Tensor:
        """Rows that ``near`` made, in the units of the data, float64."""
        return (X.double() if self.unit is None else X.double() * self.unit) + self.offset

    def reported(self, M: torch.Tensor) -> torch.Tensor:
        """A metric (d, d), or its diagonal (d,), of the features as the kernel sees them, for those of the data.

        In float64 where units were divided by: squares of units leave float32 early.

        Raises:
            ValueError: float64 does not hold it.
        """
        if self.unit is None:
            return M
        if M.ndim == 1:
            return self._held("M_", M, M.double() / self.unit / self.unit, torch.float64)
        upper = (M.double() / self.unit / self.unit[:, None]).triu()
        return self._held("M_", M, upper + upper.triu(1).T, torch.float64)  # symmetric to the bit

    def slopes(self, g: torch.Tensor, X) -> torch.Tensor:
        """Gradients (m, K, d) at the features as the kernel sees them, for those of the data, X of some kind.

        Raises:
            ValueError: X's dtype does not hold them.
        """
        known = getattr(X, "dtype", None)
        tensor = isinstance(X, torch.Tensor) and X.is_floating_point()
        dtype = X.dtype if tensor else torch.float32 if known == np.float32 else torch.float64
        return self._held("gradients", g, g if self.unit is None else g / self.unit, dtype)

    def _held(self, name: str, given: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The value in the units of the data of what is given, where a dtype holds it, if only in part."""
        size = checks.largest(value)
        lost = size == 0.0 and self.unit is not None and checks.largest(given) > 0.0
        if lost or not size <= torch.finfo(dtype).max:
            units = self.unit
            spread = "" if units is None else f", which vary by {float(units.min()):.1e} to {float(units.max()):.1e}"
            raise ValueError(
                f"X: {name} would leave {dtype} in the units of its features{spread}; fit X times a constant"
            )
        return value


def offsets(X: torch.Tensor) -> torch.Tensor:
    """The offset of each column without which a narrower dtype keeps its differences: (d,), float64, mostly zero.

    It is the median of a column's distinct values where that exceeds their spread (between quartiles) many times, as
    in time stamps and coordinates: of values within a factor of two of it the subtraction is exact. Copies of rows,
    their order and a few fill values do not change it. In tight clusters elsewhere it costs the digits that a product
    with M^(1/2) would cost as well.
    """
    out = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    step = max(1, _SORTED // len(X))
    for start in range(0, X.shape[1], step):
        values = _sorted_rows(X[:, start : start + step].T.contiguous())
        first = torch.ones_like(values, dtype=torch.bool)
        first[:, 1:] = values[:, 1:] != values[:, :-1]
        count = first.cumsum(1)  # It counts the distinct values up to each place.
        last = count[:, -1:] - 1
        places = torch.searchsorted(count, torch.cat([last // 4, last // 2, 3 * last // 4], 1) + 1)
        low, middle, high = values.gather(1, places).double().unbind(1)
        out[start : start + step] = torch.where(middle.abs() > inputs.FAR * (high - low), middle, 0.0)
    return out


def _sorted_rows(values: torch.Tensor) -> torch.Tensor:
    """Every row in ascending order; on the CPU by NumPy, which takes a tenth of torch's time."""
    return values.sort(1).values if values.is_cuda else torch.from_numpy(np.sort(values.numpy(), axis=1))


def _moments(X: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) of each column; a constant one has its own size in place of it, or 1 where it is 0.

    So differences that are but rounding stay small. Deviations are squared in units of the largest one, so that no
    column is too large or too small for it.
    """
    share = X.new_full((len(X),), 1.0 / len(X)) if weights is None else weights.double() / weights.double().sum()
    base = X[0].clone()
    mean = base + share @ (X - base)
    apart = X - mean
    largest = apart.abs().amax(0)
    varies = largest > _CONSTANT * torch.finfo(torch.float64).eps * mean.abs()
    unit = torch.where(varies, largest, 1.0)
    deviation = unit * (share @ (apart / unit).square_()).sqrt_()
    size = torch.where(mean == 0, 1.0, mean.abs())
    return mean, torch.where(varies & (deviation > 0), deviation, size)
