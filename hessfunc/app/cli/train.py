"""Command ``hessfunc train``, which trains a small network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from hessfunc.app.cli.errors import fail, invocation
from hessfunc.app.cli.folders import held, refuse_other_files
from hessfunc.app.cli.methods import OF_ABSA, OF_NEWTON, OF_SGD, epochs_of, optimiser, schedule
from hessfunc.app.cli.progress import Bars, bar, finished_fraction, line
from hessfunc.app.cli.ranks import place, refuse_several
from hessfunc.app.cli.trained import named_net, refuse_data
from hessfunc.app.terminal import Output

if TYPE_CHECKING:
    from hessfunc.app import report
    from hessfunc.training.history import Run
    from hessfunc.training.loop import Record
    from hessfunc.training.runs import Track


def train(
    context: typer.Context,
    data: str = "digits",
    arch: str | None = None,
    depth: int | None = None,
    method: str = "sgd",
    optimizer: str | None = None,
    curvature: str | None = None,
    epochs: int = 90,
    batch_size: int = 128,
    large_ratio: int | None = None,
    lr: float = 0.1,
    lr_decay: float = 0.2,
    lr_decay_epoch: str = "30,60",
    adversarial_share: float | None = None,
    eps: float | None = None,
    patience: int | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    alpha: float | None = None,
    solve: str | None = None,
    cg_max: int | None = None,
    cg_rtol: float | None = None,
    cg_atol: float | None = None,
    max_blocks: int | None = None,
    examples: int | None = None,
    data_path: Path | None = None,
    track: str | None = None,
    minutes: float | None = None,
    device: str | None = None,
    seed: int = 0,
    out: Path = Path("hessfunc-train"),
    save_every: int = 100,
) -> Output:
    """Train a small network with SGD or Newton's method, on batches of fixed or growing size.

    Prints loss and accuracy after each epoch, and writes report.html for the browser, history.json
    and history.png. These show all quantities against epochs and against gradient-equivalents, the
    work in units of one gradient. With --track or --method absa they include the dominant
    eigenvalue, batch size and learning rate. The state is saved in checkpoint.pt: after an
    interruption or a kill, the same command resumes from it and ends with the same bits.
    """
    from hessfunc.app.table import summary
    from hessfunc.training.history import content

    folder = _Folder(out, invocation(context), batch_size)
    # The folder stays locked until an interrupted training is written, too.
    with ExitStack() as lock:
        try:
            trained = _trained(context.params, context.args, folder, lock)
        except KeyboardInterrupt:
            folder.finish_interrupted()
            fail(f"interrupted; the finished epochs are in {out}", code=130)

    written = f"report.html, history.json, history.png and checkpoint.pt are in {out}"
    parts = (summary(trained, batch_size=batch_size), written)
    failure = "" if trained.ended in ("complete", "time is up") else trained.ended
    return Output(parts, content(folder.settings, [trained]), failure)


@dataclass
class _Folder:
    """Folder of the results of a training.

    Attributes:
        path: Path of the folder.
        started: Command, seed and time of the run, for the report.
        batch_size: Number of examples in a base batch.
        settings: Settings of the run as plain data, empty until the options are checked.
        running: Run so far; None before its first record.
    """

    path: Path
    started: report.Invocation
    batch_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    running: Run | None = None

    def refuse_others(self) -> None:
        """Refuse files that no earlier run with these settings has written."""
        from hessfunc.training.history import read

        if not (self.path / "checkpoint.pt").exists():
            refuse_other_files(self.path, ("history.png", "report.html"), "history.json")
            # `read` raises if the file belongs to other settings or to another program.
            read(self.path / "history.json", self.settings)

    def keep(self, run: Run) -> None:
        """Write the records so far."""
        from hessfunc.training.history import write

        self.running = run
        write(self.path / "history.json", self.settings, [run])

    def finish(self, run: Run) -> None:
        """Write the records, the figure and the report."""
        from hessfunc.app import report
        from hessfunc.files import write_text
        from hessfunc.plot.trainings import draw

        self.keep(run)
        draw(self.path / "history.png", [run], batch_size=self.batch_size)
        picture = (self.path / "history.png").read_bytes()
        page = report.training(run, self.settings, self.started, picture)
        write_text(self.path / "report.html", page)

    def finish_interrupted(self) -> None:
        """Write what an interrupted training has finished."""
        if self.running is not None:
            self.finish(replace(self.running, ended="interrupted"))


def _trained(given: Mapping[str, Any], more: list[str], folder: _Folder, lock: ExitStack) -> Run:
    """Check the options, train, and write the results.

    Args:
        given: Values of the options by their names.
        more: Arguments that belong to no option.
        folder: Folder of the results.
        lock: Stack that holds the lock of the folder.
    """
    from hessfunc.app import tasks
    from hessfunc.training.checkpoint import TrainingCheckpoint
    from hessfunc.training.methods import SGD
    from hessfunc.training.runs import run

    refuse_data(given["data"], given["data_path"])
    refuse_several("train")
    net = named_net(given["arch"], given["depth"])
    decay = epochs_of(given["lr_decay_epoch"], more)
    chosen = optimiser(given["optimizer"], given["lr"], _of(OF_SGD, given), _of(OF_NEWTON, given))
    plan, of_plan = schedule(
        given["method"],
        epochs=given["epochs"],
        large_ratio=given["large_ratio"],
        lr_decay=given["lr_decay"],
        lr_decay_epochs=decay,
        of_absa=_of(OF_ABSA, given),
    )
    device, _ = place(given["device"])
    make_model = tasks.net(given["data"], net)
    seen, held_out = tasks.examples(
        given["data"], path=given["data_path"], count=given["examples"], device=device
    )
    lock.enter_context(held(folder.path))
    path = given["data_path"]
    folder.settings = {
        "data": given["data"],
        "data_path": None if path is None else str(path.resolve()),
        "arch": net,
        "optimizer": type(chosen).__name__,
        **asdict(chosen),
        "method": given["method"],
        **of_plan,
        "epochs": given["epochs"],
        "batch_size": given["batch_size"],
        "examples": len(seen),
        "test": len(held_out),
        "track": given["track"],
        "seed": given["seed"],
    }
    folder.refuse_others()
    kind = "sgd" if isinstance(chosen, SGD) else "newton"
    name = kind if given["method"] == "sgd" else f"{kind}, {given['method']}"
    with Bars(quiet=given["quiet"]) as progress:
        tick = bar(progress, f"{net} by {name}")

        def show(record: Record) -> None:
            finished = finished_fraction(record, given["epochs"], given["minutes"])
            tick(finished, f"loss {record.loss:.4g}")

        def on_record(run: Run) -> None:
            folder.keep(run)
            show(run.records[-1])
            progress.say(line(run.records[-1]))

        def on_step(count: int) -> None:
            assert folder.running is not None
            last = folder.running.records[-1]
            show(replace(last, epoch=int(last.epoch) + count / len(seen)))

        checkpoint = folder.path / "checkpoint.pt"
        trained = run(
            name,
            make_model,
            chosen,
            seen,
            held_out,
            epochs=given["epochs"],
            batch_size=given["batch_size"],
            seed=given["seed"],
            minutes=given["minutes"],
            device=device,
            schedule=plan,
            eps=0.005 if given["eps"] is None else given["eps"],
            track=cast("Track", given["track"]),
            checkpoint=TrainingCheckpoint(checkpoint, folder.settings, given["save_every"]),
            callback=on_record,
            on_step=on_step,
        )
    folder.finish(trained)
    return trained


def _of(options: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the options of one method, by the names of its settings."""
    return {
        name: given[flag.removeprefix("--").replace("-", "_")] for name, flag in options.items()
    }
