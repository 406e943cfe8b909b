"""The KeOps backend: map-reduce formulas that never hold a block of the kernel matrix."""
