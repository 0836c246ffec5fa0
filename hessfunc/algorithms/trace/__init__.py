"""Stochastic estimates of the trace: one estimator a file."""
