"""The command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"hessfunc: the command line needs {missing.name}: pip install 'hessfunc[cli]'"
    ) from None

# torch takes a second to import, and --help need not wait for it.
if TYPE_CHECKING:
    import torch

    from hessfunc.problems.targets import Problem
    from hessfunc.report import Folder, Subject

__all__ = ["app", "main"]

_DATA = "Data"
_EFFORT = "Effort"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class DType(StrEnum):
    """A dtype of parameters and inputs."""

    float32 = "float32"
    float64 = "float64"


def main() -> None:
    """The entry point of the command ``hessfunc``."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from hessfunc import __version__

        typer.echo(f"hessfunc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Curvature of neural networks: Hessian eigenvalues, traces and spectral densities."""


@app.command()
def analyze(
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
            help="How many eigenvalues.",
            show_default="10, or all of fewer",
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
            help="Take the first N examples.",
            show_default="200 of cifar10, else all",
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
            metavar="PATH",
            help="CIFAR-10: the folder cifar-10-batches-py or an .npz file.",
            show_default="in $HESSFUNC_DATA",
            rich_help_panel=_DATA,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The checkpoint of the ResNet-20.",
            show_default="in $HESSFUNC_DATA",
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
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error was raised.")
    ] = False,
) -> None:
    """Analyse the Hessian of a network's loss on its data.

    Finds the eigenvalues that are largest in absolute value, the smallest (most negative) one, the
    trace and the spectral density. Each is written as soon as it is there, so Ctrl-C leaves what
    is finished: results.json, density.png, and an .npz file for each.

    TARGET is one of

    - **digits**: a small conv net, trained in seconds on scikit-learn's digits

    - **cifar10**: a trained ResNet-20 on CIFAR-10's test images

    - **module:function**: your own, importable from the current directory; the function takes no
      argument and returns (model, criterion, loader) or (loss, params, batches)
    """
    if target not in ("digits", "cifar10") and not all(target.partition(":")):
        _fail(f"TARGET is digits, cifar10 or module:function, not {target!r}")
    if target != "cifar10" and (data or weights):
        _fail("--data and --weights go with cifar10 alone")

    from hessfunc import report
    from hessfunc.analysis import analyse
    from hessfunc.problems.targets import make_problem

    folder = report.Folder(out)
    status = "failed"
    try:
        where, kind = _place(device, dtype)
        _clear(folder)
        with _progress() as progress:
            returned = _returned(target, data, weights, seed, progress)
            problem = make_problem(
                target,
                returned,
                device=where,
                dtype=kind,
                count=200 if target == "cifar10" and examples is None else examples,
                batch_size=batch_size,
            )
            folder.subject = _subject(target, problem, progress)
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
                seed=seed,
                checkpoint=checkpoint,
                watch=lambda name: _watch(progress, name),
            ):
                folder.add(part)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        finished = ", ".join(part.name for part in folder.parts) or "nothing"
        _fail(f"interrupted; {finished} finished, see {out}", code=130)
    except Exception as error:
        if traceback:
            raise
        _fail(_in_one_line(error))
    finally:
        folder.close(status)

    console = Console(markup=False, emoji=False)
    console.print(f"\n{report.headline(folder.subject)}", highlight=False)
    console.print(report.table(folder.parts))
    console.print(f"results.json, density.png and the results in full are in {out}")


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"hessfunc: {message}", err=True)
    raise typer.Exit(code)


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text
    return f"{type(error).__name__}: {text} (--traceback shows where)"


def _clear(folder: Folder) -> None:
    try:
        folder.clear()
    except OSError as error:
        raise ValueError(f"--out {folder.path} cannot be used: {error.strerror}") from error


def _place(
    device: str | None, dtype: DType | None
) -> tuple[torch.device | None, torch.dtype | None]:
    import torch

    kind = getattr(torch, dtype) if dtype else None
    if device is None:
        return None, kind
    try:
        return torch.zeros(1, device=device, dtype=kind).device, kind
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from error


def _returned(
    target: str, data: Path | None, weights: Path | None, seed: int, progress: Progress
) -> Any:
    from hessfunc.problems import targets

    if target == "digits":
        tick = _watch(progress, "training")
        return targets.digits(
            seed=seed,
            on_epoch=lambda epoch, loss: tick(epoch / targets.DIGITS_EPOCHS, f"loss {loss:.3g}"),
        )
    tick = _watch(progress, target)
    found = targets.cifar10(data, weights) if target == "cifar10" else targets.imported(target)
    tick(1.0, "")
    return found


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _watch(progress: Progress, name: str) -> Callable[[float, str], None]:
    task = progress.add_task(name, total=1.0, detail="")
    return lambda share, detail: progress.update(task, completed=share, detail=detail)


def _subject(target: str, problem: Problem, progress: Progress) -> Subject:
    from hessfunc.report import Subject
    from hessfunc.trees import Space

    tick = _watch(progress, "loss")
    loss, examples, batches = problem.evaluate()
    tick(1.0, f"{loss:.4g}")
    space = Space.of(problem.params)
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
