"""The command that analyses a Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from hessfunc.app.cli.options import (
    DType,
    Traceback,
    command_line,
    fail,
    held,
    in_one_line,
    make_folder,
    place,
    refuse_seed,
    unless_given,
)
from hessfunc.app.cli.progress import bars, watch
from hessfunc.app.cli.ranks import mesh_of_all, on_all, speaks

if TYPE_CHECKING:
    from hessfunc.app.problems.targets import Problem
    from hessfunc.app.report import Subject

_DATA = "Data"
_EFFORT = "Effort"


def analyze(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="digits, cifar10 or module:function.")
    ] = "digits",
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the results.")] = Path(
        "hessfunc-out"
    ),
    k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("How many eigenvalues.", default="10, or all of fewer"),
            rich_help_panel=_EFFORT,
        ),
    ] = None,
    probes: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Random vectors of the density.", rich_help_panel=_EFFORT
        ),
    ] = 4,
    steps: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Lanczos steps for each of them.", rich_help_panel=_EFFORT
        ),
    ] = 80,
    trace_rtol: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="X",
            help="Relative half-width at which the trace's interval is narrow enough.",
            rich_help_panel=_EFFORT,
        ),
    ] = 0.05,
    max_matvecs: Annotated[
        int,
        typer.Option(
            min=2,
            metavar="N",
            help="Products after which eigenvalues and trace, each, are left as they are.",
            rich_help_panel=_EFFORT,
        ),
    ] = 300,
    landscape: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Points an axis of the loss along the top eigenvectors; 0 for no landscape.",
            rich_help_panel=_EFFORT,
        ),
    ] = 15,
    radius: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="How far the landscape reaches along unit eigenvectors.",
            rich_help_panel=_EFFORT,
        ),
    ] = 0.5,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the state of every part there, and go on from it after a kill.",
            rich_help_panel=_EFFORT,
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=unless_given("Take the first N examples.", default="200 of cifar10, else all"),
            rich_help_panel=_DATA,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Cut larger batches into pieces of N examples.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "--data-path",
            metavar="PATH",
            help=unless_given(
                "CIFAR-10: the folder cifar-10-batches-py or an .npz file.",
                default="in $HESSFUNC_DATA",
            ),
            rich_help_panel=_DATA,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=unless_given("The checkpoint of the ResNet-20.", default="in $HESSFUNC_DATA"),
            rich_help_panel=_DATA,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Move all there: cpu, cuda, cuda:1, mps."),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Convert parameters and inputs to it.")
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of the training and of all random vectors.")
    ] = 0,
    traceback: Traceback = False,
) -> None:
    """Analyse the Hessian of a network's loss on its data.

    Finds the eigenvalues that are largest in absolute value, the smallest (most negative) one, the
    trace, the spectral density, and the loss along the top eigenvectors. Each is written as soon
    as it is there, so Ctrl-C leaves what is finished: report.html for the browser, results.json,
    pictures, and an .npz file for each.

    Under torchrun, as in `torchrun --nproc-per-node 2 -m hessfunc analyze digits`, batches and
    vectors are divided among the processes, and the first of them writes and prints. With fewer
    batches than processes some have none: --batch-size makes more.

    TARGET is one of

    - **digits**: a small conv net, trained in seconds on scikit-learn's digits

    - **cifar10**: a trained ResNet-20 on CIFAR-10's test images

    - **module:function**: your own, importable from the current directory; the function takes no
      argument and returns (model, criterion, loader) or (loss, params, batches)
    """
    if target not in ("digits", "cifar10") and not all(target.partition(":")):
        fail(f"TARGET is digits, cifar10 or module:function, not {target!r}")
    if target != "cifar10" and (data or weights):
        fail("--data-path and --weights go with cifar10 alone")
    if landscape in (1, 2) or not 0 < radius < math.inf:
        fail("--landscape is 0 or at least 3 points, --radius a positive number")

    from hessfunc.app import report
    from hessfunc.app.analysis import analyse
    from hessfunc.app.problems.targets import make_problem

    began = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    folder = report.Folder(out, report.Run(command_line(context), seed, began))
    status, lock = "failed", ExitStack()
    try:
        refuse_seed(seed)
        where, kind = place(device, dtype)
        with mesh_of_all(where) as (mesh, where), bars() as progress:

            def begin() -> None:
                if speaks():
                    make_folder(out)
                    lock.enter_context(held(out))
                    folder.begin()

            on_all(mesh, begin)

            def make() -> Problem:
                return make_problem(
                    target,
                    _returned(target, data, weights, seed, progress),
                    device=where,
                    dtype=kind,
                    count=200 if target == "cifar10" and examples is None else examples,
                    batch_size=batch_size,
                )

            problem = on_all(mesh, make)
            folder.subject = on_all(mesh, lambda: _subject(target, problem, progress))
            if folder.subject.batches > 1:
                task = progress.add_task("one pass", total=folder.subject.batches, detail="")
                problem = replace(problem, batches=_Watched(problem.batches, progress, task))
            for part in analyse(
                problem,
                k=k,
                probes=probes,
                steps=steps,
                trace_rtol=trace_rtol,
                max_matvecs=max_matvecs,
                points=landscape,
                radius=radius,
                seed=seed,
                checkpoint=checkpoint,
                mesh=mesh,
                watch=lambda name: watch(progress, name),
            ):
                if speaks():
                    folder.add(part)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        finished = ", ".join(part.name for part in folder.parts) or "nothing"
        fail(f"interrupted; {finished} finished, see {out}", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error), alone=isinstance(error, ConnectionError))
    finally:
        with lock:
            if speaks():
                folder.close(status)

    if not speaks():
        return
    console = Console(markup=False, emoji=False)
    found = folder.content
    console.print(f"\n{target}: {report.plain(report.headline(found['subject']))}", highlight=False)
    console.print(report.table(found["results"]))
    console.print(f"report.html, results.json, pictures and the results in full are in {out}")


def _returned(
    target: str, data: Path | None, weights: Path | None, seed: int, progress: Progress
) -> Any:
    from hessfunc.app.problems import targets

    if target == "digits":
        tick = watch(progress, "training")
        return targets.digits(
            seed=seed,
            on_epoch=lambda epoch, loss: tick(epoch / targets.DIGITS_EPOCHS, f"loss {loss:.3g}"),
        )
    tick = watch(progress, target)
    found = targets.cifar10(data, weights) if target == "cifar10" else targets.imported(target)
    tick(1.0, "")
    return found


def _subject(target: str, problem: Problem, progress: Progress) -> Subject:
    from hessfunc.app.report import Subject
    from hessfunc.spaces.of import space_of

    tick = watch(progress, "loss")
    loss, examples, batches = problem.evaluate()
    tick(1.0, f"{loss:.4g}")
    space = space_of(problem.params)
    return Subject(
        target=target,
        parameters=space.n,
        examples=examples,
        batches=batches,
        loss=loss,
        dtype=str(space.dtype).removeprefix("torch."),
        device=str(space.device),
    )


@dataclass(frozen=True)
class _Watched:
    """Batches with a progress bar of the running pass."""

    batches: Iterable[Any]
    progress: Progress
    task: TaskID

    def __iter__(self) -> Iterator[Any]:
        for done, batch in enumerate(self.batches, start=1):
            yield batch
            self.progress.update(self.task, completed=done)
