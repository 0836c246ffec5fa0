"""Stochastic estimates of the diagonal: one estimator a file."""
