"""Command ``hessfunc experiment``, which compares training methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hessfunc.app.cli.errors import fail
from hessfunc.app.cli.folders import held, refuse_other_files
from hessfunc.app.cli.progress import Bars, bar, finished_fraction, line
from hessfunc.app.cli.ranks import place, refuse_several
from hessfunc.app.terminal import Output

if TYPE_CHECKING:
    from hessfunc.training.history import Run


def experiment(
    name: str,
    epochs: int | None = None,
    examples: int | None = None,
    batch_size: int | None = None,
    seeds: int = 1,
    minutes: float | None = None,
    data_path: Path | None = None,
    device: str | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> Output:
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
    from hessfunc.app import tasks
    from hessfunc.app.experiments import EXPERIMENTS, compared
    from hessfunc.app.table import markdown, table
    from hessfunc.files import write_text
    from hessfunc.plot.trainings import draw
    from hessfunc.training import history

    chosen = EXPERIMENTS[name]
    chosen = replace(
        chosen, epochs=epochs or chosen.epochs, batch_size=batch_size or chosen.batch_size
    )
    out = out or Path(name)
    refuse_several("experiment")
    torch_device, _ = place(device)
    seen, held_out = tasks.examples(
        chosen.dataset, path=data_path, count=examples, device=torch_device
    )
    settings = {
        **chosen.settings(),
        "examples": len(seen),
        "test": len(held_out),
        "minutes": minutes,
        "device": str(torch_device or "cpu"),
    }
    with held(out), Bars(quiet=quiet) as progress:
        refuse_other_files(out, ("results.md", "curves.png"), "results.json")
        runs = history.read(out / "results.json", settings)

        def watched(method: str, seed: int) -> Callable[[Run], None]:
            tick = bar(progress, f"{method}, seed {seed}")
            return lambda run: tick(
                finished_fraction(run.records[-1], chosen.epochs, minutes), line(run.records[-1])
            )

        try:
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
                write_text(out / "results.md", f"{chosen.title}\n\n{markdown(runs)}")
                draw(out / "curves.png", runs)
                progress.say(f"{run.method}, seed {run.seed}: {line(run.records[-1])}; {run.ended}")
        except KeyboardInterrupt:
            fail(f"interrupted; {len(runs)} finished training runs are in {out}", code=130)

    parts = (
        f"\n{chosen.title}",
        table(runs),
        f"results.json, results.md and curves.png are in {out}",
    )
    return Output(parts, history.content(settings, runs))
