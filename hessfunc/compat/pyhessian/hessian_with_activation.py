"""Traces by layer of the Hessian with respect to activations, and with respect to weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.algorithms.results import Estimate
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.compat.place import seed_of_stream
from hessfunc.compat.pyhessian.hessian import hessian
from hessfunc.compat.pyhessian.vectors import group_product, refuse_unlike
from hessfunc.losses import hold
from hessfunc.options import flag, real, tensors, text, validated
from hessfunc.selection import split
from hessfunc.spaces.of import space_of
from hessfunc.training_mode import eval_mode
from hessfunc.transforms.activations import activations
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.evaluation import gradient_of
from hessfunc.transforms.hessian import hvp
from hessfunc.transforms.matvecs.arithmetic import apply
from hessfunc.trees import Matvec, Tree, tree_map


class hessian_with_activation(hessian):  # noqa: N801
    """Hessians of a mean loss with respect to the inputs of layers, and to their weights.

    Arguments and attributes are those of `hessian`.

    Attributes:
        activations: Inputs of each chosen layer in the first batch, a list by name of the layer,
            from ``get_activ_rand_v(dont_reset=True)``.
        activation_grads: Gradients of the loss of the first batch with respect to ``activations``,
            with their graph.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._endings: list[str] = []
        self.activations: dict[str, list[Tensor]] = {}
        self.activation_grads: dict[str, list[Tensor]] = {}

    @validated(module_name=text)
    def insert_hook(self, module_name: str) -> None:
        """Choose all layers (modules without children) whose name ends with ``module_name``.

        No hook is registered on the model.

        Raises:
            ValueError: If no layer has such a name.
        """
        layers = [name for name, module in self.module.named_modules() if _is_layer(module)]
        if not any(name.endswith(module_name) for name in layers):
            raise ValueError(
                f"no layer name ends with {module_name!r}: the layers are {', '.join(layers)}"
            )
        self._endings.append(module_name)

    @validated(show_layer=flag, dont_reset=flag)
    def get_activ_rand_v(self, show_layer: bool = False, dont_reset: bool = False) -> list[Tensor]:
        """Draw random signs like the inputs of the chosen layers in the first batch.

        Args:
            show_layer: Whether to print the name and the shapes of each layer.
            dont_reset: Whether ``activations`` and ``activation_grads`` keep their tensors.

        Returns:
            One tensor for each input, in the order of the model's modules.

        Raises:
            ValueError: If no layer is chosen.
        """
        inputs, _ = self.get_same_size_activ_grad(show_layer=show_layer, dont_reset=dont_reset)
        return [torch.randint_like(x, high=2) * 2 - 1 for x in inputs]

    @validated(show_layer=flag, dont_reset=flag)
    def get_same_size_activ_grad(
        self, show_layer: bool = False, dont_reset: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Evaluate the first batch, and return the inputs of the chosen layers and their gradients.

        Arguments and errors are those of `get_activ_rand_v`.
        """
        _, like = self._of_activations()
        inputs, targets = self.moved(next(iter(self.batches)))
        seen: dict[str, list[Tensor]] = {name: [] for name, _ in like}
        with eval_mode(self.module), _observing(self.module, seen), torch.enable_grad():
            loss = self.criterion(self.module(inputs), targets)
        self.activations = seen
        found = [x for each in seen.values() for x in each]
        gradients = gradient_of(loss, found, create_graph=True)
        left = iter(gradients)
        self.activation_grads = {name: [next(left) for _ in each] for name, each in seen.items()}
        if show_layer:
            for name, each in seen.items():
                for x, gradient in zip(each, self.activation_grads[name], strict=True):
                    print(
                        f"append {name}, active size : {x.shape}, "
                        f"active grad size : {gradient.shape}"
                    )
        if not dont_reset:
            self.reset_reg_active()
        return found, gradients

    def reset_reg_active(self) -> None:
        """Empty the lists of ``activations`` and ``activation_grads``."""
        self.activations = {name: [] for name in self.activations}
        self.activation_grads = {name: [] for name in self.activation_grads}

    @validated(active_v=tensors)
    def dataloader_activation_hv_product(
        self, active_v: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        """Return ``v'Hv`` and ``Hv`` for a vector like `get_activ_rand_v`.

        Raises:
            ValueError: If no layer is chosen, or if the vector has other shapes.
        """
        matvec, like = self._of_activations()
        refuse_unlike(list(like.values()), active_v=active_v)
        product = list(apply(matvec, dict(zip(like, active_v, strict=True))).values())
        return float(group_product(product, active_v)), product

    @validated(tol=real)
    def trace_activ(self, maxIter: int = 100, tol: float = 1e-3) -> list[list[float]]:
        """Sample the trace of the Hessian with respect to the input of each chosen layer.

        A sample for layer l is ``z_l'(Hz)_l``, with random signs z on the activations of all chosen
        layers. A perturbation acts on its own layer only, so that H is symmetric on skip paths too.
        Each batch has its own activations, and the last batch may be smaller.

        Args:
            maxIter: Largest number of samples; at least two are drawn.
            tol: Relative tolerance: stop when the half-width of the 95 % interval of the sum over
                layers is below ``tol`` times that sum. 0 or less draws ``maxIter`` samples.

        Returns:
            A list over samples of lists over layers, in the order of the model's modules. The names
            of the layers are in ``results["trace_activ"].by_leaf``.

        Raises:
            ValueError: If no layer is chosen, or if a batch has more examples than the first.
        """
        self.results["trace_activ"], samples = _sampled(*self._of_activations(), maxIter, tol)
        return samples

    @validated(tol=real, param_name=text)
    def trace(  # type: ignore[override]
        self, maxIter: int = 100, tol: float = 1e-3, param_name: str = "conv.weight"
    ) -> list[list[float]]:
        """Sample the trace of the Hessian for each parameter whose name contains ``param_name``.

        Args:
            maxIter: Largest number of samples, as in `trace_activ`.
            tol: Relative tolerance, as in `trace_activ`.
            param_name: Part of the names of the parameters.

        Returns:
            A list over samples of lists over parameters.

        Raises:
            ValueError: If no parameter has such a name.
        """
        loss, params = self.loss()
        if not any(param_name in name for name in params):
            raise ValueError(
                f"no parameter name contains param_name={param_name!r}: the parameters are "
                f"{', '.join(params)}"
            )
        chosen, rest = split(params, lambda name, _: param_name in name)
        matvec = self.over_data(hvp(hold(loss, rest)))(chosen, self.data)
        self.results["trace"], samples = _sampled(matvec, chosen, maxIter, tol)
        return samples

    def _of_activations(self) -> tuple[Matvec, Tree]:
        """Return the matvec of the Hessian, and zeros like the activations of the first batch."""
        if not self._endings:
            raise ValueError("no layer is chosen: call `insert_hook('conv')` first")
        with eval_mode(self.module):
            loss, zeros = activations(self.module, self.criterion, self._is_chosen)
        first = next(iter(self.batches))
        most = examples(first)

        def of_batch(perturbations: Tree, batch: Any) -> Tensor:
            count = examples(batch)
            if count > most:
                raise ValueError(
                    f"a batch of {count} examples follows a first batch of {most}: the first batch "
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


@contextmanager
def _observing(model: nn.Module, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Context manager that appends the input of each layer in ``seen``, as part of the graph."""

    def of_layer(name: str) -> Callable[[nn.Module, Any], Any]:
        def observe(_: nn.Module, inputs: Any) -> Any:
            x = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            seen[name].append(x)
            return (x, *inputs[1:])

        return observe

    handles = [model.get_submodule(name).register_forward_pre_hook(of_layer(name)) for name in seen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sampled(
    matvec: Matvec, like: Tree, most: int, rtol: float
) -> tuple[Estimate, list[list[float]]]:
    """Estimate the trace, and return the estimate with the samples of each leaf."""
    space = space_of(like)
    samples: list[list[float]] = []

    def watched(block: Tree) -> Tree:
        # A sample of leaf l is z_l' (H z)_l, for each vector z of the block.
        products = matvec(block)
        samples.extend(space.by_leaf(space.ravel(block), space.ravel(products)).tolist())
        return products

    estimate = hutchinson(
        watched,
        like,
        rtol=max(rtol, 0.0),
        max_matvecs=max(most, 2),
        kind="signs",
        seed=seed_of_stream(),
    )
    return estimate, samples
