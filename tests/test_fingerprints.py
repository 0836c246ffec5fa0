"""Checksums of parameters and examples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.fingerprints import checksum, combined, fingerprint, of_batches, with_fingerprint

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(9) % 3


def test_examples_have_one_checksum_in_any_order_and_batch_size() -> None:
    whole = of_batches([(X, Y)])
    order = torch.randperm(9)
    for size in (1, 4, 9):
        assert of_batches(hf.microbatches((X[order], Y[order]), size)) == whole


def one_bit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x.view(torch.int32)[3, 2] ^= 1
    return x, y


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        lambda x, y: (x, y[[1, 0, *range(2, 9)]]),
        lambda x, y: (x[:, [1, 0, 2, 3]], y),
        lambda x, y: (x[:8], y[:8]),
        lambda x, y: (torch.cat([x, x[:1]]), torch.cat([y, y[:1]])),
    ],
    ids=["one bit", "targets exchanged", "entries exchanged", "one left out", "one repeated"],
)
def test_other_examples_have_another_checksum(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    assert of_batches([change(X.clone(), Y.clone())]) != of_batches([(X, Y)])


def test_a_checksum_is_one_of_the_bytes_in_order() -> None:
    assert checksum([X, Y]) == checksum([X.clone(), Y.clone()])
    assert checksum([X, Y]) != checksum([Y, X])
    assert checksum([torch.zeros(2)]) != checksum([-torch.zeros(2)])
    strided = X.mT
    assert checksum([strided]) == checksum([strided.contiguous()])


def test_a_matrix_built_of_others_has_their_fingerprints() -> None:
    one, other = (
        with_fingerprint(lambda block: block, lambda made=made: made)
        for made in ({"parameters": "a", "batches": "b"}, {"parameters": "c"})
    )
    assert fingerprint(one) == {"parameters": "a", "batches": "b"}
    assert combined([one, other]) == {"parameters": "a, c", "batches": "b, unknown"}
    assert fingerprint(lambda block: block) == {}
