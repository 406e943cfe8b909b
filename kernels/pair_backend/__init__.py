"""Torch's blocks for kernels that are not radial: values and gradients of all pairs, and the operations on them."""
