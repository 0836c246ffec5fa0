"""Solutions of linear systems: one method a file."""
