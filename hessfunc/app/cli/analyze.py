"""Command ``hessfunc analyze``, which analyses the Hessian of a loss."""

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
    Traceback,
    command_line,
    count,
    dtype_name,
    fail,
    held,
    in_one_line,
    make_folder,
    one_of,
    option,
    place,
    refuse_seed,
    unless_given,
)
from hessfunc.app.cli.progress import Bars, bar, bars, print_table
from hessfunc.app.cli.ranks import mesh_of_all, on_all, speaks

if TYPE_CHECKING:
    from hessfunc.app.problems.targets import Problem
    from hessfunc.app.report import Subject

# Repeated here, so that --help does not wait for torch.
NAMES = ("eigenvalues", "smallest", "trace", "density", "line", "plane")
MATRICES = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "efisher": "empirical Fisher matrix",
}
CURVATURES = tuple(MATRICES)
_DATA = "Data"
_EFFORT = "Effort"


def analyze(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="What to analyse: digits, cifar10 or module:function."
        ),
    ] = "digits",
    out: Annotated[Path, option("DIR", "Folder of the results.")] = Path("hessfunc-out"),
    curvature: Annotated[
        str,
        option(
            "NAME",
            "Matrix: hessian, ggn (generalised Gauss-Newton), fisher, or efisher (empirical).",
        ),
    ] = "hessian",
    only: Annotated[
        str | None,
        option(
            "NAMES",
            f"Compute only these parts, separated by commas: {', '.join(NAMES)}.",
            default="all",
        ),
    ] = None,
    k: Annotated[
        int | None,
        option(
            "N", "Number of top eigenvalues.", default="10, or all if fewer", panel=_EFFORT, min=1
        ),
    ] = None,
    probes: Annotated[
        int,
        option("N", "Random vectors of the density.", panel=_EFFORT, min=1),
    ] = 4,
    steps: Annotated[
        int,
        option("N", "Lanczos steps per random vector.", panel=_EFFORT, min=1),
    ] = 80,
    trace_rtol: Annotated[
        float,
        option(
            "X",
            "Tolerance of the trace: relative half-width of its 95 % interval.",
            panel=_EFFORT,
            min=0,
        ),
    ] = 0.05,
    max_matvecs: Annotated[
        int,
        option(
            "N",
            "Stop each eigenvalue run and the trace after N matrix-vector products, even if "
            "the tolerance is not reached.",
            panel=_EFFORT,
            min=2,
            parser=count,
        ),
    ] = 300,
    landscape: Annotated[
        int,
        option(
            "N",
            "Points per axis of the loss along the top eigenvectors; 0: no landscape.",
            panel=_EFFORT,
            min=0,
        ),
    ] = 15,
    radius: Annotated[
        float,
        option(
            "X", "Distance that the landscape covers along each unit eigenvector.", panel=_EFFORT
        ),
    ] = 0.5,
    checkpoint: Annotated[
        Path | None,
        option(
            "DIR",
            "Save checkpoints of every part in this folder, and resume from them.",
            panel=_EFFORT,
        ),
    ] = None,
    examples: Annotated[
        int | None,
        option(
            "N",
            "Use the first N examples.",
            default="200 for cifar10, else all",
            panel=_DATA,
            min=1,
            parser=count,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        option(
            "N",
            "Split larger batches into batches of N examples.",
            panel=_DATA,
            min=1,
            parser=count,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "--data-path",
            metavar="PATH",
            help=unless_given(
                "Path to CIFAR-10: the folder cifar-10-batches-py or an .npz file.",
                default="searched in $HESSFUNC_DATA",
            ),
            rich_help_panel=_DATA,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        option(
            "FILE",
            "Checkpoint of the ResNet-20.",
            default="searched in $HESSFUNC_DATA",
            panel=_DATA,
        ),
    ] = None,
    device: Annotated[
        str | None,
        option("NAME", "Device to compute on: cpu, cuda, cuda:1, mps."),
    ] = None,
    dtype: Annotated[
        str | None,
        option(
            "NAME",
            "Convert parameters and inputs: float32, float64, bfloat16 (bf16) or float16.",
            parser=dtype_name,
        ),
    ] = None,
    seed: Annotated[int, option("N", "Seed of the training and of all random vectors.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print results.json instead of the table.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", metavar="", help="Print errors only.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Analyse the Hessian, or another curvature matrix, of a network's loss on its data.

    Computes the eigenvalues of largest absolute value, the smallest (most negative) eigenvalue,
    the trace, the spectral density, and the loss along the top eigenvectors. Each part is written
    when it is finished, so Ctrl-C keeps the finished parts: report.html for the browser,
    results.json, pictures, and one .npz file per part.

    Under torchrun, as in `torchrun --nproc-per-node 2 -m hessfunc analyze digits`, batches and
    vectors are divided among the processes, and the first process writes and prints. If there are
    fewer batches than processes, some processes are idle: --batch-size makes more batches.

    TARGET is one of

    - **digits**: a small conv net, trained in seconds on scikit-learn's digits

    - **cifar10**: a trained ResNet-20 on CIFAR-10's test images

    - **module:function**: your own function, importable from the current directory; it takes no
      arguments and returns (model, criterion, loader) or (loss, params, batches)
    """
    if target not in ("digits", "cifar10") and not all(target.partition(":")):
        fail(f"TARGET must be digits, cifar10 or module:function, not {target!r}")
    if target != "cifar10" and (data or weights):
        fail("--data-path and --weights require the target cifar10")
    wanted = _parts(only)
    if landscape in (1, 2) or not 0 < radius < math.inf:
        fail("--landscape must be 0 or at least 3, and --radius positive and finite")

    try:
        one_of(curvature, CURVATURES, "--curvature")
    except ValueError as error:
        fail(str(error))

    from hessfunc.app import report
    from hessfunc.app.analysis import analyse
    from hessfunc.app.problems.targets import make_problem

    began = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    folder = report.Folder(out, report.Invocation(command_line(context), seed, began))
    status, lock = "failed", ExitStack()
    try:
        refuse_seed(seed)
        torch_device, torch_dtype = place(device, dtype)
        with mesh_of_all(torch_device) as (mesh, torch_device), bars(quiet=quiet) as progress:

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
                    device=torch_device,
                    dtype=torch_dtype,
                    count=200 if target == "cifar10" and examples is None else examples,
                    batch_size=batch_size,
                )

            problem = on_all(mesh, make)
            folder.subject = on_all(mesh, lambda: _subject(target, curvature, problem, progress))
            if folder.subject.batches > 1:
                task = progress.add_task("one pass", total=folder.subject.batches, detail="")
                problem = replace(problem, batches=_Watched(problem.batches, progress, task))
            for part in analyse(
                problem,
                curvature=curvature,
                only=wanted,
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
                on_part=lambda name: bar(progress, name),
            ):
                if speaks():
                    folder.add(part)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        finished = ", ".join(part.name for part in folder.parts) or "none"
        fail(f"interrupted; finished parts in {out}: {finished}", code=130)
    except Exception as error:
        if traceback:
            raise
        fail(in_one_line(error), alone=isinstance(error, ConnectionError))
    finally:
        with lock:
            if speaks():
                folder.close(status)

    if not speaks() or quiet:
        return
    if as_json:
        typer.echo(report.as_text(folder.content), nl=False)
        return
    console = Console(markup=False, emoji=False)
    content = folder.content
    headline = report.plain(report.headline(content["subject"]))
    console.print(f"\n{target}: {headline}", highlight=False)
    print_table(console, report.table(content["results"]))
    console.print(f"report.html, results.json, pictures and full results (.npz) are in {out}")


def _parts(only: str | None) -> tuple[str, ...]:
    """Return the names of the parts that are computed, in the order of the analysis."""
    if only is None:
        return NAMES
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        wrong = unknown[0] if unknown else only
        fail(f"--only must be a list of {', '.join(NAMES)}, separated by commas, not {wrong!r}")
    along = [name for name in names if name in ("line", "plane")]
    if along and "eigenvalues" not in names:
        fail(f"--only {along[0]} is along eigenvectors: pass --only eigenvalues,{along[0]}")
    return tuple(name for name in NAMES if name in names)


def _returned(
    target: str, data: Path | None, weights: Path | None, seed: int, progress: Bars
) -> Any:
    from hessfunc.app.problems import targets

    if target == "digits":
        tick = bar(progress, "training")
        return targets.digits(
            seed=seed,
            on_epoch=lambda epoch, loss: tick(epoch / targets.DIGITS_EPOCHS, f"loss {loss:.3g}"),
        )
    tick = bar(progress, target)
    returned = targets.cifar10(data, weights) if target == "cifar10" else targets.imported(target)
    tick(1.0, "")
    return returned


def _subject(target: str, curvature: str, problem: Problem, progress: Bars) -> Subject:
    from hessfunc.app.report import Subject
    from hessfunc.spaces.of import space_of

    tick = bar(progress, "loss")
    loss, examples, batches = problem.evaluate()
    tick(1.0, f"{loss:.4g}")
    space = space_of(problem.params)
    return Subject(
        target=target,
        matrix=MATRICES[curvature],
        parameters=space.n,
        examples=examples,
        batches=batches,
        loss=loss,
        dtype=str(space.dtype).removeprefix("torch."),
        device=str(space.device),
    )


@dataclass(frozen=True)
class _Watched:
    """Batches that show the progress of each pass over them.

    Attributes:
        batches: Batches to iterate over.
        progress: Progress bars of the command.
        task: Bar that counts the batches of the current pass.
    """

    batches: Iterable[Any]
    progress: Progress
    task: TaskID

    def __iter__(self) -> Iterator[Any]:
        for done, batch in enumerate(self.batches, start=1):
            yield batch
            self.progress.update(self.task, completed=done)
