"""The parameters of a sharded module, whole on every rank."""

from __future__ import annotations

from torch import Tensor, nn

from hessfunc.options import validated
from hessfunc.trees import whole

__all__ = ["unsharded"]


@validated
def unsharded(model: nn.Module, /, *, trainable_only: bool = True) -> dict[str, Tensor]:
    """The parameters of a module of DTensors, such as `fully_shard` makes, whole on every rank.

    They have the names and the order of the module before it was sharded, and so are those of its
    twin, a module of the same class that has never been sharded:

        params = hf.unsharded(model)
        model_fn, _ = hf.functional(twin)
        loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
        matvec = hf.over_batches(hf.hvp(loss), mesh=mesh)(params, loader)
        hf.lanczos(matvec, params, k=10, space=hf.sharded(params, mesh))

    Buffers and frozen parameters are the twin's own: load them into it.

    Args:
        model: the module; every rank calls this.
        trainable_only: leave parameters that do not require a gradient out.

    Returns:
        Copies, which later steps of an optimiser do not change.

    Cost: n numbers on every rank, gathered once.
    """
    return {
        name: whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trainable_only
    }
