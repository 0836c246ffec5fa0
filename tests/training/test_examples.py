"""Labelled examples in memory."""

import torch

from hessfunc.app.problems import data


def test_batches_keep_the_order_and_the_rest() -> None:
    examples = data.Examples(torch.arange(7.0), torch.arange(7))
    batches = examples.batches(3)
    assert [len(targets) for _, targets in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), examples.inputs)
    assert len(examples[:4]) == 4
