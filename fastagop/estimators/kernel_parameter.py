"""What machines and searches for them share: parameters as scikit-learn has them, and a kernel whose own can be set."""

from __future__ import annotations

from typing import Any

from sklearn import base

from fastagop.estimators.types import Self
from fastagop.kernels import checks
from fastagop.kernels.profile import Kernel

_KERNEL = "kernel__"


class KernelParameter(base.ClassNamePrefixFeaturesOutMixin, base.TransformerMixin, base.BaseEstimator):
    """A transformer with a parameter ``kernel``; kernels are immutable, so that one with another bandwidth is new."""

    kernel: Kernel

    def _store(self, arguments: dict) -> None:
        """Keep the arguments of a constructor, as they are; that of a subclass may have others."""
        for name in arguments.keys() - {"self", "__class__"}:
            setattr(self, name, arguments[name])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.target_tags.required = True
        return tags

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name; ``kernel__bandwidth`` and the like put a changed kernel in the place of this one."""
        inner = {name.removeprefix(_KERNEL): value for name, value in params.items() if name.startswith(_KERNEL)}
        params = {name: value for name, value in params.items() if not name.startswith(_KERNEL)}
        if inner:
            kernel = params.get("kernel", self.kernel)
            checks.kernel(kernel, settled=False)
            params["kernel"] = kernel.set_params(**inner)
        return super().set_params(**params)
