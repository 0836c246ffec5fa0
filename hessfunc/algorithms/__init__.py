"""Algorithms that know a matrix only by its matvec.

Folders hold families: `eigen`, `trace`, `diagonal`, `functions`, `solve`. An algorithm is a
`Method`, run by `driver.run_method`. A run is over when `Method.verdict` returns a reason, or when
the budget or the callback ends it (`driver`); estimates of random probes decide by
`results.estimate.narrow_enough` (`probing`).
"""
