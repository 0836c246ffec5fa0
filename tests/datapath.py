"""Where the data sets of the tests and benchmarks lie: HESSFUNC_DATA, or a checkout's neighbour."""

import os
from pathlib import Path

import pytest

DATA = Path(
    os.environ.get("HESSFUNC_DATA", Path(__file__).parents[2] / "shared" / "data")
).expanduser()


def data_file(relative: str) -> Path:
    """A file or folder under the data path; the test is skipped where it is not there."""
    path = DATA / relative
    if not path.exists():
        pytest.skip(f"no {path}: set HESSFUNC_DATA to a folder that has {relative}")
    return path
