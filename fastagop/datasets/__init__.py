"""Labelled data as flat matrices: the first n points in file order, and standardisation by feature."""

from fastagop.datasets.loading import load, standardize
from fastagop.datasets.raw_images import UnknownDataWarning as UnknownDataWarning

__all__ = ["load", "standardize"]
