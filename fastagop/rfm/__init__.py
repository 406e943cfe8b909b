"""Recursive feature machines: a kernel machine that learns its own metric."""

from fastagop.rfm.estimator import RFMClassifier, RFMRegressor
from fastagop.rfm.records import Callback, Directions, IterationEvent, IterationRecord
from fastagop.rfm.search import RFMClassifierCV, RFMRegressorCV
from fastagop.rfm.tree import RFMTreeClassifier, RFMTreeRegressor

__all__ = [
    "Callback",
    "Directions",
    "IterationEvent",
    "IterationRecord",
    "RFMClassifier",
    "RFMClassifierCV",
    "RFMRegressor",
    "RFMRegressorCV",
    "RFMTreeClassifier",
    "RFMTreeRegressor",
]
