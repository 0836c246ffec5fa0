"""Faces of other libraries, thin over the functional core.

An existing script runs with its import changed.
"""
