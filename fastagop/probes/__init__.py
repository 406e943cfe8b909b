"""Probes of hidden activations: recursive feature machines at every layer of a network, chosen on rows held out.

``fit`` takes the activations of some layers and what is to be read from them. For every layer it tries settings of
``RFMClassifier`` or ``RFMRegressor``, scores each of their iterations on rows that none of them has seen, and keeps the
best one, with the directions that it found.
"""

from fastagop.probes.fitting import fit
from fastagop.probes.result import Aggregate, Probe, Probes

__all__ = ["Aggregate", "Probe", "Probes", "fit"]
