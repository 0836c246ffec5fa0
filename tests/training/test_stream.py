from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hessfunc.randomness import seeded
from hessfunc.training.stream import Stream

CPU = torch.device("cpu")


def drawn(stream: Stream) -> torch.Tensor:
    with stream.here():
        return torch.rand(3)


def test_it_goes_on_whatever_others_draw() -> None:
    with seeded(7):
        expected = torch.rand(2, 3)
    stream = Stream.of(7, CPU)
    before = torch.get_rng_state()
    first = drawn(stream)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    assert torch.equal(torch.stack([first, drawn(stream)]), expected)


def test_a_state_is_where_it_goes_on() -> None:
    stream = Stream.of(1, CPU)
    drawn(stream)
    other = Stream(CPU, [state.clone() for state in stream.states])
    assert torch.equal(drawn(stream), drawn(other))


def test_the_global_stream_is_back_after_an_error() -> None:
    def failing() -> None:
        with Stream.of(1, CPU).here():
            torch.rand(3)
            raise ZeroDivisionError

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        failing()
    assert torch.equal(torch.get_rng_state(), before)


def test_items_are_made_from_its_draws_and_others_draw_between() -> None:
    def items() -> Iterator[torch.Tensor]:
        for _ in range(2):
            yield torch.rand(3)

    with seeded(7):
        expected = list(items())
    found = []
    before = torch.get_rng_state()
    stream = Stream.of(7, CPU)
    for item in stream.each(items()):
        assert torch.equal(torch.get_rng_state(), before)
        found.append(item)
        with seeded(1):
            torch.rand(5)
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.gpu
def test_a_device_has_a_stream_too() -> None:
    def on_device(stream: Stream) -> torch.Tensor:
        with stream.here():
            return torch.rand(3, device="cuda")

    one, same = (Stream.of(3, torch.device("cuda")) for _ in range(2))
    before = torch.cuda.get_rng_state()
    found = on_device(one)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.rand(9, device="cuda")
    assert torch.equal(found, on_device(same))
    assert not torch.equal(found, on_device(one))
