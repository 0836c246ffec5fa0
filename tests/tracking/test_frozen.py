"""Fixed copies of batches, and the check that passes have the same examples."""

from __future__ import annotations

import random
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.tracking.frozen import frozen, outside_inference, refuse_changing


def loader(**options: Any) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10))
    return DataLoader(data, batch_size=4, **options)


def test_copies_are_the_first_batches_and_share_no_memory() -> None:
    data = [(torch.ones(2), UserDict(y=torch.zeros(2), name="a")), (torch.ones(3), UserDict())]
    copies = frozen(data, batches=1)
    data[0][0].add_(1)
    data[0][1]["y"].add_(1)
    assert len(copies) == 1
    assert copies[0][0].tolist() == [1, 1]
    assert copies[0][1]["y"].tolist() == [0, 0]
    assert copies[0][1]["name"] == "a"
    assert [len(y) for _, y in frozen(loader())] == [4, 4, 2]
    assert len(frozen(iter(loader()), batches=2)) == 2


def test_random_streams_keep_their_state() -> None:
    generator = torch.Generator().manual_seed(0)
    before = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        generator.get_state(),
    )
    first = frozen(loader(shuffle=True, generator=generator))
    second = frozen(loader(shuffle=True, generator=generator))
    assert torch.equal(first[0][1], second[0][1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert torch.equal(generator.get_state(), before[3])


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch"):
        frozen([])
    with pytest.raises(ValueError, match="batches=0"):
        frozen(loader(), batches=0)
    with pytest.raises(TypeError, match="DataLoader"):
        frozen(3)  # type: ignore[arg-type]


def test_shuffling_alone_has_the_same_examples() -> None:
    refuse_changing(loader(shuffle=True))
    with pytest.raises(ValueError, match=r"frozen\(loader, batches=4\)"):
        refuse_changing(loader(shuffle=True, drop_last=True))
    with pytest.raises(TypeError, match="read only once"):
        refuse_changing(iter(loader()))
    with pytest.raises(TypeError, match="single batch"):
        refuse_changing((torch.ones(2), torch.ones(2)))


def test_tensors_of_inference_mode_are_cloned() -> None:
    plain = [(torch.ones(2), "a")]
    assert outside_inference(plain) is plain
    with torch.inference_mode():
        inside = [(torch.ones(2), "a")]
    (batch,) = outside_inference(inside)
    assert not batch[0].is_inference()
    assert batch[1] == "a"
