"""Spectra of diagonal blocks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.cases import case
from tests.models.nets import (
    ATTENTION,
    IGNORED,
    Attention,
    bert,
    gpt2,
    images,
    llama,
    loss_of,
    places,
    text,
    tolerance,
    vit,
)
from tests.reference import gauss_newton, hessian, matrix, relative_error, rows


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model", [gpt2, llama, bert, vit])
def test_blocks_of_vectors_have_the_products_of_single_ones(
    model: Any, attention: Attention
) -> None:
    loss, params = loss_of(model(attention))
    batch = images(2) if model is vit else text((5, 3), masked=model is bert)
    v = hf.random_like(params, 4, seed=0)
    for curvature in (hf.hvp, hf.ggnvp):
        one, all_at_once = (curvature(loss, chunk_size=c)(params, batch)(v) for c in (1, 4))
        assert relative_error(rows(all_at_once), rows(one)) < tolerance(model, attention)


def all_eigenvalues(matvec: Any, like: Any) -> Tensor:
    """Of a small matrix, by its products with the identity."""
    dense = matrix(matvec, like)
    return torch.linalg.eigvalsh((dense + dense.mT) / 2)


def own_eigenvalues(dense: Tensor, params: Mapping[str, Tensor], chosen: list[str]) -> Tensor:
    at = places(params, dict.fromkeys(chosen, ...))
    return torch.linalg.eigvalsh(dense[at][:, at])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (None, {n: [n] for n in ("0.weight", "0.bias", "2.weight", "2.bias")}),
        (["0.*", "2.bias"], {"0.*": ["0.weight", "0.bias"], "2.bias": ["2.bias"]}),
        (
            {"biases": ["0.bias", "2.bias"], "matrices": lambda name, leaf: leaf.dim() == 2},
            {"biases": ["0.bias", "2.bias"], "matrices": ["0.weight", "2.weight"]},
        ),
    ],
    ids=["each leaf", "globs", "groups"],
)
@pytest.mark.parametrize(
    ("curvature", "dense"), [(hf.hvp, hessian), (hf.ggnvp, gauss_newton)], ids=["hvp", "ggnvp"]
)
def test_block_spectra_are_the_eigenvalues_of_the_dense_blocks(
    curvature: Any, dense: Any, blocks: Any, expected: dict[str, list[str]]
) -> None:
    found = case("mlp")
    inputs, targets = found.batch
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    seen: list[str] = []
    spectra = hf.block_spectra(
        found.loss,
        found.params,
        batches,
        blocks=blocks,
        curvature=curvature,
        algorithm=all_eigenvalues,
        callback=lambda name, _: seen.append(name),
    )
    assert list(spectra) == list(expected) == seen
    whole = dense(found.loss, found.params, found.batch)
    for name, chosen in expected.items():
        torch.testing.assert_close(
            spectra[name], own_eigenvalues(whole, found.params, chosen), rtol=1e-8, atol=1e-10
        )


def test_block_spectra_of_all_layers_of_a_model_by_lanczos_and_by_default() -> None:
    loss, params = loss_of(vit("sdpa"))
    blocks = {f"layer {i}": f"vit.encoder.layer.{i}.attention.*" for i in range(2)}
    batches = [images(2), images(3)]
    top = hf.block_spectra(
        loss, params, batches, blocks=blocks, algorithm=functools.partial(hf.lanczos, k=1, seed=0)
    )
    densities = hf.block_spectra(loss, params, batches[:1], blocks=blocks)
    for name, pattern in blocks.items():
        part, rest = hf.split(params, pattern)
        held = hf.hold(loss, rest)
        dense = sum(len(b["labels"]) * hessian(held, part, b) for b in batches) / 5
        assert isinstance(dense, Tensor)
        values = torch.linalg.eigvalsh(dense)
        largest = values[values.abs().argmax()]
        torch.testing.assert_close(top[name].values[0], largest, rtol=1e-6, atol=1e-9)
        assert densities[name].n == len(values)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["0.*", "5.*"], r"'5\.\*' chooses none of the leaves 0\.weight"),
        ({"named": ["0.weight", "7.bias"]}, r"no leaf named 7\.bias"),
    ],
)
def test_blocks_that_choose_nothing_are_refused_before_any_work(blocks: Any, message: str) -> None:
    def never(*_: Any) -> None:
        pytest.fail("a block was computed")

    found = case("mlp")
    with pytest.raises(ValueError, match=message):
        hf.block_spectra(found.loss, found.params, [found.batch], blocks=blocks, algorithm=never)


def test_block_spectra_take_no_iterator() -> None:
    found = case("mlp")
    with pytest.raises(TypeError, match="read only once"):
        hf.block_spectra(found.loss, found.params, iter([found.batch]))


def test_blocks_of_a_language_model_are_weighted_by_tokens() -> None:
    loss, params = loss_of(gpt2("eager"))
    whole = text((6, 4, 2), masked=False)
    parts = [{n: entry[rows] for n, entry in whole.items()} for rows in (slice(1), slice(1, 3))]
    blocks = ["*.h.0.ln_1.*"]

    def tokens(batch: Mapping[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def largest(batches: list[dict[str, Tensor]], **options: Any) -> Tensor:
        algorithm = functools.partial(hf.lanczos, k=2, seed=0, rtol=1e-8)
        found = hf.block_spectra(
            loss, params, batches, blocks=blocks, algorithm=algorithm, **options
        )
        return found[blocks[0]].values

    expected = largest([whole])
    for keep in (False, True):
        torch.testing.assert_close(largest(parts, weight=tokens, keep=keep), expected)
    # The targets of torch's cross-entropy are counted without a weight, too.
    torch.testing.assert_close(largest(parts), expected)
    assert not torch.allclose(largest(parts, weight=hf.examples), expected, rtol=1e-3)
