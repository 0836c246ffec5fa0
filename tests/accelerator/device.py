"""The emulated accelerator as a device of torch, compiled in a few seconds."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tempfile
import types
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "emulated"
SOURCE = Path(__file__).with_name("device.cpp")


def compiler() -> str | None:
    return shutil.which("c++")


class Device(types.ModuleType):
    """Module ``torch.emulated``, with the functions that torch expects, as in ``torch.cuda``."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


def register() -> None:
    """Compile the device and make it known to torch."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Device(NAME))
    torch.utils.generate_methods_for_privateuse1_backend()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "device.so"
        places = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
        folders = cpp_extension.library_paths()
        subprocess.run(
            [
                str(compiler()), "-std=c++20", "-O0", "-fPIC", "-shared", "-w", str(SOURCE),
                *(f"-isystem{place}" for place in places),
                *(f"-L{place}" for place in folders),
                "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-o", str(library),
            ],
            check=True,
        )  # fmt: skip
        loader = ExtensionFileLoader("device", str(library))
        spec = spec_from_file_location("device", library, loader=loader)
        assert spec
        loader.exec_module(module_from_spec(spec))
