"""Memory: what of it is free, and matrices for work."""
