"""A trained layer as tensors and a description, which saved estimators and checkpoints hold."""

from __future__ import annotations

import dataclasses

import torch

from fastagop.deep_rfm.layer import Layer, LayerRecord
from fastagop.deep_rfm.random_features import FeatureMap
from fastagop.estimators import files


def pack_layer(layer: Layer) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, description) of a trained layer: its buffers, its coefficients "alpha", and its record.

    The random map is stored, not only its seed.
    """
    record = layer.record
    metadata = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    metadata["solution"] = files.pack_solution(record.solution)
    return {**layer.state_dict(), "alpha": record.solution.alpha}, {"map": layer.map.name, "record": metadata}


def unpack_layer(tensors: dict[str, torch.Tensor], metadata: dict, device: torch.device) -> Layer:
    """The layer of ``pack_layer`` on a device."""
    tensors = {name: value.to(device) for name, value in tensors.items()}
    record = metadata["record"]
    record = LayerRecord(**{**record, "solution": files.unpack_solution(record["solution"], tensors["alpha"])})
    return Layer(tensors["agop"], tensors["root"], FeatureMap(tensors["weight"], tensors.get("bias")), record)
