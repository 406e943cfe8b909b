"""Fitted estimators in files, which ``save`` writes and ``load`` reads."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastagop.estimators import MODULES
from fastagop.estimators import files as storage
from fastagop.estimators.types import Device

_KIND = "fitted estimator"
_ATTRIBUTES = (
    *("n_features_in_", "feature_names_in_", "classes_"),
    *("_flat", "_torch_in", "_dtype_of_fit", "_diagonal_of_fit"),
)
# Parameters of the process that trained and not of the estimator, which has their defaults when it is loaded.
_NOT_SAVED = ("checkpoint_dir", "callbacks", "process_group")


@functools.lru_cache(maxsize=64)
def parameters(kind: type) -> tuple[str, ...]:
    """Names of a constructor's arguments, for which scikit-learn reads its signature: a fifth of a millisecond."""
    return tuple(kind._get_param_names())  # pyright: ignore[reportAttributeAccessIssue]


def _of_process(name: str, value) -> bool:
    """Whether a parameter is not saved; a scorer may be a function, cv a splitter, and a space hold distributions."""
    if name == "cv":
        return not isinstance(value, (int, np.integer, str))
    return name in _NOT_SAVED or (name == "scoring" and callable(value)) or (name == "space" and not _plain(value))


def _plain(value) -> bool:
    """Whether a value is made of numbers and texts, so that JSON can hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufU"
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.bool_, np.integer, np.floating))


def save(model, path: Path) -> None:
    """Write a fitted ``KernelEstimator``."""
    name = type(model).__name__
    if name not in MODULES or type(model) is not _class(name):
        *names, last = MODULES
        raise TypeError(f"save knows {', '.join(names)} and {last}, not {name}")
    tensors, metadata = described(model)
    storage.write(path, _KIND, tensors, {**metadata, "versions": storage.versions()})


def described(model) -> tuple[dict, dict]:
    """(tensors, description) of a fitted estimator, from which ``assembled`` makes it again."""
    tensors, metadata = model._packed()
    parameters = model.get_params(deep=False).items()
    description = {
        "estimator": type(model).__name__,
        "parameters": {k: storage.pack_value(v) for k, v in parameters if not _of_process(k, v)},
        "attributes": {k: storage.pack_value(getattr(model, k)) for k in _ATTRIBUTES if hasattr(model, k)},
    }
    if hasattr(model, "solution_"):  # a kernel machine, and no tree of them
        description["kernel"] = storage.pack_kernel(model.kernel_)
        description["solution"] = storage.pack_solution(model.solution_)
        tensors = {"centers": model._centers, "alpha": model.solution_.alpha, **tensors}
    return tensors, {**description, **metadata}


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{"part": {"name": tensor}} of tensors called "part/name", as files of several machines have them."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts


def load(path: str | os.PathLike[str], device: Device | None = None) -> Any:
    """Read a fitted estimator that its ``save`` wrote; on the same device it predicts the same to the bit.

    Args:
        path: the file.
        device: where its tensors go; default its own ``device`` parameter.

    Returns:
        The estimator, fitted: a Deep RFM, an RFM, a tree of them or a search for one.

    Raises:
        OSError: the file is not there or cannot be read. ValueError: it is damaged or was not written by ``save``, its
            kernel is defined nowhere, or its device is not there.
    """
    path = Path(path)
    tensors, metadata = storage.read(path, _KIND)
    with storage.restoring(path):
        if metadata["estimator"] not in MODULES:
            raise ValueError(f"{path} holds a {metadata['estimator']}, which this version of fastagop does not have")
        return assembled(tensors, metadata, device)


def assembled(tensors: dict, metadata: dict, device=None):
    """The estimator of a file's contents."""
    parameters = {name: storage.unpack_value(value) for name, value in metadata["parameters"].items()}
    if device is not None:
        parameters["device"] = str(device)
    model = _class(metadata["estimator"])(**parameters)
    model._regression()
    if "solution" in metadata:
        model.kernel_ = storage.unpack_kernel(metadata["kernel"])
        _check_shapes(tensors, metadata)
    tensors = {name: value.to(model._device) for name, value in tensors.items()}
    if "solution" in metadata:
        model._centers = tensors["centers"]
        model.solution_ = storage.unpack_solution(metadata["solution"], tensors["alpha"])
    for name in _ATTRIBUTES:
        if name in metadata["attributes"]:
            setattr(model, name, storage.unpack_value(metadata["attributes"][name]))
    model._restore(tensors, metadata)
    return model


def _check_shapes(tensors: dict, metadata: dict) -> None:
    """A kernel machine whose parts belong together: they are only put to use much later."""
    centers, alpha = tensors["centers"], tensors.get("readout", tensors["alpha"])  # Copies of points are merged.
    if centers.ndim != 2 or alpha.ndim != 2 or len(centers) != len(alpha):
        raise ValueError(f"centers {tuple(centers.shape)} and alpha {tuple(alpha.shape)} do not belong together")
    classes = metadata["attributes"].get("classes_")
    if classes is not None and len(classes["array"]) != alpha.shape[1]:
        raise ValueError(f"{len(classes['array'])} classes and {alpha.shape[1]} outputs do not belong together")


def _class(name: str) -> type:
    return getattr(importlib.import_module(MODULES[name]), name)
