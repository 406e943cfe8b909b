"""Measures of neural collapse: NC1 to NC4, CDNV and the Gram matrix of the paper's figure 1, at once or over batches.

All sums run in float64 over differences of samples, column by column from a shift of its own. Near collapse, or far
from the origin, such differences are exact, so the measures keep their digits where a formula that subtracts squared
norms has long lost them. What the rounding of the features explains is judged column by column, too: one column in
large units neither hides the others nor speaks for them.
"""

from fastagop.collapse.accumulator import Accumulator
from fastagop.collapse.classifier import nc3, nc4
from fastagop.collapse.measures import cdnv, gram, nc1, nc2, of_stages
from fastagop.collapse.moments import EqualMeansError

__all__ = ["Accumulator", "EqualMeansError", "cdnv", "gram", "nc1", "nc2", "nc3", "nc4", "of_stages"]
