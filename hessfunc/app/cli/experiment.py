"""Command ``hessfunc experiment``, which compares training methods."""

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
    option,
    place,
    refuse_other_files,
)
from hessfunc.app.cli.progress import bar, bars, finished_fraction, line, print_table
from hessfunc.app.cli.ranks import refuse_several

if TYPE_CHECKING:
    from hessfunc.training.history import Run

_NAMES = ("exp01", "exp02", "exp08", "exp09")


def experiment(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Experiment: exp01, exp02, exp08 or exp09.")
    ],
    epochs: Annotated[
        int | None,
        option("N", "Passes over the examples.", default="that of the experiment", min=1),
    ] = None,
    examples: Annotated[
        int | None,
        option("N", "Train on the first N examples, and test on at most N.", default="all", min=1),
    ] = None,
    batch_size: Annotated[
        int | None,
        option("N", "Examples per step.", default="that of the experiment", min=1),
    ] = None,
    seeds: Annotated[int, option("N", "Number of training runs per method.", min=1)] = 1,
    minutes: Annotated[
        float | None,
        option("X", "Stop each training run after X minutes of steps.", min=0),
    ] = None,
    data_path: Annotated[
        Path | None,
        option(
            "PATH",
            "Path to CIFAR-10: the folder cifar-10-batches-py or an .npz file.",
            default="searched in $HESSFUNC_DATA",
        ),
    ] = None,
    device: Annotated[
        str | None, option("NAME", "Device to train on: cpu, cuda, cuda:1, mps.")
    ] = None,
    out: Annotated[
        Path | None,
        option("DIR", "Folder of the results.", default="NAME"),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Compare Newton's method on diagonal blocks of the curvature with SGD, as in the literature.

    For each seed, all methods start from the same weights and see the same batches. After each
    training run, results.json, results.md and curves.png are written. Finished runs are not
    repeated: after an interruption, the same command resumes with the next run.

    NAME is one of

    - **exp01**: deep perceptron, averaged Hessian backpropagation: zero, abs, clip

    - **exp02**: same network, curvature split into 1, 2, 4 and 16 blocks

    - **exp08**: conv net, exact positive-curvature Hessian: zero, abs, clip

    - **exp09**: 3c3d of DeepOBS, exact positive-curvature Hessian: zero, abs, clip
    """
    if name not in _NAMES:
        fail(f"NAME must be {', '.join(_NAMES[:-1])} or {_NAMES[-1]}, not {name!r}")

    from hessfunc.app import tasks
    from hessfunc.app.experiments import EXPERIMENTS, compared
    from hessfunc.app.table import markdown, table
    from hessfunc.plot.trainings import draw
    from hessfunc.training import history

    chosen = EXPERIMENTS[name]
    chosen = replace(
        chosen, epochs=epochs or chosen.epochs, batch_size=batch_size or chosen.batch_size
    )
    out = out or Path(name)
    runs: list[Run] = []
    lock = ExitStack()
    try:
        refuse_several("experiment")
        torch_device, _ = place(device)
        seen, held_out = tasks.examples(
            chosen.dataset, path=data_path, count=examples, device=torch_device
        )
        make_folder(out)
        lock.enter_context(held(out))
        refuse_other_files(out, ("results.md", "curves.png"), "results.json")
        settings = {
            **chosen.settings(),
            "examples": len(seen),
            "test": len(held_out),
            "minutes": minutes,
            "device": str(torch_device or "cpu"),
        }
        runs += history.read(out / "results.json", settings)
        with bars() as progress:

            def watched(method: str, seed: int) -> Callable[[Run], None]:
                tick = bar(progress, f"{method}, seed {seed}")
                return lambda run: tick(
                    finished_fraction(run.records[-1], chosen.epochs, minutes),
                    line(run.records[-1]),
                )

            for run in compared(
                chosen,
                seen,
                held_out,
                seeds=seeds,
                minutes=minutes,
                device=torch_device,
                finished={(run.method, run.seed) for run in runs},
                on_run=watched,
            ):
                runs.append(run)
                history.write(out / "results.json", settings, runs)
                (out / "results.md").write_text(f"{chosen.title}\n\n{markdown(runs)}")
                draw(out / "curves.png", runs)
                end = f"{run.method}, seed {run.seed}: {line(run.records[-1])}; {run.ended}"
                progress.console.print(end, highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        fail(f"interrupted; {len(runs)} finished training runs are in {out}", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error))
    finally:
        lock.close()

    console = Console(markup=False, emoji=False)
    console.print(f"\n{chosen.title}", highlight=False)
    print_table(console, table(runs))
    console.print(f"results.json, results.md and curves.png are in {out}")
