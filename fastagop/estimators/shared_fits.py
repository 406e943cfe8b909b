"""Fits that the ranks of a process group make together: what they must agree on, and which of them speaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fastagop.distributed.communicator import Communicator
from fastagop.distributed.engine import engine_of
from fastagop.estimators import persistence

# Parameters in which ranks may differ: those of a process, those that only the first rank goes by, and those of which
# the training data tell; ``kernel`` comes first.
_APART = (
    *("kernel", "device", "callbacks", "verbose", "process_group"),
    *("random_state", "scoring", "dtype", "class_weight", "fit_intercept"),
)


def agree(model: Any, given: str, **tensors: torch.Tensor | None) -> None:
    """Refuse ranks whose fits would not take the same steps: they would wait for each other until the timeout.

    Args:
        model: the estimator.
        given: what else decides on the steps, in words.
        **tensors: the training data, X first.
    """
    if model.process_group is None:
        return
    names = (name for name in persistence.parameters(type(model)) if name not in _APART)
    call = ", ".join([repr(model.kernel), *(f"{name}={getattr(model, name)!r}" for name in names), given])
    call += classes(model)
    engine_of(model.process_group).agree("fit", call, **tensors)


def classes(model: Any) -> str:
    """The labels of a classifier's data in words, since targets do not tell them; nothing of a regressor."""
    found = vars(model).get("classes_")
    return "" if found is None else f", classes {found.tolist()!r}"


@contextlib.contextmanager
def refusals_told(model: Any) -> Iterator[None]:
    """Where this rank refuses its parameters or data before ``agree``, the others learn it there and do not wait.

    Raises:
        Exception: the refusal itself.
    """
    try:
        yield
    except Exception as refusal:
        if model.process_group is not None:
            _tell(model, refusal)
        raise


def _tell(model: Any, refusal: Exception) -> None:
    """Answer the other ranks, which are about to agree; the refusal matters more than that they cannot be reached."""

    def refuse() -> None:
        raise refusal

    with contextlib.suppress(Exception):
        device = getattr(model, "_device", torch.device("cpu"))
        Communicator(model.process_group, "fit", device).agree(refuse, "")


def quiet(model: Any) -> bool:
    """Whether this process shows nothing of an estimator's fit: of a group's processes the first one does."""
    if not model.verbose or model.process_group is None:
        return not model.verbose
    return Communicator(model.process_group, "fit", model._device).rank > 0
