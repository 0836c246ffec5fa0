"""A trained Llama, through Hugging Face transformers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.llama import stories260k, stories_batches, tokens
from tests.datapath import data_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MATRICES = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "down", "up")),
]


def problem() -> tuple[hf.Loss, dict[str, Tensor], list[dict[str, Tensor]]]:
    model_fn, params = hf.functional(stories260k(data_file("stories260K/stories260K_torch.npz")))

    def logits(params: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model_fn(params, {"input_ids": batch["input_ids"]}).logits
        return found[:, :-1].transpose(1, 2)

    def criterion(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(outputs, batch["labels"][:, 1:])

    batches = stories_batches(data_file("stories260K/tinystories_sample_ids.npz"))
    return hf.composed(logits, criterion), params, batches


def test_loss_is_the_published_one() -> None:
    loss, params, batches = problem()
    counts = [tokens(batch) for batch in batches]
    total = sum(n * float(loss(params, b)) for n, b in zip(counts, batches, strict=True))
    assert sum(counts) == 1804
    assert total / sum(counts) == pytest.approx(1.266, abs=5e-4)


@pytest.mark.parametrize("curvature", [hf.hvp, hf.ggnvp])
def test_five_largest_eigenvalues(curvature: Any) -> None:
    loss, params, batches = problem()
    short = [{name: row[:, :100] for name, row in batch.items()} for batch in batches[:2]]
    matvec = hf.over_batches(curvature(loss), weight=tokens, keep=True)(params, short)
    found = hf.lanczos(matvec, params, k=5, which="LA", rtol=1e-2, seed=0)
    assert found.converged.all()
    assert (found.residuals <= 1e-2 * found.values).all()
    images = hf.ravel(hf.apply(matvec, {n: v[0] for n, v in found.vectors.items()}))
    vector = hf.ravel({name: leaf[0] for name, leaf in found.vectors.items()})
    assert float((images - found.values[0] * vector).norm()) <= 1e-2 * float(found.values[0])


def test_spectra_of_all_matrices_of_all_layers_in_one_call() -> None:
    loss, params, batches = problem()
    short = [{name: row[:, :32] for name, row in batches[0].items()}]
    blocks = [f"model.layers.{layer}.{matrix}" for layer in range(5) for matrix in MATRICES]
    found = hf.block_spectra(
        loss,
        params,
        short,
        blocks=blocks,
        algorithm=functools.partial(hf.slq, probes=1, steps=5, seed=0),
    )
    assert list(found) == blocks
    for name, density in found.items():
        assert density.n == params[name].numel()
        torch.testing.assert_close(density.weights.sum(1), torch.ones(1).double())
