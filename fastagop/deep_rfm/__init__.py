"""Deep RFM: its layers, its estimators, its checkpoints, and the network that a fitted one is."""

from fastagop.deep_rfm.layer import Callback, LayerEvent, LayerRecord

__all__ = ["Callback", "LayerEvent", "LayerRecord"]
