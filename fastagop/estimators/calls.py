"""How the estimators' methods run: without autograd history, in full float32, and fits as a whole or not at all."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from fastagop.kernels.precision import full_products

P = ParamSpec("P")
T = TypeVar("T")


def without_autograd_or_autocast(method: Callable[P, T]) -> Callable[P, T]:
    """A method without autograd history, and outside what the process has set to round products: autocast, TF32.

    Operations that it calls with a ``precision`` of their own have that.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(full_products())
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                stack.enter_context(torch.autocast(device, enabled=False))
            return method(*args, **kwargs)

    return run


def all_or_nothing(fit: Callable[P, T]) -> Callable[P, T]:
    """A method ``fit`` that leaves the estimator as it was where it ends in an error, or is interrupted.

    Half of a new fit beside half of the one before would answer without a word: the old machine in new units.
    """

    @functools.wraps(fit)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        attributes = vars(args[0])
        before = dict(attributes)
        try:
            return fit(*args, **kwargs)
        except BaseException:
            attributes.clear()
            attributes.update(before)
            raise

    return run
