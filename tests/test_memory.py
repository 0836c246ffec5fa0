"""Peak memory, measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hessfunc.memory import available_memory
from tests.peaks import (
    LOGITS_BYTES,
    deep_model,
    gauss_newton,
    linearised_model,
    no_examples_to_speak_of,
)
from tests.peaks import deep_model_recomputed as recomputed

pytestmark = pytest.mark.slow


def peak(job: object) -> int:
    name = getattr(job, "__name__", "")
    command = [sys.executable, "-m", "tests.peaks", name]
    root = Path(__file__).parents[1]
    # glibc keeps freed blocks of this size in its heap, where they fragment it.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_large_vocabulary_costs_no_more_than_three_logits() -> None:
    assert peak(gauss_newton) - peak(linearised_model) < 3 * LOGITS_BYTES


def test_recomputation_saves_most_of_the_graph() -> None:
    kept, again, nothing = peak(deep_model), peak(recomputed), peak(no_examples_to_speak_of)
    assert again - nothing < 0.4 * (kept - nothing)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    alone = available_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < available_memory(cpu) < 0.3 * alone
