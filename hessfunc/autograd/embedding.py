"""Embeddings with dense gradients that do not change their weights in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.constants import constant


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute ``F.embedding`` without sparse gradients and without changing its weights.

    ``max_norm`` rescales the returned rows instead of the rows of the weight, by factors that
    autograd treats as constant. ``scale_grad_by_freq`` is ignored, because the gradient that it
    produces is not the gradient of any function.
    """
    rows = F.embedding(input, weight, padding_idx)
    return rows if max_norm is None else rows + _rescaling(rows, max_norm, norm_type)


def padded_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute ``F.embedding`` with a constant row for ``padding_idx``.

    In reverse mode, `F.embedding` gives the row no gradient. In forward mode, the row would still
    have a tangent.
    """
    rows = _embedding(input, weight, None, max_norm, norm_type)
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % len(weight))[..., None]
    return torch.where(padding, constant(rows), rows)


def _embedding_of_torch(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute ``torch.embedding`` without sparse gradients."""
    return torch.embedding(weight, indices, padding_idx)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Compute ``F.embedding_bag`` without sparse gradients and without changing its weights.

    Sums and means are sums of lookups, which have second derivatives, unlike the kernel of torch.
    """
    if max_norm is not None:
        weight = weight + _rescaling_of(weight, input, max_norm, norm_type)
    if mode == "max" or (input.dim() == 1) != (offsets is not None):
        # A maximum has no second derivative, and other arguments are errors of torch.
        return F.embedding_bag(
            input, weight, offsets, mode=mode, include_last_offset=include_last_offset,
            per_sample_weights=per_sample_weights, padding_idx=padding_idx,
        )  # fmt: skip
    rows, counts = F.embedding(input, weight), torch.ones_like(input, dtype=weight.dtype)
    if padding_idx is not None:
        counts = (input != padding_idx % len(weight)).to(weight.dtype)
        rows = rows * counts[..., None]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    if offsets is None:
        total, count = rows.sum(1), counts.sum(1)
    else:
        ends = offsets[1:] if include_last_offset else offsets.new_tensor([len(input)])
        ends = ends if include_last_offset else torch.cat([offsets[1:], ends])
        places = torch.arange(len(input), device=input.device)
        bags = torch.searchsorted(ends, places, right=True)
        total = rows.new_zeros(len(ends), rows.shape[-1]).index_add(0, bags, rows)
        count = counts.new_zeros(len(ends)).index_add(0, bags, counts)
    return total / count.clamp_min(1)[:, None] if mode == "mean" else total


def pure_lookup() -> dict[Any, Any]:
    """Return the replacements of the functions that look up embeddings."""
    return {
        F.embedding: _embedding,
        torch.embedding: _embedding_of_torch,
        F.embedding_bag: _embedding_bag,
    }


def _rescaling(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Return the constant to add to rows so that their norms are at most ``max_norm``."""
    fixed = constant(rows)
    norms = torch.linalg.vector_norm(fixed, norm_type, dim=-1, keepdim=True)
    # torch adds the same 1e-7.
    scale = torch.where(norms > max_norm, max_norm / (norms + 1e-7), torch.ones_like(norms))
    return fixed * (scale - 1)


def _rescaling_of(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    used = torch.zeros(len(weight), 1, dtype=torch.bool, device=weight.device)
    used[indices.flatten()] = True
    return torch.where(used, _rescaling(weight, max_norm, norm_type), torch.zeros_like(weight))
