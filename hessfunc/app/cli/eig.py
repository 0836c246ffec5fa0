"""Command ``hessfunc eig``, which computes the top eigenvalues of a saved network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from hessfunc.app.cli.progress import Bars, bar
from hessfunc.app.cli.ranks import mesh_of_all, on_all, place
from hessfunc.app.cli.trained import trained
from hessfunc.app.terminal import Output, table

if TYPE_CHECKING:
    from torch import nn

    from hessfunc.algorithms.results import Eigenpairs
    from hessfunc.training.examples import Examples

_EXAMPLES_OF_ONE_BATCH = 200


def eig(
    resume: Path,
    data: str | None = None,
    arch: str | None = None,
    depth: int | None = None,
    kind: str = "approximate",
    k: int = 1,
    rtol: float = 1e-3,
    max_matvecs: int = 200,
    examples: int | None = None,
    batch_size: int = 500,
    data_path: Path | None = None,
    device: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Output:
    """Compute the Hessian eigenvalues of largest absolute value of a saved network.

    The loss is the mean cross-entropy over training examples, at the saved parameters, in eval
    mode. Each value is printed with its residual |A v - value v|: some eigenvalue of the Hessian
    lies within this distance of the value.

    A checkpoint of hessfunc train contains the names of its network and its data set, and the
    number of its training examples.
    """
    saved = trained(resume, data=data, data_path=data_path, arch=arch, depth=depth)
    at_most = (saved.examples, _EXAMPLES_OF_ONE_BATCH if kind == "approximate" else None)
    count = examples or min(filter(None, at_most), default=None)

    from torch.nn.functional import cross_entropy

    import hessfunc as hf
    from hessfunc.app import tasks

    torch_device, _ = place(device)
    with mesh_of_all(torch_device) as (mesh, torch_device), Bars(quiet=quiet) as progress:

        def make() -> tuple[nn.Module, Examples]:
            model = tasks.saved(saved.data, saved.arch, resume).to(torch_device).eval()
            seen, _ = tasks.examples(
                saved.data, path=saved.data_path, count=count, device=torch_device
            )
            return model, seen

        model, seen = on_all(mesh, make)
        model_fn, params = hf.functional(model)
        loss = hf.supervised(model_fn, cross_entropy)
        ranks = 1 if mesh is None else mesh.size()
        batches = seen.batches(min(batch_size, math.ceil(len(seen) / ranks)))
        matvec = hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches)
        tick = bar(progress, f"{k} eigenvalue{'s' * (k > 1)} of {len(seen)} examples")
        pairs = hf.lanczos(
            matvec,
            params,
            k=k,
            rtol=rtol,
            max_matvecs=max_matvecs,
            seed=seed,
            space=None if mesh is None else hf.sharded(params, mesh),
            callback=lambda running: tick(
                running.matvecs / max_matvecs, f"largest {running.largest:.4g}"
            ),
        )
    ended = f"{len(seen):,} examples, {pairs.matvecs} products; {pairs.reason}"
    return Output(
        (_table(pairs), ended),
        {
            "data": saved.data,
            "arch": saved.arch,
            "examples": len(seen),
            **pairs.to_dict(vectors=False),
        },
    )


def _table(pairs: Eigenpairs) -> Table:
    columns = zip(pairs.values, pairs.residuals, pairs.converged, strict=True)
    rows = (
        (str(i), f"{float(value):.6g}", f"{float(residual):.1e}", "yes" if converged else "no")
        for i, (value, residual, converged) in enumerate(columns, start=1)
    )
    return table(("", "eigenvalue", "residual", "converged"), rows, left=0)
