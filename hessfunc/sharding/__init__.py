"""Models whose parameters are divided among ranks.

`parts` gathers the parameters of a block where the block runs. They are local to that function, and
`recomputed` keeps none of its intermediate values, so they are freed when it returns. `model` is
the pure function of shards, and `skeleton` the copy of the module without parameters.
"""
