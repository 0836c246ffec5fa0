"""Functions of ``hessian_eigenthings.utils``, under its name: a log and a progress bar."""

from __future__ import annotations

import shutil
import sys

from torch import Tensor

from hessfunc.options import anything, flag, or_none, tensor, text, validated, whole_number

_WIDTH = 30


@validated(msg=anything)
def log(msg: object) -> None:
    """Print a message."""
    print(f"[hessian_eigenthings] {msg}")


@validated(vec=tensor, fp16=flag)
def maybe_fp16(vec: Tensor, fp16: bool) -> Tensor:
    """Return a tensor in float16 or, without ``fp16``, in float32."""
    return vec.half() if fp16 else vec.float()


@validated(current=whole_number, total=whole_number, msg=or_none(text))
def progress_bar(current: int, total: int, msg: str | None = None) -> None:
    """Draw a progress bar on the current line of the output, and end the line after the last step.

    Args:
        current: Number of the step, from 0.
        total: Number of steps.
        msg: Text after the bar.
    """
    done = min(current + 1, total)
    bar = "=" * (_WIDTH * done // max(total, 1))
    line = f"[{bar:.<{_WIDTH}}] {done}/{total}" + (f" {msg}" if msg else "")
    columns = shutil.get_terminal_size().columns
    sys.stdout.write(f"\r{line[: columns - 1]:{min(len(line), columns - 1)}}")
    sys.stdout.write("\n" if done >= total else "")
    sys.stdout.flush()
