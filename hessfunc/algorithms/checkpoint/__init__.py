"""Checkpoints: the state of a run in a directory, saved after each round and read to resume.

Rows of tensors lie in segments, files that are named by the digest of their bytes. Rows that a
round appends make a new segment; earlier segments are not written again. A manifest lists the
segments of the state and identifies the run. It is replaced atomically, after all segments that it
lists are on the disk, and before any other segment is removed. Therefore the directory contains a
complete state whenever a process is killed, either the previous or the new one.

If vectors are divided among ranks, each rank writes its columns into one directory that all ranks
see, and the first rank writes the manifest after all others are done. Columns are joined when they
are read, so a run can be resumed with another number of ranks. For DTensors, the columns of a rank
are those of its shards, and the resumed run must divide them in the same way.
"""

from hessfunc.algorithms.checkpoint.run import Checkpoint, Columns, Directory

__all__ = ["Checkpoint", "Columns", "Directory"]
