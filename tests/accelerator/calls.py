"""The valid calls of all public functions on one device, pickled in a file.

python -m tests.accelerator.calls emulated FILE
"""

from __future__ import annotations

import pickle
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hessfunc
from tests.accelerator.device import NAME, register

LIBRARY = Path(hessfunc.__file__).parent


def let_tests_convert_to_numpy() -> None:
    """Have tensors copied to the CPU where the tests, not the library, convert them to NumPy."""
    plain = torch.Tensor.numpy

    def numpy(tensor: torch.Tensor, **options: Any) -> Any:
        # The default device is a function mode, which stands between the caller and this function.
        callers = [sys._getframe(depth).f_code.co_filename for depth in (1, 2)]
        in_library = any(Path(caller).is_relative_to(LIBRARY) for caller in callers)
        return plain(tensor if in_library else tensor.cpu(), **options)

    torch.Tensor.numpy = numpy  # type: ignore[method-assign]
    # The emulation has no sparse tensors.
    torch.Tensor.to_sparse = lambda tensor: tensor.cpu()  # type: ignore


def outcomes() -> dict[str, Any]:
    """Return the numbers of each call, or what it raised."""
    from tests.test_fuzz import CALLS, METHODS, REFUSED, called, plain

    calls = {name: partial(called, name, {}) for name in CALLS | METHODS if name not in REFUSED}
    calls["both devices"] = lambda: torch.cat([torch.ones(1), torch.ones(1, device="cpu")])
    found = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = plain(call())
        except Exception:
            found[name] = traceback.format_exc(limit=-3)
    return found


if __name__ == "__main__":
    if sys.argv[1] == NAME:
        register()
        torch.set_default_device(NAME)
        let_tests_convert_to_numpy()
    Path(sys.argv[2]).write_bytes(pickle.dumps(outcomes()))
