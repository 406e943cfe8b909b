"""Kernels that are not radial, and what kernels are combined by; each is one class, on the torch backend."""
