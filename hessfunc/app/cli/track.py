"""Command ``hessfunc track``, which tracks the curvature of a user's own training."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import typer

from hessfunc.app.cli.errors import fail, invocation
from hessfunc.app.cli.folders import held, refuse_other_files
from hessfunc.app.cli.ranks import refuse_several
from hessfunc.app.terminal import Output

# Options of the measurements, which `tracked` takes.
_MEASURED = (
    *("every", "top", "bottom", "trace_probes", "critical", "preconditioned"),
    *("rtol", "max_matvecs", "seed"),
)


def track(
    context: typer.Context,
    target: str,
    out: Path = Path("hessfunc-track"),
    every: int = 100,
    curvature: str = "hessian",
    top: int = 1,
    bottom: int = 0,
    trace_probes: int = 0,
    critical: bool = False,
    preconditioned: bool = False,
    rtol: float = 0.01,
    max_matvecs: int = 100,
    seed: int = 0,
    quiet: bool = False,
) -> Output:
    """Track the curvature of a model while your own function trains it.

    TARGET is module:function, importable from the current directory. The function takes one
    argument and calls it once, before its loop, with the model, the criterion and the batches on
    which curvature is measured. After each step, it calls `step()` of the result:

        def training(track):
            ...
            tracker = track(model, criterion, batches, optimizer=optimizer)
            for inputs, targets in loader:
                ...
                optimizer.step()
                tracker.step()

    The training stays the same to the bit. Each point is on the disk before the training continues,
    in points.jsonl; report.html and tracked.png follow at the end. After an
    interruption, the same command starts the function again: `track(..., steps=n)` continues after
    n steps, and `track.folder` is a place for checkpoints of your own.
    """
    if not all(target.partition(":")):
        fail(f"TARGET must be module:function, not {target!r}")
    refuse_several("track")

    from hessfunc.app.analysis import CURVATURES
    from hessfunc.app.problems.targets import TargetError, called, function_of
    from hessfunc.app.report.tracked import POINTS, RUN, as_table
    from hessfunc.app.tracked import Track, TrackedRun

    measured = {name: context.params[name] for name in _MEASURED}
    settings = {"target": target, "curvature": curvature, **measured}
    run, status = TrackedRun(out, invocation(context), settings), "failed"
    train = function_of(target)
    with held(out):
        refuse_other_files(out, (POINTS, "report.html", "tracked.png"), RUN)
        run.begin()
        try:
            with ExitStack() as stack:
                options = {
                    **measured,
                    "curvature": CURVATURES[curvature],
                    "progress": not quiet,
                }
                handle = Track(out, options, stack)
                called(target, train, handle)
            if not handle.is_used:
                raise TargetError(
                    f"{target} returned without a call of its argument: call "
                    "`tracker = track(model, criterion, batches)` before the loop, and "
                    "`tracker.step()` after each step"
                )
            status = "complete"
        except KeyboardInterrupt:
            status = "interrupted"
            fail(f"interrupted; the measured points are in {out}", code=130)
        finally:
            run.close(status)
    points = [point.to_dict() for point in run.points]
    return Output(
        (as_table(run.points), f"{POINTS}, report.html and tracked.png are in {out}"),
        {**run.content, "points": points},
    )
