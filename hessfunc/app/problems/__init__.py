"""Networks and data sets of the command line, the tests and the benchmarks."""
