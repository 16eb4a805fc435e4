"""Measurements behind the figures in the README; each writes its result to benchmarks/results."""
