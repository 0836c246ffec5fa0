from __future__ import annotations

import pytest

from bench.speed import machine
from bench.speed.machine import described, known_as, slug, title

MKL = "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605 for ...\n"


@pytest.mark.parametrize(
    ("model", "flags", "name", "folder"),
    [
        ("AMD EPYC", {"avx2", "avx512f"}, "AMD EPYC (AVX-512)", "amd-epyc-avx512"),
        (
            "Intel(R) Xeon(R) Processor @ 2.90GHz",
            {"amx_tile", "avx512f"},
            "Intel Xeon (AMX)",
            "intel-xeon-amx",
        ),
        ("AMD EPYC 7763 64-Core Processor", {"avx2"}, "AMD EPYC 7763 (AVX2)", "amd-epyc-7763-avx2"),
        ("aarch64", set(), "aarch64", "aarch64"),
        ("", set(), "unknown", "unknown"),
        ("NVIDIA H200", set(), "NVIDIA H200", "nvidia-h200"),
    ],
)
def test_a_machine_has_a_folder(model: str, flags: set[str], name: str, folder: str) -> None:
    assert known_as(model, flags) == name
    assert slug(name) == folder


def test_machine_and_matrix_libraries_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_other_library", lambda: False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    found = described()
    assert found["machine"] == title()
    assert found["matrices, hessfunc"] == "torch's"
    assert found["MKL_CBWR"] == "COMPATIBLE"
    monkeypatch.setattr(machine, "has_other_library", lambda: True)
    assert described()["matrices, hessfunc"].startswith("oneDNN")


@pytest.mark.parametrize(
    ("configuration", "library"),
    [
        (f"{MKL}  - Build settings: BLAS_INFO=mkl, ", "MKL 2024.2"),
        ("  - Build settings: BLAS_INFO=open, ", "OpenBLAS"),
        ("  - Build settings: BLAS_INFO=nvpl, ", "nvpl"),
        ("", "unknown"),
    ],
)
def test_the_library_of_torch_is_read_from_its_configuration(
    configuration: str, library: str
) -> None:
    assert machine.torchs_library(configuration) == library
