"""Traces layer by layer, of the Hessian of what layers read and of that of their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hessfunc.algorithms.results import Estimate
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.compat.place import seed_of_stream
from hessfunc.compat.pyhessian.mean_loss import MeanLoss
from hessfunc.losses import hold
from hessfunc.modules import eval_mode
from hessfunc.selection import split
from hessfunc.spaces.of import space_of
from hessfunc.transforms.activations import activations
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import Matvec, Tree, tree_map


class hessian_with_activation(MeanLoss):  # noqa: N801
    """The Hessians of a mean loss with respect to what layers read, and to their weights.

    Arguments and attributes are those of `MeanLoss`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._endings: list[str] = []

    def insert_hook(self, module_name: str) -> None:
        """Choose the layers, modules without children, whose name ends with this.

        No hook stays on the model.

        Raises:
            ValueError: there is none.
        """
        layers = [name for name, module in self.module.named_modules() if _is_layer(module)]
        if not any(name.endswith(module_name) for name in layers):
            raise ValueError(f"the name of no layer ends with {module_name!r}: {', '.join(layers)}")
        self._endings.append(module_name)

    def trace_activ(self, maxIter: int = 100, tol: float = 1e-3) -> list[list[float]]:
        """Samples of the trace of the Hessian with respect to what each chosen layer reads.

        With random signs z over the activations of all of them at once, ``z_l'(Hz)_l``. Each layer
        alone sees its perturbation, so that H is symmetric on skip paths too. A batch has
        activations of its own, and the last one may be smaller.

        Args:
            maxIter: samples at the most; at least two are drawn.
            tol: enough when the half-width of the 95 % interval of the sum over layers is below
                tol times that sum; 0 or less for ``maxIter`` samples.

        Returns:
            A list over samples of lists over layers, in the order of the model's modules, which
            ``results["trace_activ"].by_leaf`` names.

        Raises:
            ValueError: no layer is chosen, or a batch has more examples than the first.
        """
        self.results["trace_activ"], samples = _sampled(*self._of_activations(), maxIter, tol)
        return samples

    def trace(
        self, maxIter: int = 100, tol: float = 1e-3, param_name: str = "conv.weight"
    ) -> list[list[float]]:
        """The same of the Hessian with respect to the parameters with ``param_name`` in their name.

        Raises:
            ValueError: there is none.
        """
        loss, params = self.loss()
        if not any(param_name in name for name in params):
            raise ValueError(
                f"the name of no parameter contains param_name={param_name!r}: {', '.join(params)}"
            )
        chosen, rest = split(params, lambda name, _: param_name in name)
        matvec = self.over_data(hvp(hold(loss, rest)))(chosen, self.data)
        self.results["trace"], samples = _sampled(matvec, chosen, maxIter, tol)
        return samples

    def _of_activations(self) -> tuple[Matvec, Tree]:
        """The Hessian, and the activations of the first batch, as zeros."""
        if not self._endings:
            raise ValueError("no layer is chosen: call insert_hook('conv') first")
        with eval_mode(self.module):
            loss, zeros = activations(self.module, self.criterion, self._is_chosen)
        first = next(iter(self.batches))
        most = examples(first)

        def of_batch(perturbations: Tree, batch: Any) -> Tensor:
            count = examples(batch)
            if count > most:
                raise ValueError(
                    f"a batch of {count} examples comes after a first one of {most}: the first "
                    "must be the largest"
                )
            inputs, targets = self.moved(batch)
            own = tree_map(lambda leaf: leaf[: len(leaf) * count // most], perturbations)
            return loss(own, ((inputs,), targets))

        like = zeros((self.moved(first)[0],))
        return self.over_data(hvp(of_batch))(like, self.data), like

    def _is_chosen(self, name: str, module: nn.Module) -> bool:
        return _is_layer(module) and name.endswith(tuple(self._endings))


def _is_layer(module: nn.Module) -> bool:
    return not any(module.children())


def _sampled(
    matvec: Matvec, like: Tree, most: int, rtol: float
) -> tuple[Estimate, list[list[float]]]:
    """The trace, and the samples of its parts leaf by leaf."""
    space = space_of(like)
    samples: list[list[float]] = []

    def watched(block: Tree) -> Tree:
        images = matvec(block)
        samples.extend(space.by_leaf(space.ravel(block), space.ravel(images)).tolist())
        return images

    estimate = hutchinson(
        watched,
        like,
        rtol=max(rtol, 0.0),
        max_matvecs=max(most, 2),
        kind="signs",
        seed=seed_of_stream(),
    )
    return estimate, samples
