"""Blocks of curvature matrices: ours beside those of BackPACK and curvlinops.

    python -m bench.blocks                              # some ten minutes on one core
    python -m bench.blocks --case mlp --only 'HMP*'     # these alone; others keep their numbers

Where the definitions agree, so must the numbers, in float64; the time is taken in float32, in turn,
and so is the memory, each in a process of its own. Both libraries have to be installed, BackPACK
with its extra ``unfoldNd``, and /proc be there for the memory. The tables go to
bench/results/blocks.md, with all numbers in blocks.json.
"""
