"""A trained layer as tensors and a description, which saved estimators and checkpoints hold."""

from __future__ import annotations

import dataclasses

import torch

from fastagop.deep_rfm.layer import Layer, LayerRecord
from fastagop.deep_rfm.random_features import FEATURES, FeatureMap
from fastagop.estimators import files


def pack_layer(layer: Layer) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, description) of a trained layer: its buffers, its coefficients "alpha", and its record.

    The random map is stored, not only its seed.
    """
    record = layer.record
    metadata = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    metadata["solution"] = files.pack_solution(record.solution)
    return {**layer.state_dict(), "alpha": record.solution.alpha}, {"map": layer.kind, "record": metadata}


def unpack_layer(tensors: dict[str, torch.Tensor], metadata: dict, device: torch.device) -> Layer:
    """The layer of ``pack_layer`` on a device.

    Raises:
        ValueError: its features are of a kind that this process does not know.
    """
    tensors = {name: value.to(device) for name, value in tensors.items()}
    record = metadata["record"]
    record = LayerRecord(**{**record, "solution": files.unpack_solution(record["solution"], tensors["alpha"])})
    kind = metadata.get("map", "cos" if "bias" in tensors else "relu")  # a file may be older than the word
    if kind not in FEATURES:
        raise ValueError(f"its layers have features {kind!r}, which this version of fastagop does not have")
    features = FeatureMap(kind, tensors["weight"], tensors.get("bias"))
    return Layer(tensors["agop"], tensors["root"], features, record)
