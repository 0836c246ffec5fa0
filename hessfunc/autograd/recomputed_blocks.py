"""Blocks of a model whose activations are recomputed."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hessfunc.autograd.functorch import is_wrapped
from hessfunc.autograd.recompute import recomputed
from hessfunc.autograd.stateless import call_with
from hessfunc.containers import tensors_in
from hessfunc.copies import OF_EVERY_MODULE
from hessfunc.selection import first_of
from hessfunc.trees import Tree, leaves

# Function that borrows a copy of a model, which no other evaluation uses meanwhile.
Borrow: TypeAlias = Callable[[], AbstractContextManager[nn.Module]]


class Segment(nn.Module):
    """Forward of a module without its hooks, which run outside of the recomputed part."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.inner = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class RecomputedBlock:
    """Forward of a module that recomputes its activations.

    Attributes:
        name: Name of the module in the model.
        segment: Forward of the module without its hooks.
        borrowed: Function that borrows another copy of the model, prepared alike. The module itself
            may be in use when its activations are recomputed.
    """

    name: str
    segment: Segment
    borrowed: Borrow

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_cache((args, kwargs))
        self._refuse_set_attributes()
        buffers = dict(self.segment.named_buffers())
        return recomputed(self._pure)(self.kept(), buffers, args, kwargs)

    def kept(self) -> Tree:
        """Return the tensors that the graph keeps, from which the parameters are computed."""
        return dict(self.segment.named_parameters())

    def parameters(self, kept: Tree, /) -> Mapping[str, Tensor]:
        """Return the parameters of the segment by name."""
        parameters: Mapping[str, Tensor] = kept
        return parameters

    def _pure(self, kept: Tree, buffers: Tree, args: Any, kwargs: Any) -> Any:
        # BatchNorm raises for running statistics that require a gradient, so detach them.
        # Finite differences must not record them as constants of the loss.
        with torch._C.DisableTorchFunction():
            fixed = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        state = {**self.parameters(kept), **fixed}
        with self.borrowed() as model:
            block = model.get_submodule(self.name).forward
            assert isinstance(block, RecomputedBlock)
            with block._warning_of_set_attributes():
                return call_with(block.segment, state, args, kwargs)

    def _refuse_set_attributes(self) -> None:
        """Raise if a tensor that carries a derivative was set on the module from outside."""
        found = dict(_attributes(self.segment.module))
        if not found:
            return
        with self.borrowed() as model:
            known = {id(x) for _, x in _attributes(model.get_submodule(self.name))}
        for attribute, x in found.items():
            if id(x) not in known:
                raise NotImplementedError(
                    f"attribute {attribute!r} of the recomputed block {self.name!r} was set "
                    "outside of the block, and its derivative would be lost: pass it to the "
                    "forward as an argument, or choose a larger block that sets it"
                )

    @contextmanager
    def _warning_of_set_attributes(self) -> Iterator[None]:
        """Context manager that warns if the forward of the module sets attributes."""
        before = {id(x) for _, x in _attributes(self.segment.module)}
        yield
        for attribute, x in _attributes(self.segment.module):
            if id(x) not in before:
                warnings.warn(
                    f"the recomputed block {self.name!r} sets its attribute {attribute!r}, which "
                    "does not change outside of the block: return the value if the model uses it",
                    stacklevel=2,
                )
                return


def recompute_inside(
    model: nn.Module,
    borrowed: Borrow,
    /,
    names: Iterable[str],
    block: Callable[[str, Segment, Borrow], RecomputedBlock] = RecomputedBlock,
) -> None:
    """Replace the forward of some modules by one that recomputes its activations.

    Args:
        model: Copy of a model.
        borrowed: Function that borrows another copy, prepared alike.
        names: Names of the modules.
        block: Function that makes the new forward of a module.

    A call with a key-value cache raises ValueError.
    """
    for name in names:
        module = model.get_submodule(name)
        module.forward = block(name, Segment(module), borrowed)


def segments_of(model: nn.Module, pattern: str, /) -> list[str]:
    """Return the names of the outermost modules whose names match a glob.

    Raises:
        ValueError: If no module matches.
    """
    segments: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in segments)
        if name and not inside and fnmatch.fnmatchcase(name, pattern):
            segments.append(name)
    if not segments:
        raise no_module(f"recompute={pattern!r}", model)
    return segments


def no_module(choice: str, model: nn.Module, /) -> ValueError:
    """Return the error for a choice that matches no submodule."""
    if names := [name for name, _ in model.named_modules() if name]:
        return ValueError(f"{choice} chooses none of the modules {first_of(names)}")
    return ValueError(
        f"{choice} chooses nothing, because a bare {type(model).__name__} has no submodules: "
        "wrap it, `torch.nn.Sequential(model)`"
    )


def _attributes(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in attributes of modules that carry a derivative, with their names."""
    for path, module in block.named_modules():
        # Hooks before the forward of a module set attributes for that forward.
        if module is not block and module._forward_pre_hooks:
            continue
        for key, value in vars(module).items():
            # Recurrent layers of torch have their parameters in a list as well.
            if key not in OF_EVERY_MODULE and key != "_flat_weights":
                for x in tensors_in(value):
                    if x.requires_grad or is_wrapped(x):
                        yield f"{path}.{key}".lstrip("."), x


def _refuse_cache(arguments: Any) -> None:
    """Raise if a module that is to be recomputed gets a key-value cache."""
    if any(type(leaf).__name__.endswith("Cache") for leaf in leaves(arguments)):
        raise ValueError(
            "the model uses a key-value cache, which recomputation would fill twice: set "
            "`model.config.use_cache = False`"
        )
