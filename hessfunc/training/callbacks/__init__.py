"""Curvature that is watched from other libraries' training loops; each file needs its library."""
