"""Small vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) with mean pooling."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.app.problems.gpt import Layer, SelfAttention


class _Attention(SelfAttention):
    """Self-attention without a mask: every patch attends to every patch."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class _Layer(Layer):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.attention = _Attention(width, heads)


class ViT(nn.Module):
    """ViT: images ``[N, channels, size, size]`` -> logits ``[N, classes]``, learned positions.

    The defaults give 10,694,794 parameters.
    """

    def __init__(
        self,
        size: int = 32,
        patch: int = 4,
        channels: int = 3,
        classes: int = 10,
        width: int = 384,
        layers: int = 6,
        heads: int = 6,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Embedding((size // patch) ** 2, width)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions.weight
        return self.head(self.norm(self.layers(x)).mean(1))
