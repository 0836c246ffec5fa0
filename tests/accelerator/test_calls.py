"""Every public function gives the same numbers on an accelerator as on the CPU.

The accelerator is emulated: a call fails if it passes tensors of both devices to one operation, or
converts a tensor to NumPy without copying it to the CPU.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from tests.accelerator import device

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not device.compiler(), reason="no C++ compiler"),
]

# The vectors of pytorch-hessian-eigenthings are on the CPU, but for operators of `use_gpu=True`.
OF_THE_CPU = {
    "eigenthings.lanczos",
    "eigenthings.power_iteration",
    "eigenthings.deflated_power_iteration",
    "from_linear_operator",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("outcomes")
    found = {}
    for name in ("cpu", device.NAME):
        path = folder / name
        command = [sys.executable, "-m", "tests.accelerator.calls", name, str(path)]
        subprocess.run(command, check=True)
        found[name] = pickle.loads(path.read_bytes())
    return found


def test_both_devices_in_one_operation_are_refused(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["cpu"]["both devices"] == [1.0, 1.0]
    assert "got tensors on emulated:0 and cpu" in outcomes[device.NAME]["both devices"]


def test_all_calls_give_the_numbers_of_the_cpu(outcomes: dict[str, dict[str, Any]]) -> None:
    expected, found = outcomes["cpu"], outcomes[device.NAME]
    assert found.keys() == expected.keys()
    assert len(found) > 150
    wrong = {
        name: found[name]
        for name in found
        if name not in OF_THE_CPU | {"both devices"} and not alike(found[name], expected[name])
    }
    assert not wrong


def alike(found: Any, expected: Any) -> bool:
    """Return whether two structures hold the same numbers, to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            alike(found[name], expected[name]) for name in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-6, abs=1e-8, nan_ok=True))
    return bool(found == expected)
