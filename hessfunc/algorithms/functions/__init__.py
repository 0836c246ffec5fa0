"""Functions of matrices: f(A) b, and log-determinants."""
