"""A small causal transformer."""

import pytest
import torch

from hessfunc.app.problems.gpt import GPT, next_token_loss


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_sees_no_later_token(tied: bool) -> None:
    model = GPT(vocabulary=11, context=8, width=8, layers=2, heads=2, tied=tied)
    tokens = torch.randint(11, (3, 6))
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    assert next_token_loss(before, tokens).shape == ()
    assert (model.head.weight is model.tokens.weight) == tied
