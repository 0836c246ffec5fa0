"""The command that trains a net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hessfunc.cli.errors import fail, in_one_line
from hessfunc.cli.places import make_folder, place
from hessfunc.cli.progress import bars, line, share, watch

if TYPE_CHECKING:
    from hessfunc.training.history import Run
    from hessfunc.training.methods import Method

__all__ = ["train"]

_DATA = "Data"
_SGD = "--optimizer sgd"
_NEWTON = "--optimizer newton"

# What the settings of Newton's method are called here.
_OPTIONS = {
    "curvature": "--curvature",
    "alpha": "--alpha",
    "solve": "--solve",
    "max_matvecs": "--cg-max",
    "rtol": "--cg-rtol",
    "atol": "--cg-atol",
    "max_blocks": "--max-blocks",
}


def train(
    data: Annotated[
        str,
        typer.Option(metavar="NAME", help="digits or cifar10.", rich_help_panel=_DATA),
    ] = "digits",
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of digits: mlp, convnet; of cifar10: mlp, chen, c4d3, c3d3.",
            show_default="mlp",
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="sgd or newton.")] = "newton",
    curvature: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="hbp-none, hbp-zero, hbp-clip, hbp-abs; pch-none, pch-zero, pch-clip, pch-abs; "
            "ggn; hessian; kfra; kflr; kfac; ekfac.",
            show_default="hbp-abs",
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the examples.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Examples a step.")] = 100,
    lr: Annotated[float, typer.Option(min=0, metavar="X", help="The learning rate.")] = 0.1,
    momentum: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help="The share of the last step that is kept.",
            show_default="0.9",
            rich_help_panel=_SGD,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help="How much of the identity is mixed into the curvature.",
            show_default="0.02",
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="cg, or direct with the inverse of the blocks' factors.",
            show_default="cg",
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_max: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Products after which a parameter's equation is left as it is.",
            show_default="50",
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_rtol: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="The relative residual that is small enough.",
            show_default="0.1",
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_atol: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="The absolute residual that is small enough.",
            show_default="0",
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    max_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Cut the curvature of each layer into so many blocks (hbp).",
            show_default="one",
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train on the first N examples, and test on N at most.",
            show_default="all",
            rich_help_panel=_DATA,
        ),
    ] = None,
    data_path: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="CIFAR-10: the folder cifar-10-batches-py or an .npz file.",
            show_default="in $HESSFUNC_DATA",
            rich_help_panel=_DATA,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="End after so much time of steps."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Train there: cpu, cuda, cuda:1, mps.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights, batches and draws.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the results.")] = Path(
        "hessfunc-train"
    ),
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error was raised.")
    ] = False,
) -> None:
    """Train a small net with SGD, or with Newton's method on blocks of its curvature.

    Shows loss and accuracy after each epoch, and writes history.json and history.png: both against
    epochs and against gradient-equivalents, the work in units of one gradient. Ctrl-C leaves what
    is finished.
    """
    if data not in ("digits", "cifar10"):
        fail(f"--data is digits or cifar10, not {data!r}")
    if data == "digits" and data_path is not None:
        fail("--data-path goes with --data cifar10 alone")
    values = (curvature, alpha, solve, cg_max, cg_rtol, cg_atol, max_blocks)
    of_newton = dict(zip(_OPTIONS, values, strict=True))

    from hessfunc.training import tasks
    from hessfunc.training.curves import draw
    from hessfunc.training.history import write
    from hessfunc.training.runs import run
    from hessfunc.training.table import table

    net = arch or "mlp"
    running: list[Run] = []
    try:
        method = _method(optimizer, lr, momentum, of_newton)
        where, _ = place(device)
        make_model = tasks.net(data, net)
        seen, held_out = tasks.examples(data, path=data_path, count=examples, device=where)
        make_folder(out)
        settings = {
            "data": data,
            "arch": net,
            "method": asdict(method),
            "epochs": epochs,
            "batch_size": batch_size,
            "examples": len(seen),
            "test": len(held_out),
        }

        def keep(run: Run) -> None:
            running[:] = [run]
            write(out / "history.json", settings, running)

        with bars() as progress:
            tick = watch(progress, f"{net} by {optimizer}")

            def on_record(run: Run) -> None:
                keep(run)
                last = run.records[-1]
                tick(share(last, epochs, minutes), f"loss {last.loss:.4g}")
                progress.console.print(line(last), highlight=False, markup=False, soft_wrap=True)

            found = run(
                optimizer,
                make_model,
                method,
                seen,
                held_out,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                minutes=minutes,
                device=where,
                callback=on_record,
            )
        keep(found)
        draw(out / "history.png", [found])
    except KeyboardInterrupt:
        for run_so_far in running:
            keep(replace(run_so_far, ended="interrupted"))
        fail(f"interrupted; what is finished is in {out}", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error))

    console = Console(markup=False, emoji=False)
    console.print(table([found]))
    console.print(f"history.json and history.png are in {out}")
    if found.ended not in ("complete", "time is up"):
        fail(found.ended)


def _method(
    optimizer: str, lr: float, momentum: float | None, of_newton: Mapping[str, Any]
) -> Method:
    """The method of these options, of which those that are not given are None."""
    from hessfunc.training.methods import SGD, BlockNewton

    if optimizer not in ("sgd", "newton"):
        raise ValueError(f"--optimizer is sgd or newton, not {optimizer!r}")
    given = {name: value for name, value in of_newton.items() if value is not None}
    if optimizer == "newton":
        if momentum is not None:
            raise ValueError("--momentum goes with --optimizer sgd alone")
        return BlockNewton(lr=lr, **{"curvature": "hbp-abs", **given})
    if given:
        raise ValueError(f"{_OPTIONS[next(iter(given))]} goes with --optimizer newton alone")
    return SGD(lr=lr, momentum=0.9 if momentum is None else momentum)
