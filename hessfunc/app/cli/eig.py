"""Command ``hessfunc eig``, which computes the top eigenvalues of a saved network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hessfunc.app.cli.options import (
    Device,
    Traceback,
    TrainedArch,
    TrainedDataPath,
    TrainedDepth,
    TrainedOn,
    fail,
    in_one_line,
    option,
    place,
    refuse_seed,
)
from hessfunc.app.cli.progress import bar, bars, print_table
from hessfunc.app.cli.ranks import mesh_of_all, on_all, speaks
from hessfunc.app.cli.trained import trained

if TYPE_CHECKING:
    from torch import nn

    from hessfunc.algorithms.results import Eigenpairs
    from hessfunc.training.examples import Examples

_EXAMPLES_OF_ONE_BATCH = 200


def eig(
    resume: Annotated[
        Path,
        option(
            "FILE",
            "Saved network: checkpoint.pt of hessfunc train, or any file of torch.save with "
            "a state dict.",
        ),
    ],
    data: TrainedOn = None,
    arch: TrainedArch = None,
    depth: TrainedDepth = None,
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="NAME",
            help="Hessian to analyse: approximate (one batch) or full (all training examples).",
        ),
    ] = "approximate",
    k: Annotated[int, option("N", "Number of eigenvalues.", min=1)] = 1,
    rtol: Annotated[
        float,
        option("X", "Tolerance: relative residual of each eigenvalue.", min=0),
    ] = 1e-3,
    max_matvecs: Annotated[
        int,
        option(
            "N", "Stop after N matrix-vector products, even if the tolerance is not reached.", min=2
        ),
    ] = 200,
    examples: Annotated[
        int | None,
        option(
            "N",
            "Use the first N training examples.",
            default=f"those of the training, with approximate at most {_EXAMPLES_OF_ONE_BATCH}",
            panel="Data",
            min=1,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        option("N", "Examples per batch; limits the memory.", panel="Data", min=1),
    ] = 500,
    data_path: TrainedDataPath = None,
    device: Device = None,
    seed: Annotated[int, option("N", "Seed of the start vector.")] = 0,
    traceback: Traceback = False,
) -> None:
    """Compute the Hessian eigenvalues of largest absolute value of a saved network.

    The loss is the mean cross-entropy over training examples, at the saved parameters, in eval
    mode. Each value is printed with its residual |A v - value v|: some eigenvalue of the Hessian
    lies within this distance of the value.

    A checkpoint of hessfunc train contains the names of its network and its data set, and the
    number of its training examples.
    """
    try:
        refuse_seed(seed)
        if kind not in ("approximate", "full"):
            raise ValueError(f"--type must be approximate or full, not {kind!r}")
        saved = trained(resume, data=data, data_path=data_path, arch=arch, depth=depth)
        at_most = (saved.examples, _EXAMPLES_OF_ONE_BATCH if kind == "approximate" else None)
        count = examples or min(filter(None, at_most), default=None)

        from torch.nn.functional import cross_entropy

        import hessfunc as hf
        from hessfunc.app import tasks

        torch_device, _ = place(device)
        with mesh_of_all(torch_device) as (mesh, torch_device), bars() as progress:

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

            def on_round(running: Eigenpairs) -> None:
                tick(running.matvecs / max_matvecs, f"largest {running.largest:.4g}")

            pairs = hf.lanczos(
                matvec,
                params,
                k=k,
                rtol=rtol,
                max_matvecs=max_matvecs,
                seed=seed,
                space=None if mesh is None else hf.sharded(params, mesh),
                callback=on_round,
            )
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error), alone=isinstance(error, ConnectionError))

    if not speaks():
        return
    console = Console(markup=False, emoji=False)
    print_table(console, _table(pairs))
    console.print(
        f"{len(seen):,} examples, {pairs.matvecs} products; {pairs.reason}", highlight=False
    )


def _table(pairs: Eigenpairs) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "eigenvalue", "residual", "converged"):
        table.add_column(column, justify="right")
    columns = zip(pairs.values, pairs.residuals, pairs.converged, strict=True)
    for i, (value, residual, converged) in enumerate(columns, start=1):
        cells = f"{float(value):.6g}", f"{float(residual):.1e}", "yes" if converged else "no"
        table.add_row(str(i), *cells)
    return table
