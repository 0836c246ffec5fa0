"""``python -m bench.blocks``: measure, and print the tables."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch

import torch

from bench.blocks.measuring import measure, processes
from bench.blocks.problems import PROBLEMS
from bench.blocks.questions import QUESTIONS
from bench.blocks.record import key, read, write


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description="Blocks beside other libraries.")
    parser.add_argument("--case", choices=PROBLEMS, help="one net alone")
    parser.add_argument("--only", default="*", help="a glob of questions, such as 'HMP*'")
    options = parser.parse_args()
    torch.set_num_threads(1)

    found = read()
    with processes() as pool:
        for name in [options.case] if options.case else PROBLEMS:
            for question in QUESTIONS:
                if fnmatch(key(question), options.only):
                    cell = measure(name, question, pool)
                    found.setdefault(name, {})[key(question)] = cell
                    print(name, key(question), cell, file=sys.stderr)
                    text = write(found)
    print(text)


if __name__ == "__main__":
    main()
