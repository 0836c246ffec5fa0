"""The Python blocks of a page, and how they run: in order, as one script."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from itertools import count
from unittest import mock

import torch

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def python_blocks(text: str) -> list[str]:
    return _BLOCK.findall(text)


def run(blocks: Iterable[str], page: str) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    # Runs without a seed draw these: a page does the same every time, with independent runs.
    seeds = count()
    with (
        torch.random.fork_rng(),
        mock.patch.object(secrets, "randbits", side_effect=seeds),
    ):
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, page, "exec"), names)
