"""Neural networks measured as the paper does: AGOP, neural feature ansatz and collapse at every layer.

``model`` is any torch.nn.Module that maps a batch X (n, ...) to outputs with n rows. It is measured in evaluation
mode and left as it was found: modes, gradients and hooks. Measures of one model in several threads take turns. ``X``
is a tensor, taken ``batch_size`` samples at a time, or an iterable of batches such as a DataLoader (of inputs, or of
inputs and labels); batches move to the model's device. ``layers`` chooses layers by name or pattern, for example
``"classifier.*"``; default all that the model calls: Linear layers, convolutions, the projections of attention and
embeddings; for measures of collapse Linear layers.
"""

from fastagop.network.collapse_split import Split, collapse_split, split
from fastagop.network.measures import (
    ConstantMatrixError,
    NotAMatrixError,
    agop,
    fact,
    fact_correlation,
    nfa_correlation,
)
from fastagop.network.results import ByLayer

__all__ = [
    "ByLayer",
    "ConstantMatrixError",
    "NotAMatrixError",
    "Split",
    "agop",
    "collapse_split",
    "fact",
    "fact_correlation",
    "nfa_correlation",
    "split",
]
