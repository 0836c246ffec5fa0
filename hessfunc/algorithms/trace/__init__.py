"""Stochastic estimators of a trace, one per file."""
