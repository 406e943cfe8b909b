"""Kernel ridge regression systems and the algorithms that solve them, one algorithm a file."""
