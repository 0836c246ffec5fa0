"""Eigenpairs: Lanczos recurrences with restarts, interior pairs by Davidson, power iteration."""
