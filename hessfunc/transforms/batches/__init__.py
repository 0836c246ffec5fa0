"""Curvature of many batches: means and sums, random draws, ranks, and what a batch is.

`examples` counts and cuts the examples of a batch; `hessfunc.containers` opens its containers.
`reading` makes the passes over the batches.
"""
