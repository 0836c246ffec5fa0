from __future__ import annotations

from itertools import islice

import torch

from hessfunc.training.batches import epochs_of, grouped
from tests.training.blobs import blobs


def test_each_epoch_has_its_own_order_of_all_examples() -> None:
    def orders(seed: int) -> list[torch.Tensor]:
        epochs = islice(epochs_of(blobs(), batch_size=25, seed=seed), 2)
        return [torch.cat([x for x, _ in epoch]) for epoch in epochs]

    first, second = orders(0)
    assert not torch.equal(first, second)
    for order in (first, second):
        assert torch.equal(order[:, 0].sort().values, blobs().inputs[:, 0].sort().values)
    assert torch.equal(orders(0)[1], second)
    assert not torch.equal(orders(1)[1], second)


def test_inputs_and_targets_stay_together_and_the_rest_is_smaller() -> None:
    epoch = next(epochs_of(blobs(), batch_size=25, seed=0))
    assert [len(y) for _, y in epoch] == [25, 25, 10]
    # An epoch can be read again.
    assert all(torch.equal(y, (x[:, 0] > 0).long()) for x, y in epoch)


def test_a_loader_is_read_as_it_is() -> None:
    loader = blobs().batches(20)
    epochs = epochs_of(loader, batch_size=7, seed=0)
    assert [next(epochs) is loader for _ in range(3)] == [True] * 3


def test_groups_and_which_is_the_last() -> None:
    batches = blobs().batches(10)
    for size, lengths in ((1, [1] * 6), (2, [2, 2, 2]), (4, [4, 2]), (6, [6]), (9, [6])):
        groups = list(grouped(iter(batches), size))
        assert [len(group) for group, _ in groups] == lengths
        assert [is_last for _, is_last in groups] == [False] * (len(lengths) - 1) + [True]
        assert [b for group, _ in groups for b in group] == batches
    assert list(grouped(iter([]), 3)) == []
