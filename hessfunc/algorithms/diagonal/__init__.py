"""Stochastic estimators of a diagonal, one per file."""
