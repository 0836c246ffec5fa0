"""Command ``hessfunc train``, which trains a small network."""

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
            help="sgd: batches of fixed size; absa: batches that grow where the loss is flat.",
        ),
    ] = "sgd",
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given(
                "Optimiser: sgd or newton.",
                default="newton if one of its options is given, else sgd",
            ),
        ),
    ] = None,
    curvature: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given(
                "Curvature matrix: hbp-none, hbp-zero, hbp-clip, hbp-abs; pch-none, pch-zero, "
                "pch-clip, pch-abs; ggn; hessian; kfra; kflr; kfac; ekfac.",
                default="hbp-abs",
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the examples.")] = 90,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Examples per base batch.")
    ] = 128,
    large_ratio: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given(
                "Base batches per step: fixed for sgd, the maximum for absa.",
                default="1 for sgd, 128 for absa",
            ),
        ),
    ] = None,
    lr: Annotated[float, typer.Option(metavar="X", help="Learning rate.")] = 0.1,
    lr_decay: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="X",
            help="Factor of the learning rate after each --lr-decay-epoch.",
        ),
    ] = 0.2,
    lr_decay_epoch: Annotated[
        str, typer.Option(metavar="N,N", help="Epochs after which the rate decays, counted from 1.")
    ] = "30,60",
    adversarial_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help=unless_given(
                "Initial share of adversarial inputs in each base batch.", default="0.2"
            ),
            rich_help_panel=_ABSA,
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given(
                "Size of the adversarial perturbation of the inputs.", default="0.005"
            ),
            rich_help_panel=_ABSA,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Maximum number of epochs before the batch grows.", default="10"),
            rich_help_panel=_ABSA,
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help=unless_given("Share of the previous step that is kept.", default="0.9"),
            rich_help_panel=_SGD,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given(
                "Add X times the parameters to the gradient, and so X / 2 times their squared "
                "norm to the loss.",
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
                "Damping: weight of the identity in (1 - alpha) curvature + alpha I.",
                default="0.02",
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=unless_given(
                "Solver: cg, or direct, which inverts the factors of the blocks.", default="cg"
            ),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_max: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Stop CG after N products per parameter tensor.", default="50"),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_rtol: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given("Relative tolerance of CG.", default="0.1"),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    cg_atol: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help=unless_given("Absolute tolerance of CG.", default="0"),
            rich_help_panel=_NEWTON,
        ),
    ] = None,
    max_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given(
                "Split the curvature of each layer into N diagonal blocks (hbp).", default="1"
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
                "Train on the first N examples, and test on at most N.", default="all"
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
                "Record the dominant Hessian eigenvalue after each epoch: top (on 200 examples, or "
                "on a base batch if that is larger) or full (on all examples).",
                default="off",
            ),
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Stop after X minutes of training steps."),
    ] = None,
    device: Device = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of weights, batches and random samples.")
    ] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path(
        "hessfunc-train"
    ),
    save_every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Save a checkpoint every N steps.")
    ] = 100,
    traceback: Traceback = False,
) -> None:
    """Train a small network with SGD or Newton's method, on batches of fixed or growing size.

    Prints loss and accuracy after each epoch, and writes report.html for the browser, history.json
    and history.png. These show all quantities against epochs and against gradient-equivalents, the
    work in units of one gradient. With --track or --method absa they include the dominant
    eigenvalue, batch size and learning rate. The state is saved in checkpoint.pt: after an
    interruption or a kill, the same command resumes from it and ends with the same bits.
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
            raise ValueError(f"--track must be top or full, not {track!r}")
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
        torch_device, _ = place(device)
        make_model = tasks.net(data, net)
        seen, held_out = tasks.examples(data, path=data_path, count=examples, device=torch_device)
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
            # `read` raises if the file belongs to other settings or to another program.
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

            trained = run(
                name,
                make_model,
                chosen,
                seen,
                held_out,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                minutes=minutes,
                device=torch_device,
                schedule=plan,
                eps=0.005 if eps is None else eps,
                track=cast("Track", track),
                checkpoint=TrainingCheckpoint(out / "checkpoint.pt", settings, save_every),
                callback=on_record,
                on_step=on_step,
            )
        finish(trained)
    except KeyboardInterrupt:
        for run_so_far in running:
            finish(replace(run_so_far, ended="interrupted"))
        fail(f"interrupted; the finished epochs are in {out}", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error))
    finally:
        lock.close()

    console = Console(markup=False, emoji=False)
    console.print(summary(trained, batch_size=batch_size))
    console.print(f"report.html, history.json, history.png and checkpoint.pt are in {out}")
    if trained.ended not in ("complete", "time is up"):
        fail(trained.ended)
