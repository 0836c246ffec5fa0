"""The command that trains a net."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from hessfunc.app.cli.methods import OF_ABSA, OF_NEWTON, OF_SGD, epochs_of, optimiser, schedule
from hessfunc.app.cli.options import (
    Arch,
    DataPath,
    Depth,
    Device,
    Traceback,
    Training,
    command_line,
    fail,
    held,
    in_one_line,
    make_folder,
    named_net,
    place,
    refuse_data,
    refuse_other_files,
    refuse_seed,
    unless_given,
)
from hessfunc.app.cli.progress import bars, line, share, watch
from hessfunc.app.cli.ranks import refuse_several

if TYPE_CHECKING:
    from hessfunc.training.history import Run
    from hessfunc.training.runs import Track

_DATA = "Data"
_SGD = "--optimizer sgd"
_NEWTON = "--optimizer newton"
_ABSA = "--method absa"


def train(
    context: typer.Context,
    data: Training = "digits",
    arch: Arch = None,
    depth: Depth = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="sgd: batches of one size; absa: batches that grow where the loss is flat.",
        ),
    ] = "sgd",
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given("sgd or newton.", default="newton with one of its options, else sgd"),
        ),
    ] = None,
    curvature: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given(
                "hbp-none, hbp-zero, hbp-clip, hbp-abs; pch-none, pch-zero, pch-clip, pch-abs; "
                "ggn; hessian; kfra; kflr; kfac; ekfac.",
                default="hbp-abs",
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the examples.")] = 90,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Examples of a base batch.")
    ] = 128,
    large_ratio: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given(
                "Base batches in a step: of sgd always, of absa at most.", default="1, of absa 128"
            ),
        ),
    ] = None,
    lr: Annotated[float, typer.Option(metavar="X", help="The learning rate.")] = 0.1,
    lr_decay: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="X",
            help="The learning rate is multiplied by it after each --lr-decay-epoch.",
        ),
    ] = 0.2,
    lr_decay_epoch: Annotated[
        str, typer.Option(metavar="N,N", help="Epochs, counted from 1, with commas between.")
    ] = "30,60",
    adversarial_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help=unless_given(
                "How much of each base batch is adversarial at first.", default="0.2"
            ),
            rich_help_panel=_ABSA,
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given("How far the adversarial inputs are moved.", default="0.005"),
            rich_help_panel=_ABSA,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Epochs until the batch grows in any case.", default="10"),
            rich_help_panel=_ABSA,
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help=unless_given("The share of the last step that is kept.", default="0.9"),
            rich_help_panel=_SGD,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given(
                "So much of the parameters is added to the gradient, as half their square to the "
                "loss.",
                default="0",
            ),
            rich_help_panel=_SGD,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help=unless_given(
                "How much of the identity is mixed into the curvature.", default="0.02"
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given(
                "cg, or direct with the inverse of the blocks' factors.", default="cg"
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_max: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given(
                "Products after which a parameter's equation is left as it is.", default="50"
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_rtol: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given("The relative residual that is small enough.", default="0.1"),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_atol: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given("The absolute residual that is small enough.", default="0"),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    max_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given(
                "Cut the curvature of each layer into so many blocks (hbp).", default="one"
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given(
                "Train on the first N examples, and test on N at most.", default="all"
            ),
            rich_help_panel=_DATA,
        ),
    ] = None,
    data_path: DataPath = None,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given(
                "Record the dominant eigenvalue of the Hessian after each epoch: top, of 200 "
                "examples or a base batch if that is more; full, of all.",
                default="none is recorded",
            ),
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="End after so much time of steps."),
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights, batches and draws.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the results.")] = Path(
        "hessfunc-train"
    ),
    save_every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Keep the state after so many steps.")
    ] = 100,
    traceback: Traceback = False,
) -> None:
    """Train a small net, with SGD or Newton's method, on batches that stay or grow.

    Shows loss and accuracy after each epoch, and writes report.html for the browser, history.json
    and history.png: all against epochs and against gradient-equivalents, the work in units of one
    gradient; with --track or --method absa also eigenvalue, batch size and learning rate. The
    state is kept in checkpoint.pt: stopped or killed at any moment, the same command goes on from
    there, and ends with the same bits.
    """
    from hessfunc.app import report, tasks
    from hessfunc.app.table import summary
    from hessfunc.files import write_whole
    from hessfunc.plot.trainings import draw
    from hessfunc.training.checkpoint import TrainingCheckpoint
    from hessfunc.training.history import read, write
    from hessfunc.training.methods import SGD
    from hessfunc.training.runs import run

    sgd = (momentum, weight_decay)
    newton = (curvature, alpha, solve, cg_max, cg_rtol, cg_atol, max_blocks)
    began = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    started = report.Run(command_line(context), seed, began)
    running: list[Run] = []
    lock = ExitStack()
    try:
        refuse_data(data, data_path)
        refuse_several("train")
        refuse_seed(seed)
        if track not in (None, "top", "full"):
            raise ValueError(f"--track is top or full, not {track!r}")
        net = named_net(arch, depth)
        epochs_of_decay = epochs_of(lr_decay_epoch, context.args)
        of_sgd = dict(zip(OF_SGD, sgd, strict=True))
        chosen = optimiser(optimizer, lr, of_sgd, dict(zip(OF_NEWTON, newton, strict=True)))
        plan, of_plan = schedule(
            method,
            epochs=epochs,
            large_ratio=large_ratio,
            lr_decay=lr_decay,
            lr_decay_epochs=epochs_of_decay,
            of_absa=dict(zip(OF_ABSA, (adversarial_share, patience, eps), strict=True)),
        )
        where, _ = place(device)
        make_model = tasks.net(data, net)
        seen, held_out = tasks.examples(data, path=data_path, count=examples, device=where)
        make_folder(out)
        lock.enter_context(held(out))
        settings = {
            "data": data,
            "data_path": None if data_path is None else str(data_path.resolve()),
            "arch": net,
            "optimizer": type(chosen).__name__,
            **asdict(chosen),
            "method": method,
            **of_plan,
            "epochs": epochs,
            "batch_size": batch_size,
            "examples": len(seen),
            "test": len(held_out),
            "track": track,
            "seed": seed,
        }

        if not (out / "checkpoint.pt").exists():
            refuse_other_files(out, ("history.png", "report.html"), "history.json")
            # Trainings of other settings, and files of other programs, stay.
            read(out / "history.json", settings)

        def keep(run: Run) -> None:
            running[:] = [run]
            write(out / "history.json", settings, running)

        def finish(run: Run) -> None:
            keep(run)
            draw(out / "history.png", running, batch_size=batch_size)
            picture = (out / "history.png").read_bytes()
            page = report.training(run, settings, started, picture).encode()
            write_whole(out / "report.html", lambda file: file.write(page))

        with bars() as progress:
            kind = "sgd" if isinstance(chosen, SGD) else "newton"
            name = kind if method == "sgd" else f"{kind}, {method}"
            tick = watch(progress, f"{net} by {name}")

            def on_record(run: Run) -> None:
                keep(run)
                last = run.records[-1]
                tick(share(last, epochs, minutes), f"loss {last.loss:.4g}")
                progress.console.print(line(last), highlight=False, markup=False, soft_wrap=True)

            def on_step(count: int) -> None:
                last = running[0].records[-1]
                done = replace(last, epoch=int(last.epoch) + count / len(seen))
                tick(share(done, epochs, minutes), f"loss {last.loss:.4g}")

            found = run(
                name,
                make_model,
                chosen,
                seen,
                held_out,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                minutes=minutes,
                device=where,
                schedule=plan,
                eps=0.005 if eps is None else eps,
                track=cast("Track", track),
                checkpoint=TrainingCheckpoint(out / "checkpoint.pt", settings, save_every),
                callback=on_record,
                on_step=on_step,
            )
        finish(found)
    except KeyboardInterrupt:
        for run_so_far in running:
            finish(replace(run_so_far, ended="interrupted"))
        fail(f"interrupted; what is finished is in {out}", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error))
    finally:
        lock.close()

    console = Console(markup=False, emoji=False)
    console.print(summary(found, batch_size=batch_size))
    console.print(f"report.html, history.json, history.png and checkpoint.pt are in {out}")
    if found.ended not in ("complete", "time is up"):
        fail(found.ended)
