"""The nets, each with as many examples as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.speed.device import device, on_device
from hessfunc.app.problems.data import cifar10, data_root
from hessfunc.app.problems.gpt import GPT
from hessfunc.app.problems.llama import stories260k, stories_batches
from hessfunc.app.problems.nets import digits_convnet, mlp
from hessfunc.app.problems.resnet import load_weights, resnet
from hessfunc.app.problems.vit import ViT
from hessfunc.randomness import seeded

Made = tuple[nn.Module, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its criterion and one batch.

    Attributes:
        title: for the table.
        attention: attention is in it, whose fused kernels have no second derivative.
    """

    title: str
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    attention: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The leaves, in the order of ``named_parameters``."""
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        """The loss, as a training loop writes it."""
        return self.criterion(self.model(self.inputs), self.targets)


@dataclass(frozen=True)
class Model:
    """How a net and its examples are made.

    Attributes:
        title: for the tables.
        examples: of a batch.
        make: the net, inputs and targets, by the number of examples.
        attention: it is in the net, and its fused kernels have no second derivative.
        block: the vectors of a block.
    """

    title: str
    examples: int
    make: Callable[[int], Made]
    attention: bool = False
    block: int = 16


def made(name: str, examples: int | None = None) -> Case:
    """A net with one batch, of its own number of examples or another; the same each time.

    Raises:
        FileNotFoundError: its weights or data are not there.
        ModuleNotFoundError: a library that it takes is not installed.
    """
    model = MODELS[name]
    with seeded(0):
        net, inputs, targets = model.make(examples or model.examples)
    net.eval().to(device())
    batch = on_device(inputs), on_device(targets)
    return Case(model.title, net, F.cross_entropy, *batch, attention=model.attention)


def batches_of(case: Case, count: int) -> list[tuple[Tensor, Tensor]]:
    """A batch cut into so many of one size."""
    parts = (x.chunk(count) for x in (case.inputs, case.targets))
    return list(zip(*parts, strict=True))


class _Tokens(nn.Module):
    """A language model with the logits of all tokens in one axis, as cross-entropy takes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.model(tokens)
        return (found if isinstance(found, Tensor) else found.logits).flatten(0, 1)


def _perceptron(*widths: int) -> Callable[[int], Made]:
    def make(examples: int) -> Made:
        return mlp(widths), torch.randn(examples, widths[0]), torch.randint(10, (examples,))

    return make


def _gpt(examples: int) -> Made:
    return _Tokens(GPT()), *_next(torch.randint(512, (examples, 65)))


def _next(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


def _resnet20(examples: int) -> Made:
    return resnet(20), torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,))


def _trained_resnet20(examples: int) -> Made:
    weights = load_weights(_data() / "resnet20_cifar10" / "resnet20-12fca82f.th")
    net, images = resnet(20), cifar10(_data())[:examples]
    net.load_state_dict(weights)
    return net, images.inputs, images.targets


def _stories260k(examples: int) -> Made:
    net = stories260k(_data() / "stories260K" / "stories260K_torch.npz")
    stories = stories_batches(_data() / "stories260K" / "tinystories_sample_ids.npz")
    tokens = torch.cat([story["input_ids"][:, :129] for story in stories[:examples]])
    return _Tokens(net), *_next(tokens)


def _vit(examples: int) -> Made:
    return ViT(), torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,))


def _llama(examples: int) -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="eager",
    )
    return _Tokens(LlamaForCausalLM(config)), *_next(torch.randint(512, (examples, 65)))


class _Last(nn.Module):
    """An LSTM's logits of the last step: ``[N, T, 32]`` -> ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.recurrent(sequences)[0][:, -1])


def _lstm(examples: int) -> Made:
    return _Last(), torch.randn(examples, 16, 32), torch.randint(10, (examples,))


def _conv_small(examples: int) -> Made:
    return digits_convnet(), torch.randn(examples, 1, 8, 8), torch.randint(10, (examples,))


def _gpt_tiny(examples: int) -> Made:
    net = GPT(vocabulary=64, context=16, width=32, layers=2, heads=2)
    return _Tokens(net), *_next(torch.randint(64, (examples, 17)))


def _data() -> Path:
    root = data_root()
    if root is None:
        raise FileNotFoundError("HESSFUNC_DATA is not set")
    return root


MODELS: dict[str, Model] = {
    "mlp-small": Model("MLP 64-32-10, batch 64", 64, _perceptron(64, 32, 10)),
    "mlp-wide": Model("MLP 784-256-256-10, batch 256", 256, _perceptron(784, 256, 256, 10)),
    "gpt": Model("GPT 4 x 128, T = 64, batch 8", 8, _gpt, attention=True),
    "resnet20": Model("ResNet-20, random weights and images, batch 64", 64, _resnet20, block=8),
    "resnet20-trained": Model(
        "ResNet-20, trained, CIFAR-10, batch 64", 64, _trained_resnet20, block=8
    ),
    "stories260k": Model("stories260K, T = 128, batch 4", 4, _stories260k),
    "vit": Model("ViT 6 x 384, 64 patches, batch 4", 4, _vit, attention=True),
    "llama": Model("Llama 6 x 384, T = 64, batch 4", 4, _llama),
    # The rule for chunks was made without the last two, and is tried on them.
    "lstm": Model("LSTM 32-64, T = 16, batch 16", 16, _lstm),
    "conv-small": Model("conv net 16-32, 8 x 8 images, batch 32", 32, _conv_small),
    "gpt-tiny": Model("GPT 2 x 32, T = 16, batch 4", 4, _gpt_tiny, attention=True),
}
