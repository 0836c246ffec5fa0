"""The state of a run in a directory: written after each round, read when the run starts again.

Rows of tensors lie in segments, files that are named by the digest of their bytes: rows that a
round appends make a new segment, and those before are not written again. One manifest says which
segments make up the state, and whose state it is. It is replaced in one step, after all segments
that it names are on the disk, and before any other one is removed: whenever a process is killed,
a whole state is there, the one before or the one after.

Where vectors are cut over ranks each of them writes its columns, into one directory that all of
them see, and the first writes the manifest once all are done. Columns are put together anew as
they are read: a run may go on with another number of ranks. Of DTensors a rank's columns are those
of its shards, and a run goes on where they are cut alike.
"""

from hessfunc.algorithms.checkpoint.run import Checkpoint, Directory

__all__ = ["Checkpoint", "Directory"]
