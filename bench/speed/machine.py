"""The machine that is measured: its name, its folder, and the libraries that multiply matrices."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from bench.environment import processor
from bench.speed.device import device
from bench.speed.ours import has_other_library

# The widest extension decides how fast matrices are multiplied; hypervisors hide the model.
_EXTENSIONS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
_LIBRARIES = {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate"}
_SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)


def title() -> str:
    """Return the name of the GPU, or of the processor with its widest vector extension."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    return known_as(processor(), _flags())


def known_as(model: str, flags: set[str]) -> str:
    """Return the name of a processor without marks, clock rate and number of cores."""
    plain = re.sub(r"\((?:R|TM)\)|@.*|\b(?:CPU|Processor|\d+-Core)\b", " ", model)
    widest = next((name for flag, name in _EXTENSIONS.items() if flag in flags), None)
    name = " ".join(plain.split()) or "unknown"
    return f"{name} ({widest})" if widest else name


def slug(name: str) -> str:
    """Return the name of the machine's folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("avx-512", "avx512")).strip("-")


def described() -> dict[str, str]:
    """Return the machine, and the libraries that multiply matrices: torch's and ours."""
    found = {"machine": title(), "processor": processor()}
    if device().type == "cuda":
        cudnn = torch.backends.cudnn.version()
        found["matrices, torch"] = f"cuBLAS of CUDA {torch.version.cuda}, cuDNN {cudnn}, no TF32"
        found["matrices, hessfunc"] = "torch's"
        return found
    configuration = torch.__config__.show()
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["matrices, torch"] = torchs_library(configuration)
    one_dnn = re.search(r"MKL-DNN v(\S+)", configuration)
    version = one_dnn[1] if one_dnn else ""
    found["matrices, hessfunc"] = f"oneDNN {version}" if has_other_library() else "torch's"
    return found | {name: value for name in _SETTINGS if (value := os.environ.get(name))}


def torchs_library(configuration: str) -> str:
    """Return the matrix library that torch was built with."""
    library = re.search(r"BLAS_INFO=(\w+)", configuration)
    version = re.search(r"Math Kernel Library Version (\S+?)(?:-Product)? ", configuration)
    name = _LIBRARIES.get(library[1], library[1]) if library else "unknown"
    return f"{name} {version[1]}" if version and name == "MKL" else name


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return set(next(flags, []))
