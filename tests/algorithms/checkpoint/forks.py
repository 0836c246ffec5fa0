"""A copy of the process of the tests, which may be killed."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def forked(function: Callable[[], object]) -> int:
    """Call a function in a fork, and return the number of its process.

    The fork ends with the status 0, or 1 if the function raises.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # The threads of OpenMP are not in the fork, which would wait for them forever.
            torch.set_num_threads(1)
            function()
            status = 0
        finally:
            os._exit(status)
    return child
