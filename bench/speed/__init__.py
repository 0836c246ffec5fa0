"""How fast curvature is: ours beside other libraries, one cell of the table at a time.

    python -m bench.speed                       # what is not there yet: some hours on two cores
    python -m bench.speed --minutes 25 --again  # the most important cells, anew
    python -m bench.speed --fast                # three minutes, in a folder of its own
    python -m bench.speed 'block/*' data/gpt    # these alone; with --again though they are there
    python -m bench.speed --list                # the cells, in order of importance
    python -m bench.speed --tables              # the tables and figures of what is there

A cell is one question about one net: all alternatives compute the same thing, which is verified
against plain autograd before any of them is timed, and then take turns (`bench.interleaved`), with
a gradient of the same loss on the same batch among them, the unit in which costs are given. Each
cell is written as soon as it is measured, so that a run may be stopped and started again. Every
machine has a folder of its own, bench/results/speed/<processor or GPU>/: its cells, with the
machine, the matrix libraries, the threads, the versions, the day and the commit; its tables in
speed.md; its figures. `python -m bench.speed.machines` compares the machines.

Where hessfunc multiplies large matrices by oneDNN and torch by another library, ours is measured
twice: as it is, and with torch's own library, as all others.

Other libraries are the extra ``peers``; what cannot be imported or does not work is a named gap.
Trained nets and images are read from the folder HESSFUNC_DATA, and left out without it. On a
machine that is shared set OMP_WAIT_POLICY=PASSIVE.
"""
