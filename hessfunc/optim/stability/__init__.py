"""Sharpness up to which the steps of an optimiser are stable."""
