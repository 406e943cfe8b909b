"""Benchmarks: cases, peers, report."""
