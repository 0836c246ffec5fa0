"""Command ``hessfunc analyze``, which analyses the Hessian of a loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import Progress, TaskID

from hessfunc.app.cli.declarations import MATRICES, PARTS
from hessfunc.app.cli.errors import fail, invocation
from hessfunc.app.cli.folders import held
from hessfunc.app.cli.progress import Bars, bar
from hessfunc.app.cli.ranks import mesh_of_all, on_all, place, several, speaks
from hessfunc.app.terminal import Output

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from hessfunc.app.problems.targets import Problem
    from hessfunc.app.report import Subject

# Number of examples of a target unless options choose it, and of sequences in a batch.
_EXAMPLES, _SEQUENCES = {"cifar10": 200, "hf": 64}, 8


def analyze(
    context: typer.Context,
    target: str = "digits",
    out: Path = Path("hessfunc-out"),
    curvature: str = "hessian",
    only: str | None = None,
    k: int | None = None,
    probes: int = 4,
    steps: int = 80,
    trace_rtol: float = 0.05,
    max_matvecs: int = 300,
    landscape: int = 15,
    radius: float = 0.5,
    checkpoint: Path | None = None,
    examples: int | None = None,
    batch_size: int | None = None,
    text: Path | None = None,
    sequence: int | None = None,
    data: Path | None = None,
    weights: Path | None = None,
    shard: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Output:
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

    - **hf:PATH**: a causal or masked language model of Hugging Face in a local folder, on the text
      of --text, which is cut into sequences

    - **module:function**: your own function, importable from the current directory; it takes no
      arguments and returns (model, criterion, loader) or (loss, params, batches)
    """
    if target not in ("digits", "cifar10") and not all(target.partition(":")):
        fail(f"TARGET must be one of digits, cifar10, hf:PATH, module:function, not {target!r}")
    if target != "cifar10" and (data or weights):
        fail("--data-path and --weights require the target cifar10")
    is_text = target.startswith("hf:")
    if is_text and text is None:
        fail("a target hf:PATH requires --text FILE, on which its loss is evaluated")
    if not is_text and (text or sequence):
        fail("--text and --sequence require a target hf:PATH")
    if landscape in (1, 2):
        fail(f"--landscape must be 0 or at least 3, not {landscape}")
    wanted = _parts(only)
    if shard is not None:
        if not several():
            fail("--shard divides a model among processes: start the command with torchrun")
        if only is not None and {"line", "plane"} & set(wanted):
            fail("--shard has no line and plane: leave them out of --only")
        wanted = tuple(name for name in wanted if name not in ("line", "plane"))

    from hessfunc.app import report
    from hessfunc.app.analysis import analyse
    from hessfunc.app.problems.targets import make_problem

    folder = report.Folder(out, invocation(context))
    status, lock = "failed", ExitStack()
    try:
        torch_device, torch_dtype = place(device, dtype)
        with mesh_of_all(torch_device) as (mesh, torch_device), Bars(quiet=quiet) as progress:

            def begin() -> None:
                if speaks():
                    lock.enter_context(held(out))
                    folder.begin()

            on_all(mesh, begin)

            divided = None if shard is None else mesh

            def call() -> Any:
                return _returned(context.params, torch_device, torch_dtype, divided, progress)

            # A sharded model communicates by itself when it is made and evaluated.
            at_once = on_all if shard is None else lambda _, act: act()
            returned = (at_once if is_text else on_all)(mesh, call)

            def make() -> Problem:
                kind = target.partition(":")[0]
                return make_problem(
                    target,
                    returned,
                    device=torch_device,
                    dtype=torch_dtype,
                    count=_EXAMPLES.get(kind) if examples is None else examples,
                    batch_size=_SEQUENCES if is_text and batch_size is None else batch_size,
                    mesh=None if is_text else divided,
                    shard=None if shard is None else shard.split(","),
                )

            problem = at_once(mesh, make)
            folder.subject = at_once(mesh, lambda: _subject(target, curvature, problem, progress))
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
                mesh=None if shard is not None else mesh,
                on_part=lambda name: bar(progress, name),
            ):
                if speaks():
                    folder.add(part)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        finished = ", ".join(part.name for part in folder.parts) or "none"
        fail(f"interrupted; finished parts in {out}: {finished}", code=130)
    finally:
        with lock:
            if speaks():
                folder.close(status)

    content = folder.content
    return Output(
        (
            f"\n{target}: {report.plain(report.headline(content['subject']))}",
            report.table(content["results"]),
            f"report.html, results.json, pictures and full results (.npz) are in {out}",
        ),
        content,
    )


def _parts(only: str | None) -> tuple[str, ...]:
    """Return the names of the parts that are computed, in the order of the analysis."""
    if only is None:
        return PARTS
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        wrong = unknown[0] if unknown else only
        fail(f"--only must be a list of {', '.join(PARTS)}, separated by commas, not {wrong!r}")
    along = [name for name in names if name in ("line", "plane")]
    if along and "eigenvalues" not in names:
        fail(f"--only {along[0]} is along eigenvectors: pass --only eigenvalues,{along[0]}")
    return tuple(name for name in PARTS if name in names)


def _returned(
    given: Mapping[str, Any],
    device: torch.device | None,
    dtype: torch.dtype | None,
    mesh: DeviceMesh | None,
    progress: Bars,
) -> Any:
    """Return the model, criterion and loader of a target, or its loss, params and batches."""
    from hessfunc.app.problems import targets

    target, seed = given["target"], given["seed"]
    tick = bar(progress, "training" if target == "digits" else target)
    returned: Any
    match target.partition(":"):
        case "digits", _, _:
            epochs = targets.DIGITS_EPOCHS
            return targets.digits(
                seed=seed, on_epoch=lambda epoch, loss: tick(epoch / epochs, f"loss {loss:.3g}")
            )
        case "cifar10", _, _:
            returned = targets.cifar10(given["data"], given["weights"])
        case "hf", _, path:
            from hessfunc.app.problems.huggingface import language_model

            returned = language_model(
                Path(path),
                given["text"],
                sequence=given["sequence"],
                device=device,
                dtype=dtype,
                mesh=mesh,
                shard=None if mesh is None else given["shard"].split(","),
                seed=seed,
            )
        case _:
            returned = targets.imported(target)
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
