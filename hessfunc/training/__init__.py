"""Training with curvature."""
