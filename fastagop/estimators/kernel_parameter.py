"""Parameters of estimators that have a kernel, whose own parameters can be set by name."""

from __future__ import annotations

from typing import Any

from sklearn import base

from fastagop.estimators.types import Self
from fastagop.kernels import checks
from fastagop.kernels.profile import Kernel

_KERNEL = "kernel__"


class KernelParameter(base.BaseEstimator):
    """An estimator with a parameter ``kernel``; kernels are immutable, so that one with another bandwidth is new."""

    kernel: Kernel

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name; ``kernel__bandwidth`` and the like put a changed kernel in the place of this one."""
        inner = {name.removeprefix(_KERNEL): value for name, value in params.items() if name.startswith(_KERNEL)}
        params = {name: value for name, value in params.items() if not name.startswith(_KERNEL)}
        if inner:
            kernel = params.get("kernel", self.kernel)
            checks.kernel(kernel, settled=False)
            params["kernel"] = kernel.set_params(**inner)
        return super().set_params(**params)
