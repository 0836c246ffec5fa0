"""Methods for linear systems, one a file."""
