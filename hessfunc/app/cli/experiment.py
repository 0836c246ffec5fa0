"""The command that compares methods of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hessfunc.app.cli.options import (
    Traceback,
    fail,
    held,
    in_one_line,
    make_folder,
    place,
    refuse_other_files,
    unless_given,
)
from hessfunc.app.cli.progress import bars, line, share, watch
from hessfunc.app.cli.ranks import refuse_several

if TYPE_CHECKING:
    from hessfunc.training.history import Run

_NAMES = ("exp01", "exp02", "exp08", "exp09")


def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="exp01, exp02, exp08 or exp09.")],
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Passes over the examples.", default="the experiment's"),
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
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help=unless_given("Examples a step.", default="the experiment's")
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many trainings for each method.")
    ] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="End each training after so much time of steps."),
    ] = None,
    data_path: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help=unless_given(
                "CIFAR-10: the folder cifar-10-batches-py or an .npz file.",
                default="in $HESSFUNC_DATA",
            ),
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Train there: cpu, cuda, cuda:1, mps.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help=unless_given("The folder of the results.", default="NAME")
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Compare Newton's method on blocks of the curvature with SGD, as in the literature.

    All methods start from the same weights and see the same batches, for each seed. After each
    training results.json, results.md and curves.png are written; trainings that are finished are
    not run again, so a command that was stopped goes on when it is started again.

    NAME is one of

    - **exp01**: a deep perceptron, averaged Hessian backpropagation: zero, abs, clip

    - **exp02**: the same net, curvature cut into 1, 2, 4 and 16 blocks

    - **exp08**: a conv net, the exact positive-curvature Hessian: zero, abs, clip

    - **exp09**: DeepOBS's 3c3d, the same
    """
    if name not in _NAMES:
        fail(f"NAME is {', '.join(_NAMES[:-1])} or {_NAMES[-1]}, not {name!r}")

    from hessfunc.app import tasks
    from hessfunc.app.experiments import EXPERIMENTS, compared
    from hessfunc.app.table import markdown, table
    from hessfunc.plot.trainings import draw
    from hessfunc.training import history

    of = EXPERIMENTS[name]
    of = replace(of, epochs=epochs or of.epochs, batch_size=batch_size or of.batch_size)
    out = out or Path(name)
    runs: list[Run] = []
    lock = ExitStack()
    try:
        refuse_several("experiment")
        where, _ = place(device)
        seen, held_out = tasks.examples(of.dataset, path=data_path, count=examples, device=where)
        make_folder(out)
        lock.enter_context(held(out))
        refuse_other_files(out, ("results.md", "curves.png"), "results.json")
        settings = {
            **of.settings(),
            "examples": len(seen),
            "test": len(held_out),
            "minutes": minutes,
            "device": str(where or "cpu"),
        }
        runs += history.read(out / "results.json", settings)
        with bars() as progress:

            def watched(method: str, seed: int) -> Callable[[Run], None]:
                tick = watch(progress, f"{method}, seed {seed}")
                return lambda run: tick(
                    share(run.records[-1], of.epochs, minutes), line(run.records[-1])
                )

            for run in compared(
                of,
                seen,
                held_out,
                seeds=seeds,
                minutes=minutes,
                device=where,
                finished={(run.method, run.seed) for run in runs},
                watch=watched,
            ):
                runs.append(run)
                history.write(out / "results.json", settings, runs)
                (out / "results.md").write_text(f"{of.title}\n\n{markdown(runs)}")
                draw(out / "curves.png", runs)
                end = f"{run.method}, seed {run.seed}: {line(run.records[-1])}; {run.ended}"
                progress.console.print(end, highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        fail(f"interrupted; {len(runs)} trainings finished, see {out}", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error))
    finally:
        lock.close()

    console = Console(markup=False, emoji=False)
    console.print(f"\n{of.title}", highlight=False)
    console.print(table(runs))
    console.print(f"results.json, results.md and curves.png are in {out}")
