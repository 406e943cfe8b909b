"""Pictures of collapse and of learnt metrics, by matplotlib, which is imported when one is drawn.

Functions of one plot take ``ax`` and return the Axes; those of several take ``figure`` or ``axes`` and return the
Figure. Without these pyplot makes a new figure. Colours are Okabe and Ito's, and a stage of a layer has the same colour
and marker everywhere: ``STAGES``, three that stay apart for every kind of colour blindness. Install matplotlib with
``pip install 'fastagop[plots]'``.
"""

from fastagop.plots.layers import collapse_curves, curve
from fastagop.plots.metrics import diagonal, eigenvectors, spectrum
from fastagop.plots.strips import cosine_bar, gram_strip
from fastagop.plots.style import COLORS, DIVERGING, STAGES, Stage, require

__all__ = [
    "COLORS",
    "DIVERGING",
    "STAGES",
    "Stage",
    "collapse_curves",
    "cosine_bar",
    "curve",
    "diagonal",
    "eigenvectors",
    "gram_strip",
    "require",
    "spectrum",
]
