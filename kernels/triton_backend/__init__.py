"""The Triton backend: fused device kernels, one operation a file, launched from ``launch``."""
