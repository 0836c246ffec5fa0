"""The command that finds the dominant eigenvalues of a net that was saved."""

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
    place,
    refuse_seed,
    unless_given,
)
from hessfunc.app.cli.progress import bars, watch
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
        typer.Option(
            metavar="FILE",
            help="The net: checkpoint.pt of hessfunc train, or any file of torch.save with a "
            "state dict.",
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
            help="approximate: on one batch; full: on all training examples.",
        ),
    ] = "approximate",
    k: Annotated[int, typer.Option(min=1, metavar="N", help="How many eigenvalues.")] = 1,
    rtol: Annotated[
        float, typer.Option(min=0, metavar="X", help="The relative residual that is small enough.")
    ] = 1e-3,
    max_matvecs: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="Products after which all is left as it is."),
    ] = 200,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given(
                "Take the first N training examples.",
                default=f"of those of the training, approximate {_EXAMPLES_OF_ONE_BATCH}, full all",
            ),
            rich_help_panel="Data",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="So many at once, as memory allows.", rich_help_panel="Data"
        ),
    ] = 500,
    data_path: TrainedDataPath = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the start.")] = 0,
    traceback: Traceback = False,
) -> None:
    """Find the eigenvalues of a net's Hessian that are largest in absolute value.

    The Hessian is that of the mean cross-entropy of training examples, at the saved parameters, in
    eval mode. Each eigenvalue has its residual |A v - value v|: some eigenvalue is as near as that.

    A checkpoint of hessfunc train knows its net, its data and how many examples it was trained on.
    """
    try:
        refuse_seed(seed)
        if kind not in ("approximate", "full"):
            raise ValueError(f"--type is approximate or full, not {kind!r}")
        of = trained(resume, data=data, data_path=data_path, arch=arch, depth=depth)
        at_most = (of.examples, _EXAMPLES_OF_ONE_BATCH if kind == "approximate" else None)
        count = examples or min(filter(None, at_most), default=None)

        from torch.nn.functional import cross_entropy

        import hessfunc as hf
        from hessfunc.app import tasks

        where, _ = place(device)
        with mesh_of_all(where) as (mesh, where), bars() as progress:

            def make() -> tuple[nn.Module, Examples]:
                model = tasks.saved(of.data, of.arch, resume).to(where).eval()
                seen, _ = tasks.examples(of.data, path=of.data_path, count=count, device=where)
                return model, seen

            model, seen = on_all(mesh, make)
            model_fn, params = hf.functional(model)
            loss = hf.supervised(model_fn, cross_entropy)
            ranks = 1 if mesh is None else mesh.size()
            batches = seen.batches(min(batch_size, math.ceil(len(seen) / ranks)))
            matvec = hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches)
            tick = watch(progress, f"{k} eigenvalue{'s' * (k > 1)} of {len(seen)} examples")

            def on_round(found: Eigenpairs) -> None:
                tick(found.matvecs / max_matvecs, f"largest {found.largest:.4g}")

            found = hf.lanczos(
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
    console.print(_table(found))
    console.print(
        f"{len(seen):,} examples, {found.matvecs} products; {found.reason}", highlight=False
    )


def _table(found: Eigenpairs) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "eigenvalue", "residual", "converged"):
        table.add_column(column, justify="right")
    pairs = zip(found.values, found.residuals, found.converged, strict=True)
    for i, (value, residual, converged) in enumerate(pairs, start=1):
        cells = f"{float(value):.6g}", f"{float(residual):.1e}", "yes" if converged else "no"
        table.add_row(str(i), *cells)
    return table
